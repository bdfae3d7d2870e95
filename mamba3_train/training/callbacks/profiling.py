"""A window of steps under PyTorch's profiler, written to the run folder."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mamba3_train.errors import UserError


class Profiling(Callback):
    """Records some steps of rank 0: a trace for chrome://tracing or Perfetto, and on a GPU a snapshot of its memory.

    Args:
        folder: the run's; `profile/` in it gets the files.
        steps: first and last step to record, counted from 1.

    Raises:
        UserError: steps that are not two, or in the wrong order.
    """

    def __init__(self, folder: Path, steps: list[int]):
        if len(steps) != 2 or not 1 <= steps[0] <= steps[1]:
            raise UserError(f"profile={list(steps)} must be [first,last], two steps counted from 1")
        self.folder, (self.first, self.last) = folder / "profile", steps
        self._profiler: torch.profiler.profile | None = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        """Begin with the first step of the window; or inside it, where a run was resumed there."""
        if not trainer.is_global_zero or self._profiler or not self.first <= trainer.global_step + 1 <= self.last:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._on_gpu = module.device.type == "cuda"
        if self._on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True)
        self._profiler.start()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        """End with the last step of the window."""
        if self._profiler is None or trainer.global_step != min(self.last, trainer.max_steps):
            return
        if self._on_gpu:
            torch.cuda.synchronize()
        self._profiler.stop()
        self.folder.mkdir(exist_ok=True)
        name = f"steps-{self.first}-{self.last}"
        self._profiler.export_chrome_trace(str(self.folder / f"{name}.trace.json.gz"))
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profiler = None
