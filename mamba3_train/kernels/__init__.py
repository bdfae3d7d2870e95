"""The scan: its definition in plain PyTorch and, behind the same op, the kernels that make it fast."""

from mamba3_train.kernels.documents import document_ids_from_lengths
from mamba3_train.kernels.reference import ScanState
from mamba3_train.kernels.scan import mamba3_scan
from mamba3_train.kernels.step import StepState, mamba3_step

__all__ = ["ScanState", "StepState", "document_ids_from_lengths", "mamba3_scan", "mamba3_step"]
