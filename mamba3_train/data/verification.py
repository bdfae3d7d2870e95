"""Comparing a corpus with its manifest, byte by byte: on request, and once before it is trained on."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mamba3_train.data.corpus_files import LocalFiles, RemoteFiles, StoredFile, corpus_files, stamp
from mamba3_train.data.shard_cache import default_folder
from mamba3_train.data.token_shards import Corpus, Manifest, read_manifest
from mamba3_train.data.tokenizer import FILE_NAME, Tokenizer
from mamba3_train.errors import UserError


def verify(corpus: Corpus) -> Manifest:
    """Read every byte of a prepared corpus and compare it with the manifest.

    Raises:
        UserError: naming the first shard that is missing or differs, or a tokenizer that is not the one used.
    """
    files = corpus_files(corpus)
    manifest = read_manifest(files)
    files.expect(manifest.files())
    _compare(files, manifest.files())
    _check_tokenizer(files, manifest)
    return manifest


def verify_once(folder: Path) -> None:
    """Like `verify`, but leaves out the files that this user's last call found right and that have not changed since.

    Raises:
        UserError: as `verify` does.
    """
    files = LocalFiles(folder)
    manifest = read_manifest(files)
    files.expect(manifest.files())
    record = default_folder() / "verified" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.json"
    known = json.loads(record.read_text()) if record.is_file() else {}
    found = {file.name: [file.sha256, *stamp(folder / file.name)] for file in manifest.files()}
    changed = [file for file in manifest.files() if known.get(file.name) != found[file.name]]
    _check_tokenizer(files, manifest)
    if not changed:
        return
    size = sum(file.bytes for file in changed)
    if size >= 1 << 30:
        print(f"comparing {size / 2**30:,.1f} GiB of {folder} with its manifest, once", flush=True)
    _compare(files, changed)
    with contextlib.suppress(OSError):  # without a record everything is compared again the next time
        record.parent.mkdir(parents=True, exist_ok=True)
        partial = record.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(found))
        os.replace(partial, record)


def _compare(files: LocalFiles | RemoteFiles, expected: Iterable[StoredFile]) -> None:
    expected = list(expected)
    with ThreadPoolExecutor() as executor:  # hashing and waiting for a network let other threads run
        for file, found in zip(expected, executor.map(lambda file: files.sha256(file.name), expected), strict=True):
            if found != file.sha256:
                raise UserError(
                    f"corrupt shard: {files}/{file.name} does not have the SHA-256 of its manifest; prepare it again"
                )


def _check_tokenizer(files: LocalFiles | RemoteFiles, manifest: Manifest) -> None:
    if Tokenizer.of_corpus(files, manifest.end_of_document_id).fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(f"{files}/{FILE_NAME} is not the tokenizer that these shards were made with")
