"""Lightning callbacks, one concern a file."""

from mamba3_train.training.callbacks.checkpointing import Checkpointing
from mamba3_train.training.callbacks.disk_space import DiskSpace
from mamba3_train.training.callbacks.hang_detection import HangDetection
from mamba3_train.training.callbacks.norms import Norms
from mamba3_train.training.callbacks.preemption import Preempted, Preemption
from mamba3_train.training.callbacks.profiling import Profiling
from mamba3_train.training.callbacks.progress import Progress
from mamba3_train.training.callbacks.stability import Stability
from mamba3_train.training.callbacks.stragglers import Stragglers
from mamba3_train.training.callbacks.throughput import Throughput

__all__ = [
    "Checkpointing",
    "DiskSpace",
    "HangDetection",
    "Norms",
    "Preempted",
    "Preemption",
    "Profiling",
    "Progress",
    "Stability",
    "Stragglers",
    "Throughput",
]
