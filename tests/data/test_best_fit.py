"""Best-fit packing: every document once, whole where it fits a row, and no target lost or taken across documents."""

import json
import shutil
import time
from multiprocessing import get_context

import numpy as np
import pytest

from mamba3_train.data import TokenDataModule
from mamba3_train.data.best_fit import BestFitRows, plan_shard, write_plans
from mamba3_train.data.folder_lock import locked
from mamba3_train.data.packing import IGNORED_LABEL, pack, unpack
from mamba3_train.data.token_shards import TokenSplit, read_manifest
from mamba3_train.errors import UserError


@pytest.mark.parametrize("length", [1, 8, 100])
def test_plan_covers_every_token_once(length):
    sizes = np.random.default_rng(0).geometric(0.02, 2000)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    pieces, firsts = plan_shard(offsets, length)
    covered = np.sort(np.concatenate([np.arange(begin, begin + size) for begin, size in pieces]))
    assert np.array_equal(covered, np.arange(offsets[-1]))
    in_row = np.add.reduceat(pieces[:, 1], firsts[:-1])
    assert in_row.max() <= length
    # A document is in no more pieces than its length forces.
    owners = np.searchsorted(offsets, pieces[:, 0], side="right") - 1
    assert np.array_equal(np.bincount(owners), -(-sizes // length))


def test_little_of_a_row_stays_empty():
    sizes = np.random.default_rng(1).geometric(1 / 300, 20_000)
    pieces, firsts = plan_shard(np.concatenate([[0], np.cumsum(sizes)]), 2048)
    assert pieces[:, 1].sum() / ((len(firsts) - 1) * 2048) > 0.995


@pytest.fixture
def packed(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "copy")
    write_plans(folder, read_manifest(folder), 128)
    return folder


def test_batches_hold_every_target_of_every_document(packed):
    manifest = read_manifest(packed)
    split = TokenSplit(packed, manifest, "train")
    rows = BestFitRows(split, 128, padding=manifest.end_of_document_id)
    batch = {key: value.numpy() for key, value in unpack(pack(rows.read(np.arange(rows.count)))).items()}
    assert (np.diff(batch["document_ids"], axis=1) >= 0).all()
    assert (batch["document_ids"][:, 0] == 0).all()
    found = np.stack([batch["input_ids"], batch["labels"]], axis=-1)[batch["labels"] != IGNORED_LABEL]
    expected = []
    for number in range(len(split.shards)):
        tokens, offsets, _ = split.shard(number)
        pairs = np.stack([tokens[:-1], tokens[1:]], axis=-1).astype(np.int64)
        expected.append(np.delete(pairs, offsets[1:-1] - 1, axis=0))
    expected = np.concatenate(expected)
    assert np.array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


def test_a_document_is_seen_alone(packed):
    """What follows a boundary is the whole text of a document or of its rest, up to its end."""
    manifest = read_manifest(packed)
    split = TokenSplit(packed, manifest, "train")
    rows = BestFitRows(split, 128, padding=manifest.end_of_document_id)
    stored = b"".join(split.shard(number)[0].astype("<i8").tobytes() for number in range(len(split.shards)))
    batch = unpack(pack(rows.read(np.arange(rows.count))))
    several = 0
    for inputs, documents in zip(batch["input_ids"].numpy(), batch["document_ids"].numpy(), strict=True):
        pieces = np.split(inputs, np.flatnonzero(np.diff(documents)) + 1)
        several += len(pieces) > 2
        for piece in pieces[:-1]:
            assert piece[-1] == manifest.end_of_document_id
            assert piece.tobytes() in stored
    assert several > 50


def test_the_data_module_plans_once_and_shuffles(packed):
    def first_batch():
        data = TokenDataModule(
            path=str(packed),
            sequence_length=64,
            global_batch_size=8,
            micro_batch_size=8,
            num_workers=0,
            packing="best_fit",
        )
        data.prepare_data()
        data.setup()
        data.total_steps = 1
        return next(iter(data.train_dataloader()))["tokens"], len(list(data.val_dataloader()))

    inputs, validation = first_batch()
    plans = {path: path.stat().st_mtime_ns for path in (packed / "best_fit-64").iterdir()}
    again, _ = first_batch()
    assert np.array_equal(inputs, again)
    assert validation > 1
    assert plans == {path: path.stat().st_mtime_ns for path in plans}


def test_runs_that_begin_together_plan_once(packed):
    """The second one waits, finds the first one's plans, and writes none of them again."""
    index = packed / "best_fit-128" / "plans.json"
    (packed / "best_fit-128").rename(packed / "planned")
    planned = json.loads((packed / "planned" / "plans.json").read_text())
    (packed / "best_fit-128").mkdir()
    forked = get_context("fork")
    with locked(index.parent, "plans"):
        second = forked.Process(target=write_plans, args=(packed, read_manifest(packed), 128))
        second.start()
        time.sleep(0.5)
        assert not any(index.parent.glob("*.npy"))
        for file in (packed / "planned").glob("*.npy"):
            file.rename(index.parent / file.name)
        index.write_text(json.dumps(planned))
        times = {path: path.stat().st_mtime_ns for path in index.parent.glob("*.npy")}
    second.join(timeout=60)
    assert second.exitcode == 0
    assert times
    assert {path: path.stat().st_mtime_ns for path in index.parent.glob("*.npy")} == times


def test_unknown_packing():
    with pytest.raises(UserError, match=r"data\.packing=tight must be one of cut, best_fit"):
        TokenDataModule(path="", sequence_length=8, global_batch_size=1, micro_batch_size=1, packing="tight")
