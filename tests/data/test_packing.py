"""Rows: every token in place, document numbers and ignored targets exactly at the boundaries."""

import numpy as np
import pytest

from mamba3_train.data.packing import IGNORED_LABEL, CutRows, Rows, pack, unpack
from mamba3_train.data.token_shards import TokenSplit, read_manifest


def documents_of(folder, split):
    """All tokens of a split and the number of the document each belongs to, read without the code under test."""
    manifest = read_manifest(folder)
    tokens, owners, count = [], [], 0
    for shard in manifest.splits[split]:
        tokens.append(np.fromfile(folder / f"{shard.name}.bin", dtype=manifest.dtype))
        lengths = np.diff(np.load(folder / f"{shard.name}.offsets.npy"))
        owners.append(np.repeat(np.arange(count, count + len(lengths)), lengths))
        count += len(lengths)
    return np.concatenate(tokens).astype(np.int64), np.concatenate(owners)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 11_000])
def test_rows_are_the_concatenated_documents(corpus, length):
    """Against a definition that knows nothing of shards; the longest row spans a shard and more."""
    data = CutRows(TokenSplit(corpus, read_manifest(corpus), "train"), length)
    tokens, owners = documents_of(corpus, "train")
    assert data.count == (len(tokens) - 1) // length
    batch = unpack(pack(data.read(np.arange(data.count))))
    here = np.arange(data.count)[:, None] * length + np.arange(length)
    same = owners[here] == owners[here + 1]
    assert np.array_equal(batch["input_ids"], tokens[here])
    assert np.array_equal(batch["document_ids"], owners[here] - owners[here[:, :1]])
    assert np.array_equal(batch["labels"], np.where(same, tokens[here + 1], IGNORED_LABEL))
    assert (~same).sum() > 100


def test_quoted_end_of_document_does_not_end_a_document(corpus):
    manifest = read_manifest(corpus)
    for split in manifest.splits:
        tokens, owners = documents_of(corpus, split)
        ends = np.flatnonzero(np.append(np.diff(owners), 1))
        assert np.array_equal(np.flatnonzero(tokens == manifest.end_of_document_id), ends)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_large_ids_survive_the_signed_way(dtype):
    tokens = np.array([[0, 1, 32_767, 32_768, 65_535]], dtype=dtype)
    rows = Rows(tokens, np.array([0, 0]), np.array([2, 4]), filled=np.array([3]))
    batch = {key: value.tolist() for key, value in unpack(pack(rows)).items()}
    assert batch["input_ids"] == [[0, 1, 32_767, 32_768]]
    assert batch["labels"] == [[1, IGNORED_LABEL, 32_768, IGNORED_LABEL]]
    assert batch["document_ids"] == [[0, 0, 1, 1]]
