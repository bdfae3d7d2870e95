"""Saving by all ranks together, beside training or with it waiting; one outcome for all of them."""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mamba3_train.checkpoint import folders
from mamba3_train.checkpoint.sharded import Piece, Stager, write_shard

log = logging.getLogger(__name__)


class SaveFailed(Exception):
    """Storage refused a checkpoint; what was saved before is untouched, and saving again may succeed."""


class Saver:
    """Writes checkpoints, one at a time; every rank calls `prepare`, `start` and `wait` in the same order.

    A thread copies each rank's share into memory, then writes, hashes and publishes it while training goes on.

    Args:
        checkpoints: where their folders lie.
        asynchronous: let training go on meanwhile.
        keep_last: how many stay.
        keep_every_n_steps: steps whose checkpoints stay besides; 0 is none.
        group: the processes that save together, a group over the CPU that nobody else talks in; None: this one alone.
    """

    def __init__(
        self,
        checkpoints: Path,
        *,
        asynchronous: bool,
        keep_last: int,
        keep_every_n_steps: int = 0,
        group: dist.ProcessGroup | None = None,
    ):
        self.checkpoints, self.asynchronous = checkpoints, asynchronous
        self.keep_last, self.keep_every_n_steps = keep_last, keep_every_n_steps
        self.seconds_waited = self.seconds_written = 0.0
        """Of the last save: how long `start` and `wait_until_copied` held training up, and how long all of it took."""
        self._ranks = _Ranks(group)
        self._stager = Stager(self._ranks.exchange)
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._error: Exception | None = None
        self.may_change = True
        """Whether training knows that the tensors of the last `start` are copied."""

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Agree on who writes what and allocate memory for it, once; else the first `start` does, and takes longer."""
        self._stager.begin(tensors)

    def start(
        self, step: int, tensors: Mapping[str, Tensor], documents: Mapping[str, str], way_back: int | None = None
    ) -> None:
        """Begin to save a step: tensors by name, and the contents of the other files by theirs.

        Of older checkpoints the newest up to the step `way_back` stays, however many there are. The tensors must not
        change before `wait_until_copied` or `wait`; the save before must have been waited for.
        """
        begin = time.perf_counter()
        self._error, self.may_change = None, False
        self._copied.clear()
        arguments = (folders.step_folder(self.checkpoints, step), self._stager.begin(tensors), documents, way_back)
        if self.asynchronous:
            # A daemon: a process that dies of an error must not hang in a save that the other ranks have left.
            self._thread = threading.Thread(target=self._save, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._save(*arguments)
        self.seconds_waited = time.perf_counter() - begin

    def wait_until_copied(self) -> None:
        """Return when the tensors of the last `start` may change."""
        begin = time.perf_counter()
        self._copied.wait()
        self.may_change = True
        self.seconds_waited += time.perf_counter() - begin

    @property
    def finished(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Return when the save is published.

        Raises:
            SaveFailed: it is not, because storage failed on some rank.
            RuntimeError: it is not, for a reason that trying again will not mend.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.may_change = True
        if self._error is not None:
            raise self._error

    def _save(
        self, folder: Path, copy: Callable[[], list[Piece]], documents: Mapping[str, str], way_back: int | None
    ) -> None:
        begin = time.perf_counter()
        pieces, problem = _attempt(copy)
        self._copied.set()
        try:
            self._ranks.first(lambda: folders.begin(folder))
            shards = self._ranks.all(lambda: _write(folder, pieces, self._ranks) if problem is None else _fail(problem))
            self._ranks.first(lambda: folders.publish(folder, shards, documents))
            if self._ranks.rank == 0:
                self._prune(folder, way_back)
        except Exception as error:  # told by wait()
            self._error = error
            if self._ranks.rank == 0:
                shutil.rmtree(folders.unfinished(folder), ignore_errors=True)
        self.seconds_written = time.perf_counter() - begin

    def _prune(self, saved: Path, way_back: int | None) -> None:
        try:
            folders.prune(self.checkpoints, saved, self.keep_last, self.keep_every_n_steps, way_back)
        except OSError as error:
            log.warning("an old checkpoint could not be deleted: %s", error)


def _write(folder: Path, pieces: list[Piece], ranks: "_Ranks") -> dict[str, dict]:
    if not pieces:
        return {}
    name = f"shard-{ranks.rank + 1:05d}-of-{ranks.count:05d}.safetensors"
    return {name: write_shard(folders.unfinished(folder) / name, pieces)}


class _Ranks:
    """The processes that save, talking over the CPU in a group of their own, or the only one there is."""

    def __init__(self, group: dist.ProcessGroup | None):
        self._group = group
        self.rank = dist.get_rank() if self._group else 0
        self.count = dist.get_world_size() if self._group else 1

    def exchange(self, value: Any, decide: Callable[[list], list]) -> Any:
        """This rank's element of what rank 0 decides when it has every rank's value."""
        if self._group is None:
            return decide([value])[0]
        values = self._gather(value)
        mine = [None]
        dist.scatter_object_list(mine, decide(values) if values else None, src=0, group=self._group)
        return mine[0]

    def first(self, action: Callable[[], None]) -> None:
        """Let rank 0 act; every rank raises what it raises."""
        problem = _attempt(action)[1] if self.rank == 0 else None
        self._agree(problem)

    def all(self, action: Callable[[], dict]) -> dict:
        """Let every rank act; rank 0 gets all results in one; every rank raises what any of them raises."""
        result, problem = _attempt(action)
        gathered = self._gather((result, problem and (problem[0], f"rank {self.rank}: {problem[1]}")))
        self._agree(next((p for _, p in gathered if p), None) if gathered else None)
        return {key: value for part, _ in gathered or [] for key, value in part.items()}

    def _gather(self, value: Any) -> list | None:
        if self._group is None:
            return [value]
        values = [None] * self.count if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values

    def _agree(self, problem: tuple[bool, str] | None) -> None:
        if self._group is not None:
            shared = [problem]
            dist.broadcast_object_list(shared, src=0, group=self._group)
            problem = shared[0]
        if problem is not None:
            _fail(problem)


def _fail(problem: tuple[bool, str]) -> None:
    raise SaveFailed(problem[1]) if problem[0] else RuntimeError(problem[1])


def _attempt(action: Callable) -> tuple[Any, tuple[bool, str] | None]:
    """The result of an action, and what went wrong: whether storage did, and what it says."""
    try:
        return action(), None
    except OSError as error:
        reason = error.strerror or str(error)
        return None, (True, f"{reason} ({error.filename})" if error.filename else reason)
    except Exception as error:
        return None, (False, f"{type(error).__name__}: {error}")
