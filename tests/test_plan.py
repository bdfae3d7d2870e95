"""The plan: its command, and its memory against what was measured."""

import sys

import pytest
from hydra.utils import instantiate

from mamba3_train import plan
from mamba3_train.config import compose
from mamba3_train.model.cost import model_cost
from mamba3_train.model.memory import SHARDED, step_memory


@pytest.fixture
def run(monkeypatch, capfd):
    """Call the command; returns exit code, output and errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mamba3_train.plan", *arguments])
        try:
            plan.main()
        except SystemExit as stop:
            return stop.code, *capfd.readouterr()
        return 0, *capfd.readouterr()

    return call


# Peak memory of benchmark_step on one H200, compiled layers, head and loss in one (docs/results, docs/performance.md).
@pytest.mark.parametrize(("recipe", "rows", "measured"), [("1.5b_siso", 8, 55.9), ("440m_siso", 16, 42.1)])
def test_memory_is_within_a_tenth_of_what_was_measured(recipe, rows, measured):
    config = compose(f"+recipe={recipe}", "data.path=x", "data.vocab_size=128256")
    model = instantiate(config.model)
    memory = step_memory(model, model_cost(model, 2048), tokens=rows * 2048, strategy="single", shards=1)
    assert memory.peak / 2**30 == pytest.approx(measured, rel=0.1)


def test_what_is_in_shards_is_divided():
    config = compose("+recipe=1.5b_siso", "data.path=x", "data.vocab_size=128256")
    model = instantiate(config.model)
    cost = model_cost(model, 2048)

    def memory(strategy, shards, **kwargs):
        return step_memory(model, cost, tokens=2048, strategy=strategy, shards=shards, **kwargs)

    whole = memory("ddp", 8)
    assert whole.parameters == whole.gradients == 4 * cost.total_parameters
    assert whole.moments == 8 * cost.total_parameters
    for strategy in SHARDED:
        assert memory(strategy, 1).moments == whole.moments
    assert memory("deepspeed_zero1", 8).moments == memory("fsdp", 8).moments == whole.moments / 8
    assert memory("fsdp", 64).peak < memory("fsdp", 8).peak < whole.peak
    accumulated = memory("ddp", 8, micro_batches=2)
    assert accumulated.peak == whole.peak + whole.gradients
    saved = [memory("ddp", 8, recompute=choice).activations for choice in ("none", "selective", "full")]
    assert saved == sorted(saved, reverse=True)


def test_the_command(run):
    code, out, _ = run("+recipe=1.5b_mimo", "gpus=64")
    assert code == 0
    for expected in ("1,494,723,584", "100.00B tokens", "days", "fsdp", "deepspeed_zero3", "fits"):
        assert expected in out
    # 256 rows over 64 GPUs are 4 each: the recipe's micro-batch of 8 becomes 4.
    command = out.strip().splitlines()[-1]
    assert "torchrun --nnodes=8 --nproc-per-node=8" in command
    assert "+recipe=1.5b_mimo strategy=hsdp trainer.devices=8 data.micro_batch_size=4 trainer.num_nodes=8" in command


def test_the_speed_follows_from_the_mfu(run):
    _, out, _ = run("+recipe=1.5b_siso", "gpus=8", "mfu=0.5")
    config = compose("+recipe=1.5b_siso")
    flops = model_cost(instantiate(config.model), 2048).training_flops_per_token
    assert f"{8 * 989e12 * 0.5 / flops:,.0f}" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["gpu=h300"], "gpu=h300 is not known: choose one of"),
        (["gpus=0"], "gpus=0 must be at least 1"),
        (["gpus=12"], "gpus=12 is not a multiple of gpus_per_node=8"),
        (["gpus=24"], "data.global_batch_size=256 is not a multiple of gpus=24"),
        (["gpuss=8"], "unknown key gpuss. Did you mean gpus"),
    ],
)
def test_mistakes_get_one_line(arguments, complaint, run):
    code, _, errors = run("+recipe=1.5b_siso", *arguments)
    assert code == 2
    assert len(errors.strip().splitlines()) == 1
    assert complaint in errors
