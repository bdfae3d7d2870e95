"""Compressed text in buckets: `datasets` gives every file system options that only web addresses take.

s3fs refuses them, so no compressed file at an s3:// address can be read (huggingface/datasets, issue 7295).
"""

from functools import cache, partial

import fsspec
from datasets.filesystems import COMPRESSION_FILESYSTEMS

WEB_PROTOCOLS = ("http", "https", "hf")


class _AtAnyAddress:
    """Put before one of `datasets`' file systems of compressed files: leaves those options out elsewhere."""

    def __init__(self, fo="", target_protocol=None, target_options=None, **kwargs):
        own = (target_options or {}).get("client_kwargs", {})
        super().__init__(fo, target_protocol, target_options, **kwargs)
        if target_protocol not in WEB_PROTOCOLS:
            self._open_with_fsspec = partial(self._open_with_fsspec, client_kwargs=own)


@cache
def register() -> None:
    """Let `datasets` read compressed files at every address that `fsspec` knows."""
    for kind in COMPRESSION_FILESYSTEMS:
        fsspec.register_implementation(kind.protocol, type(kind.__name__, (_AtAnyAddress, kind), {}), clobber=True)
