"""A folder of fetched files, bounded in size, that all processes of a machine share.

A file is either absent or whole. It is locked by the kernel (flock) as long as anybody has it open or mapped, so locks
end with the processes that hold them, however these end; what is locked is never removed. The folder must lie on a disk
of this machine.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from mamba3_train.errors import UserError

PARTIAL = ".partial"

# How long a reader waits for room that others hold before it gives up.
PATIENCE_SECONDS = 120.0
_POLL_SECONDS = 0.05


def default_folder() -> Path:
    """The user's cache: MAMBA3_TRAIN_CACHE, or where the system keeps such things."""
    system = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MAMBA3_TRAIN_CACHE") or system / "mamba3_train")


class ShardCache:
    """Fetches files when they are missing and removes those longest unused when room is needed.

    Args:
        folder: where files lie.
        limit_bytes: of all files in it, those being fetched included.
    """

    def __init__(self, folder: str | Path, limit_bytes: int):
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes

    def open(self, name: str, size: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        """Open a file for reading, fetched first if it is missing; it stays while the file or a map of it is open.

        Args:
            name: path within the folder.
            size: bytes it will have.
            fetch: writes the content; whatever it raises leaves no file behind.

        Raises:
            UserError: files in use leave no room for so long that nothing will change.
        """
        path = self.folder / name
        while (file := _open_held(path)) is None:
            self._fetch(path, size, fetch, wait=True)
        return file

    def fetch_ahead(self, name: str, size: int, fetch: Callable[[BinaryIO], None]) -> bool:
        """Fetch a file that will be needed, unless it is there, or being fetched, or there is no room; True if done."""
        path = self.folder / name
        return not path.exists() and self._fetch(path, size, fetch, wait=False)

    def _fetch(self, path: Path, size: int, fetch: Callable[[BinaryIO], None], wait: bool) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        with open(partial, "ab") as claim:
            if not _lock_alone(claim):  # another process is at it
                if wait:  # as a reader would, since it may have readers as soon as it is whole
                    fcntl.flock(claim, fcntl.LOCK_SH)
                return False
            try:
                # Another process may have finished, given up, or cleared away what was opened here.
                if path.exists() or not _same_file(claim, partial) or not self._reserve(claim, size, wait):
                    return False
                with open(partial, "r+b") as file:
                    fetch(file)
                    file.flush()
                    os.fsync(file.fileno())
                with self._alone():  # whoever counts must find it under one of its names
                    os.replace(partial, path)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise UserError(
                    f"the disk of the shard cache {self.folder} is full before data.cache_gib="
                    f"{self.limit_bytes / 2**30:g} is: lower it, or set data.cache_dir to another disk"
                ) from error
            finally:
                # Until it was renamed, the partial file is ours to remove.
                if _same_file(claim, partial):
                    partial.unlink()
        return True

    def _reserve(self, claim: BinaryIO, size: int, wait: bool) -> bool:
        """Give our partial file its full size, within the limit; whether there was room."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        claim.truncate(0)  # what a killed process left
        while True:
            with self._alone():
                if self._make_room(size):
                    claim.truncate(size)
                    return True
            if not wait:
                return False
            if time.monotonic() > deadline:
                raise UserError(
                    f"the shard cache {self.folder} has no room for {size:,} bytes: all of data.cache_gib="
                    f"{self.limit_bytes / 2**30:g} is in use; raise it, or lower data.shuffle_shards"
                )
            time.sleep(_POLL_SECONDS)

    def _make_room(self, size: int) -> bool:
        """Remove files, the longest unused first, until `size` more bytes fit; files in use stay."""
        found = sorted(self._files(), key=lambda entry: entry[0])
        excess = sum(stored for _, stored, _ in found) + size - self.limit_bytes
        for _, stored, path in found:
            if excess <= 0:
                break
            if stored and _remove_unless_held(path):
                excess -= stored
        return excess <= 0

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """Time of last use, bytes and path of everything in the folder."""
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    stat = os.stat(path)
                    yield stat.st_mtime_ns, stat.st_size, path

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time counts and makes room."""
        with open(self.folder / ".lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _open_held(path: Path) -> BinaryIO | None:
    """Open a file and keep it from being removed; None if it is not there."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if not _same_file(file, path):  # removed between the two
        file.close()
        return None
    os.utime(file.fileno())  # its time of change tells when it was last used
    return file


def _remove_unless_held(path: str) -> bool:
    """Remove a file that nobody has open; whether its bytes are gone."""
    try:
        with open(path, "rb") as file:
            # Under another name by now, if its fetching was finished meanwhile.
            if not _lock_alone(file) or not _same_file(file, path):
                return False
            os.unlink(path)
            return True
    except FileNotFoundError:
        return False


def _lock_alone(file: BinaryIO) -> bool:
    """Lock a file that nobody else has locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(file: BinaryIO, path: str | Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(file.fileno()))
