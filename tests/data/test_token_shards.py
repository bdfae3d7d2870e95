"""Shards: open to numpy alone, and never read when something is wrong with them."""

import os
import shutil

import numpy as np
import pytest

from mamba3_train.data import corpus_files
from mamba3_train.data.corpus_files import LocalFiles
from mamba3_train.data.packing import CutRows
from mamba3_train.data.row_order import RowOrder
from mamba3_train.data.token_shards import Manifest, Shard, TokenSplit, read_manifest
from mamba3_train.data.tokenizer import Tokenizer
from mamba3_train.data.verification import verify, verify_once
from mamba3_train.errors import UserError


@pytest.fixture
def copy(corpus, tmp_path):
    return shutil.copytree(corpus, tmp_path / "copy")


def test_numpy_alone_reads_a_corpus(corpus):
    manifest = verify(corpus)
    assert len(manifest.splits["train"]) > 2
    tokenizer = Tokenizer.of_corpus(corpus, manifest.end_of_document_id)
    for shard in manifest.shards():
        tokens = np.memmap(corpus / f"{shard.name}.bin", dtype="<u2", mode="r")
        offsets = np.load(corpus / f"{shard.name}.offsets.npy")
        assert (len(tokens), len(offsets)) == (shard.tokens, shard.documents + 1)
        assert (tokens[offsets[1:] - 1] == tokenizer.end_of_document_id).all()
        assert (np.diff(offsets) > 0).all()


def test_no_temporary_file_stays(corpus):
    assert not list(corpus.glob("*.partial"))


@pytest.mark.parametrize("ending", ["bin", "offsets.npy"])
def test_one_flipped_byte_is_found(copy, ending):
    path = copy / f"{read_manifest(copy).splits['train'][1].name}.{ending}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=path.name):
        verify(copy)


def test_bytes_are_compared_once_and_again_when_they_change(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBA3_TRAIN_CACHE", str(tmp_path / "cache"))
    hashed = []
    sha256 = LocalFiles.sha256
    monkeypatch.setattr(LocalFiles, "sha256", lambda self, name: hashed.append(name) or sha256(self, name))
    verify_once(copy)
    assert sorted(hashed) == sorted(file.name for file in read_manifest(copy).files())
    verify_once(copy)
    assert len(hashed) == len(read_manifest(copy).files())
    path = copy / f"{read_manifest(copy).splits['train'][1].name}.bin"
    path.write_bytes(path.read_bytes()[::-1])
    for _ in range(2):
        with pytest.raises(UserError, match=rf"corrupt shard: .*{path.name}"):
            verify_once(copy)
    path.write_bytes(path.read_bytes()[::-1])
    verify_once(copy)
    assert hashed[-3:] == [path.name] * 3


@pytest.mark.parametrize("damage", ["truncated", "missing"])
@pytest.mark.parametrize("ending", ["bin", "offsets.npy"])
def test_truncated_and_missing_shards_are_refused_at_open(copy, damage, ending):
    manifest = read_manifest(copy)
    path = copy / f"{manifest.splits['train'][0].name}.{ending}"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=path.name):
        TokenSplit(copy, manifest, "train")


@pytest.mark.parametrize("change", ["truncated", "replaced", "rewritten", "missing"])
def test_shard_that_changes_under_a_running_job(copy, change, monkeypatch):
    monkeypatch.setattr(corpus_files, "RECHECK_SECONDS", 0)
    manifest = read_manifest(copy)
    split = TokenSplit(copy, manifest, "train")
    path = copy / f"{manifest.splits['train'][0].name}.bin"
    before, _, _ = split.read(np.array([0]), 100)
    content = path.read_bytes()
    other = bytes(reversed(content))
    assert other[:200] != before.tobytes()
    if change == "truncated":
        os.truncate(path, 10)
    elif change == "missing":
        path.unlink()
    elif change == "replaced":
        (copy / "other").write_bytes(other)
        os.replace(copy / "other", path)
    else:
        path.write_bytes(other)
    with pytest.raises(UserError, match=path.name):
        split.read(np.array([0]), 100)
    after, _, _ = split.read(np.array([manifest.splits["train"][0].tokens]), 100)
    assert after.shape == (1, 100)


def test_a_trillion_tokens_by_arithmetic(tmp_path):
    """Eight shards of 250 GB that are holes on the disk; what is written at a few places is found there at once."""
    each, per_document = 125 * 10**9, 10**9
    names = [f"web-train-{number:05d}" for number in range(8)]
    for name in names:
        with open(tmp_path / f"{name}.bin", "wb") as file:
            file.truncate(2 * each)
        np.save(tmp_path / f"{name}.offsets.npy", np.arange(0, each + 1, per_document, dtype="<i8"))
    start = 5 * each + 3 * per_document - 700
    with open(tmp_path / f"{names[5]}.bin", "r+b") as file:
        file.seek(2 * (start - 5 * each))
        file.write(np.arange(2049, dtype="<u2").tobytes())
    shards = tuple(Shard(name, "web", each, each // per_document, "", "") for name in names)
    manifest = Manifest("uint16", 50_000, 0, "", {"train": shards, "validation": ()}, {})
    split = TokenSplit(tmp_path, manifest, "train")
    assert split.tokens == 10**12
    tokens, rows, columns = split.read(np.array([start, 10**12 - 2049, 3 * each - 7]), 2049)
    assert np.array_equal(tokens[0], np.arange(2049))
    assert (rows.tolist(), columns.tolist()) == ([0, 2], [700, 7])
    order = RowOrder(CutRows(split, 2048).count, seed=0)
    positions = 10**8 + np.arange(64)
    batch = CutRows(split, 2048).read(order.rows_at(positions))
    assert batch.tokens.shape == (64, 2049)
    assert len(np.unique(order.rows_at(positions))) == 64


def test_another_tokenizer_is_found(copy):
    Tokenizer.train(["some other text"], 260).save(copy / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer"):
        verify(copy)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": "other", "version": 1, "splits": {}}'])
def test_unreadable_manifest(copy, content):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(copy)


def test_large_vocabulary_takes_four_bytes():
    from mamba3_train.data.token_shards import token_dtype

    assert token_dtype(65_536) == np.dtype("<u2")
    assert token_dtype(65_537) == np.dtype("<u4")
