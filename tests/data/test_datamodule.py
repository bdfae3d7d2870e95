"""The data module: the same global batches for every number of ranks and workers, stopped and resumed or not."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from hydra.utils import instantiate

from mamba3_train.config import compose
from mamba3_train.data import Preparation, TokenDataModule
from mamba3_train.data.batches import TrainingBatches
from mamba3_train.data.packing import IGNORED_LABEL, pack, unpack
from mamba3_train.data.token_shards import read_manifest
from mamba3_train.errors import UserError


def module(corpus, rank=0, world_size=1, samples_consumed=0, total_steps=6, **settings) -> TokenDataModule:
    defaults = {"sequence_length": 32, "global_batch_size": 16, "micro_batch_size": 2, "seed": 5, "num_workers": 0}
    data = TokenDataModule(path=str(corpus), **(defaults | settings))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    data.samples_consumed, data.total_steps = samples_consumed, total_steps
    data.prepare_data()
    data.setup()
    return data


def global_batches(corpus, world_size, **settings) -> list[str]:
    """Hash of each global batch, as the model gets it: the parts of all ranks, in order."""
    parts = [
        [unpack(part) for part in module(corpus, rank, world_size, **settings).train_dataloader()]
        for rank in range(world_size)
    ]
    return [
        hashlib.sha256(
            b"".join(part[key].numpy().tobytes() for key in ("input_ids", "labels", "document_ids") for part in step)
        ).hexdigest()
        for step in zip(*parts, strict=True)
    ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize(("num_workers", "micro_batch_size"), [(0, 1), (0, 2), (2, 1), (4, 2)])
def test_global_batches_are_the_same_for_all_ranks_and_workers(corpus, world_size, num_workers, micro_batch_size):
    expected = global_batches(corpus, 1)
    assert len(set(expected)) == 6
    settings = {"num_workers": num_workers, "micro_batch_size": micro_batch_size}
    assert global_batches(corpus, world_size, **settings) == expected
    elsewhere = {1: 8, 2: 4, 4: 1, 8: 2}[world_size]
    assert global_batches(corpus, elsewhere, samples_consumed=2 * 16, total_steps=4) == expected[2:4]


@pytest.mark.parametrize("steps", [(1, 2), (4, 7), (5, 6)])
def test_stopped_and_resumed_twice_on_other_ranks(corpus, steps):
    expected = global_batches(corpus, 1, total_steps=9)
    begin, end = steps
    first = global_batches(corpus, 8, total_steps=9)[:begin]
    second = global_batches(corpus, 2, total_steps=9, samples_consumed=begin * 16, num_workers=1)[: end - begin]
    third = global_batches(corpus, 4, total_steps=9, samples_consumed=end * 16)
    assert first + second + third == expected


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_shards_shuffled_a_few_at_a_time(corpus, tmp_path, packing):
    corpus, settings = shutil.copytree(corpus, tmp_path / "copy"), {"shuffle_shards": 2, "packing": packing}
    expected = global_batches(corpus, 1, total_steps=9, **settings)
    assert global_batches(corpus, 8, total_steps=9, **settings) == expected
    assert global_batches(corpus, 2, total_steps=9, samples_consumed=4 * 16, **settings) == expected[4:]
    assert set(expected).isdisjoint(global_batches(corpus, 1, total_steps=9, packing=packing))


def test_length_counts_the_whole_run(corpus):
    loader = module(corpus, samples_consumed=32, total_steps=6).train_dataloader()
    assert len(loader) == 6
    assert len(list(loader)) == 4


def test_a_second_pass_does_not_repeat_data_unnoticed(corpus):
    loader = module(corpus).train_dataloader()
    assert len(list(loader)) == 6
    with pytest.raises(RuntimeError, match="total_steps"):
        list(loader)


def test_other_seed_other_order(corpus):
    assert set(global_batches(corpus, 1)).isdisjoint(global_batches(corpus, 1, seed=6))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_targets_do_not_depend_on_ranks(corpus, world_size):
    loaders = [module(corpus, rank, world_size, validation_sequences=13).val_dataloader() for rank in range(world_size)]
    assert len({len(loader) for loader in loaders}) == 1
    rows = [row for parts in zip(*loaders, strict=True) for part in parts for row in unpack(part)["labels"]]
    real = [row.tolist() for row in rows if (row != IGNORED_LABEL).any()]
    assert real == unpack(pack(module(corpus).validation.read(np.arange(13))))["labels"].tolist()


def test_tokens_per_step_and_vocabulary(corpus):
    data = module(corpus)
    assert data.tokens_per_step == 16 * 32
    assert data.vocab_size == data.tokenizer.vocab_size == 300
    assert data.tokenizer.end_of_document_id == data.manifest.end_of_document_id


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"global_batch_size": 10, "micro_batch_size": 4},
            ["data.global_batch_size=10", "data.micro_batch_size=4", "set"],
        ),
        ({"global_batch_size": 2, "micro_batch_size": 1, "world_size": 4}, ["data.global_batch_size=4"]),
        ({"sequence_length": 10**6}, ["fewer than one row", "data.sequence_length=1000000"]),
        ({"vocab_size": 999}, ["data.vocab_size=999", "data.vocab_size=300"]),
        ({"micro_batch_size": 0}, ["data.micro_batch_size=0"]),
        ({"shuffle_shards": 0}, ["data.shuffle_shards=0"]),
        ({"segment_length": 12}, ["data.segment_length=12", "data.sequence_length=32", "divisor"]),
    ],
)
def test_wrong_sizes_are_explained(corpus, settings, words):
    with pytest.raises(UserError) as error:
        module(corpus, **settings)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_replaced_sampler_is_noticed(corpus):
    """Lightning would otherwise put its own distributed sampler in place of ours without a word."""
    with pytest.raises(TypeError, match="use_distributed_sampler"):
        module(corpus).training[3]


def test_missing_corpus_names_the_command(tmp_path):
    preparation = Preparation(source={"path": "owner/corpus", "name": "small"}, tokenizer={"name": "owner/tokens"})
    with pytest.raises(UserError) as error:
        module(tmp_path / "none", prepare=preparation)
    assert (
        f"python -m mamba3_train.prepare output={tmp_path / 'none'} "
        "source.path=owner/corpus source.name=small tokenizer.name=owner/tokens"
    ) in str(error.value)


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory, make_documents):
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "upper.txt").write_text("A STATE AND ITS ANGLE. " * 2000)
    make_documents(folder / "lower.jsonl", 200)
    sources = {"upper": {"path": str(folder / "upper.txt")}, "lower": {"path": str(folder / "lower.jsonl")}}
    Preparation(
        sources=sources, tokenizer={"train": {"vocab_size": 300}}, validation_fraction=0, shard_tokens=5000, workers=1
    ).run(folder / "shards")
    return folder / "shards"


def test_mixture_changes_at_a_token_count(two_sources):
    """Three quarters upper case until token 1,536 (row 48), then lower case only; no rank or stop changes that."""
    mixture = [{"weights": {"upper": 3, "lower": 1}}, {"from_tokens": 1536, "weights": {"lower": 1}}]
    data = module(two_sources, mixture=mixture)
    texts = [data.tokenizer.decode(row) for b in data.train_dataloader() for row in unpack(b)["input_ids"]]
    upper = [text == text.upper() for text in texts]
    assert [sum(upper[i : i + 16]) for i in range(0, 96, 16)] == [12, 12, 12, 0, 0, 0]
    expected = global_batches(two_sources, 1, mixture=mixture)
    assert global_batches(two_sources, 4, mixture=mixture) == expected
    assert global_batches(two_sources, 2, mixture=mixture, samples_consumed=32) == expected[2:]
    counts = {name: rows.count for name, rows in data.training.sources.items()}
    assert data.epochs(96) == {"upper": 36 / counts["upper"], "lower": 60 / counts["lower"]}
    assert data.epochs(96)["lower"] > 0


def test_a_source_without_a_whole_row_may_be_there_unused(tmp_path, make_documents):
    make_documents(tmp_path / "long.jsonl", 100)
    (tmp_path / "short.jsonl").write_text('{"text": "x"}\n')
    sources = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("long", "short")}
    Preparation(sources=sources, tokenizer={"train": {"vocab_size": 300}}, validation_fraction=0, workers=1).run(
        tmp_path / "shards"
    )
    data = module(tmp_path / "shards", mixture={"long": 1})
    assert data.epochs(16)["short"] == 0
    assert data.epochs(16)["long"] > 0


def test_another_source_leaves_the_order_of_the_first_as_it_was():
    rows, mixture = SimpleNamespace(count=50), object()
    alone = TrainingBatches({"b": rows}, mixture, seed=3)
    joined = TrainingBatches({"a": rows, "b": rows}, mixture, seed=3)
    order = {
        (batches, name): batches._orders[name].rows_at(np.arange(50)).tolist()
        for batches in (alone, joined)
        for name in batches.sources
    }
    assert order[joined, "b"] == order[alone, "b"] != order[joined, "a"]


def test_a_corpus_is_told_by_its_contents(corpus, two_sources, tmp_path):
    def told(folder):
        return module(folder).fingerprint

    assert told(corpus) == told(shutil.copytree(corpus, tmp_path / "copy"))
    assert told(corpus) != told(two_sources)
    other = shutil.copytree(corpus, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizer_fingerprint"] = "another"
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(other).fingerprint != read_manifest(corpus).fingerprint


def test_unknown_source_in_a_mixture(two_sources):
    with pytest.raises(UserError, match=r"source middle; the corpus has: upper, lower"):
        module(two_sources, mixture={"middle": 1})


@pytest.mark.parametrize("name", ["python_stdlib", "fineweb_edu", "shards"])
def test_shipped_configs_build(name):
    given = ["data.path=somewhere", "data.vocab_size=300"] if name == "shards" else []
    config = compose("+recipe=quickstart", f"data={name}", *given, "data.mixture={text: 1}", "data.packing=best_fit")
    data = instantiate(config.data)
    assert data.seed == config.run.seed
    assert data.tokens_per_step == data.global_batch_size * data.sequence_length
    assert (data.prepare is not None and data.prepare.automatic) == (name == "python_stdlib")
