"""The files of a prepared corpus: in a folder of this machine, or at an address and fetched as they are needed."""

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

from mamba3_train.data.shard_cache import ShardCache
from mamba3_train.errors import UserError

MANIFEST = "manifest.json"

# How long a look at a file's size and time of change is good for: a shared file system must not be asked at every row.
RECHECK_SECONDS = 30.0

# Seconds between attempts to read from a remote address.
RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)
_BLOCK = 1 << 23


@dataclass(frozen=True)
class StoredFile:
    """A file as the manifest describes it: its name in the corpus, its size and its SHA-256."""

    name: str
    bytes: int
    sha256: str


class LocalFiles:
    """A corpus in a folder.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stamps: dict[str, tuple[int, int, int]] = {}
        self._checked: dict[str, float] = {}

    def __str__(self) -> str:
        return str(self.folder)

    def expect(self, files: Iterable[StoredFile]) -> None:
        """Refuse missing and truncated files now, and later those that changed since.

        Raises:
            UserError: naming the file.
        """
        for file in files:
            path = self.folder / file.name
            if not path.is_file():
                raise UserError(f"shard file missing: {path}; prepare the corpus again")
            if path.stat().st_size != file.bytes:
                raise UserError(
                    f"corrupt shard: {path} has {path.stat().st_size:,} bytes, its manifest says {file.bytes:,}; "
                    "prepare the corpus again"
                )
            self._stamps[file.name] = stamp(path)

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""
        return open(self.folder / name, "rb")

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.folder / name).is_file()

    def read(self, name: str) -> bytes:
        """Content of a small file; FileNotFoundError if there is none."""
        return (self.folder / name).read_bytes()

    def sha256(self, name: str) -> str:
        """Hash of a file's content."""
        with self.open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def check_unchanged(self, name: str) -> None:
        """Refuse a file that is not the one expected at the start; reading a truncated map would end the process."""
        now = time.monotonic()
        if now - self._checked.get(name, -float("inf")) < RECHECK_SECONDS:
            return
        path = self.folder / name
        if not path.is_file() or stamp(path) != self._stamps[name]:
            raise UserError(f"shard changed while it was being read: {path}; prepare the corpus again, then resume")
        self._checked[name] = now

    def fetch_ahead(self, names: list[str]) -> None:
        """Nothing: they are here."""


def stamp(path: Path) -> tuple[int, int, int]:
    """What changes when somebody writes to a file or puts another in its place."""
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class RemoteFiles:
    """A corpus at an address that `fsspec` understands (s3://, gs://, https://, …).

    Shards come through a cache, each checked by its hash; small files are read where they are.

    Args:
        address: of the folder that holds the manifest.
        cache: where shards are kept; None, and shards cannot be opened.
    """

    def __init__(self, address: str, cache: ShardCache | None):
        self.address = address.rstrip("/")
        self.cache = cache
        self._expected: dict[str, StoredFile] = {}
        self._wishes: list[str] = []
        self._wished = -float("inf")
        self._ahead: threading.Thread | None = None

    def __str__(self) -> str:
        return self.address

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_wishes": [], "_wished": -float("inf"), "_ahead": None}

    def expect(self, files: Iterable[StoredFile]) -> None:
        """Know what the files must be; each is checked when it is fetched."""
        self._expected |= {file.name: file for file in files}

    def check_sizes(self) -> None:
        """Refuse, before any is fetched, a remote file that is missing or of another size than expected.

        Raises:
            UserError: naming the file, or that the address cannot be reached.
        """
        sizes = self._attempt("the list of files", self._sizes)
        for name, file in self._expected.items():
            if sizes.get(name) is None:
                raise UserError(f"shard file missing: {self.address}/{name}; upload the corpus again")
            if sizes[name] != file.bytes:
                raise UserError(
                    f"corrupt shard: {self.address}/{name} has {sizes[name]:,} bytes, its manifest says "
                    f"{file.bytes:,}; upload the corpus again"
                )

    def open(self, name: str) -> BinaryIO:
        """Open a shard's file for reading, fetched if need be; it stays in the cache while open or mapped."""
        file = self._expected[name]
        return self.cache.open(self._key(file), file.bytes, self._fetch(file))

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self._attempt(name, lambda: _file_system(self.address).exists(f"{self.address}/{name}"))

    def read(self, name: str) -> bytes:
        """Content of a small file; FileNotFoundError if there is none."""
        return self._attempt(name, lambda: _file_system(self.address).cat_file(f"{self.address}/{name}"))

    def sha256(self, name: str) -> str:
        """Hash of a remote file's content."""
        return self._attempt(name, lambda: self._copy(name, None))

    def check_unchanged(self, name: str) -> None:
        """Nothing: what is in the cache stays as it was fetched."""

    def fetch_ahead(self, names: list[str]) -> None:
        """Begin to fetch files in the background that are needed soon; the newest wish replaces older ones."""
        now = time.monotonic()
        if names == self._wishes and now - self._wished < RECHECK_SECONDS:
            return
        self._wishes, self._wished = names, now
        if self._ahead is None or not self._ahead.is_alive():
            self._ahead = threading.Thread(target=self._fetch_wishes, daemon=True)
            self._ahead.start()

    def _fetch_wishes(self) -> None:
        wishes = None
        while wishes is not self._wishes:
            wishes = self._wishes
            for name in wishes:
                file = self._expected[name]
                try:
                    self.cache.fetch_ahead(self._key(file), file.bytes, self._fetch(file))
                except Exception:  # whoever comes to need the file tries again, and reports what is wrong
                    return
                if wishes is not self._wishes:
                    break

    def _key(self, file: StoredFile) -> str:
        # By content: another corpus at the same address, or a copy at another one, is told apart or shared rightly.
        return f"{file.sha256[:2]}/{file.sha256[:32]}"

    def _fetch(self, file: StoredFile) -> Callable[[BinaryIO], None]:
        def fetch(into: BinaryIO) -> None:
            try:
                self._attempt(file.name, lambda: self._copy_checked(file, into))
            except FileNotFoundError as error:
                raise UserError(f"shard file missing: {self.address}/{file.name}; upload the corpus again") from error

        return fetch

    def _copy_checked(self, file: StoredFile, into: BinaryIO) -> None:
        found = self._copy(file.name, into)
        if into.tell() != file.bytes or found != file.sha256:
            raise ValueError(f"{into.tell():,} bytes came, of {file.bytes:,}, or not those with the manifest's SHA-256")
        into.truncate()

    def _copy(self, name: str, into: BinaryIO | None) -> str:
        """Read a remote file from its beginning, into a local one if given, and return its hash."""
        digest = hashlib.sha256()
        if into is not None:
            into.seek(0)
        with _file_system(self.address).open(f"{self.address}/{name}", "rb", block_size=_BLOCK) as remote:
            while block := remote.read(_BLOCK):
                digest.update(block)
                if into is not None:
                    into.write(block)
        return digest.hexdigest()

    def _sizes(self) -> dict[str, int | None]:
        system = _file_system(self.address)
        if "http" in system.protocol:  # has no lists of files
            return {name: system.info(f"{self.address}/{name}")["size"] for name in self._expected}
        root = system._strip_protocol(self.address)
        found = system.find(root, detail=True)
        return {path.removeprefix(root).lstrip("/"): entry["size"] for path, entry in found.items()}

    def _attempt(self, name: str, action: Callable):
        """Do something remote, several times if need be; FileNotFoundError passes through.

        Raises:
            UserError: naming the file, when the last attempt has failed, or at once where another cannot help.
        """
        for delay in (*RETRY_DELAYS, None):
            try:
                return action()
            except (FileNotFoundError, UserError):
                raise
            except Exception as error:  # every file system raises its own kinds
                if _local(error):
                    raise
                if delay is None or isinstance(error, PermissionError):
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    raise UserError(
                        f"{name} of {self.address} cannot be had ({reason}); check the address, the network and the "
                        "credentials, then run the same command again"
                    ) from error
            time.sleep(delay)


def _local(error: Exception) -> bool:
    """Whether an error is about this machine's disk, which fetching again does not help."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _file_system(address: str):
    # Not that of another process: loader workers are forked from one whose connections are dead to them.
    return _file_system_of(address, os.getpid())


@cache
def _file_system_of(address: str, process: int):
    import fsspec  # a tenth of a second of import that local corpora do not need

    try:
        # No remembered listings: what is uploaded again must be found as it is now.
        return fsspec.core.url_to_fs(address, skip_instance_cache=True, use_listings_cache=False)[0]
    except (ImportError, ValueError) as error:  # no such kind of address, or its package is missing
        raise UserError(f"{address} cannot be opened: {error} (pip install 'mamba3-train[remote]')") from error


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address of something that is not on this machine."""
    return "://" in str(path) and not str(path).startswith("file://")


def corpus_files(corpus: "str | Path | LocalFiles | RemoteFiles") -> LocalFiles | RemoteFiles:
    """The files of a corpus given by its folder or address, or as files already."""
    if isinstance(corpus, LocalFiles | RemoteFiles):
        return corpus
    if is_remote(corpus):
        return RemoteFiles(str(corpus), cache=None)
    return LocalFiles(Path(str(corpus).removeprefix("file://")))
