"""Every strategy trains as one process does and goes on from another's checkpoint: losses, norms, tensors, dtypes."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from strategy_runs import STARTED, STEPS, STRATEGIES

from mamba3_train.checkpoint import sharded
from mamba3_train.errors import UserError
from mamba3_train.training import fully_sharded, strategies
from mamba3_train.training.fully_sharded import FullySharded

WORKER = Path(__file__).with_name("strategy_runs.py")
PAIRS = [f"{a}-then-{b}" for a, b in itertools.pairwise(("single", *STRATEGIES))]

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, quickstart_corpus):
    """Folder of all runs: PRECISION/STRATEGY, and PRECISION/BEFORE-then-AFTER changed half-way."""
    folder = tmp_path_factory.mktemp("strategies")
    command = [sys.executable, str(WORKER), str(folder), "--corpus", str(quickstart_corpus)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def losses_and_norms(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [[row[key] for row in rows] for key in ("train/loss", "train/grad_norm")]


def tensors(folder):
    """All training tensors of the last checkpoint, whole."""
    checkpoint = folder / "checkpoints" / f"step-{STEPS:08d}"
    names = set()
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            names |= set(content.keys())
    found = {name: SHAPED[name].clone() for name in names if not name.startswith("random.")}
    sharded.load(checkpoint, found)
    return found


SHAPED: dict[str, torch.Tensor] = {}


@pytest.fixture(scope="module")
def single(runs):
    """Tensors that one process arrives at; it writes them whole, so they tell every tensor's shape."""
    (file,) = (runs / "32-true" / "single" / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")
    with safe_open(file, "pt") as content:
        SHAPED.update({name: content.get_tensor(name) for name in content.keys()})  # noqa: SIM118
    return {name: tensor for name, tensor in SHAPED.items() if not name.startswith("random.")}


@pytest.mark.parametrize("run", ["accumulation", *STRATEGIES, *PAIRS])
def test_float32_losses_norms_and_tensors(run, runs, single):
    losses, norms = losses_and_norms(runs / "32-true" / run)
    expected_losses, expected_norms = losses_and_norms(runs / "32-true" / "single")
    assert losses[0] == pytest.approx(expected_losses[0], rel=1e-5)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    # The norm sums 150,000 squares in float32: its own rounding was seen to move it by 4e-5.
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    found = tensors(runs / "32-true" / run)
    assert found.keys() == single.keys()
    for name, tensor in found.items():
        scale = single[name].abs().max()
        # AdamW divides by the gradient's size: rounding of the smallest gradients grows in 20 steps.
        assert (tensor - single[name]).abs().max() <= 2e-3 * scale, name


@pytest.mark.parametrize("run", ["accumulation", *STRATEGIES])
def test_bfloat16_losses_and_norms(run, runs):
    """The same matrices are rounded wherever the cast happens, so the first step agrees to float32's rounding; then
    other orders of sums round to other bfloat16 numbers (seen: losses 1e-4, norms 8e-3 after 20 steps)."""
    losses, norms = losses_and_norms(runs / "bf16-mixed" / run)
    expected_losses, expected_norms = losses_and_norms(runs / "bf16-mixed" / "single")
    assert losses[0] == pytest.approx(expected_losses[0], rel=1e-5)
    assert norms[0] == pytest.approx(expected_norms[0], rel=5e-4)
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert norms == pytest.approx(expected_norms, rel=5e-2)


MATRICES = [
    "layers.mixer.in_proj",
    "layers.mixer.out_proj",
    "layers.mixer.qkv_proj",
    "layers.mlp.fc1",
    "layers.mlp.fc2",
]
DYNAMICS = ["dt_bias", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"]
NORMS = ["norm", "layers.norm", "layers.mlp_norm", "layers.mixer.B_norm", "layers.mixer.C_norm"]
# Of the matrices: gathered in, gradients summed in. Everything else is float32 throughout.
TRAVEL = {
    "32-true": dict.fromkeys(["single", "ddp"], "None / float32")
    | dict.fromkeys(["fsdp", "hsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"], "float32 / float32"),
    "bf16-mixed": dict.fromkeys(["single", "ddp"], "None / float32")
    | dict.fromkeys(["fsdp", "hsdp"], "float32 / float32")
    | dict.fromkeys(["deepspeed_zero1", "deepspeed_zero2"], "float32 / bfloat16")
    | {"deepspeed_zero3": "bfloat16 / bfloat16"},
}


@pytest.mark.parametrize("precision", TRAVEL)
@pytest.mark.parametrize("strategy", ["single", *STRATEGIES])
def test_dtypes_and_decay(strategy, precision, runs):
    """Storage / travel / sum of gradients / optimizer state / decay of every parameter."""
    rest = TRAVEL["32-true"][strategy]
    golden = {f"{name}.weight": f"float32 / {TRAVEL[precision][strategy]} / float32 / 0.1" for name in MATRICES}
    golden["embedding.weight"] = f"float32 / {rest} / float32 / 0.1"
    golden |= {f"layers.mixer.{name}": f"float32 / {rest} / float32 / 0.0" for name in DYNAMICS}
    golden |= {f"{name}.weight": f"float32 / {rest} / float32 / 0.0" for name in NORMS}
    assert json.loads((runs / precision / strategy / "audit.json").read_text()) == golden


@pytest.mark.parametrize("strategy", STARTED)
def test_trained_weights_are_the_same_start_under_every_strategy(strategy, runs):
    """One step from what one process arrived at, read by every rank for itself."""
    (before, *_), _ = losses_and_norms(runs / "32-true" / "single")
    rows = {s: json.loads((runs / "started" / s / "metrics.jsonl").read_text().split("\n")[0]) for s in STARTED}
    assert rows[strategy]["step"] == 1
    assert rows[strategy]["train/loss"] < before - 0.1, "it begins where training has been"
    assert rows[strategy]["train/loss"] == pytest.approx(rows["single"]["train/loss"], rel=1e-5)
    assert rows[strategy]["train/grad_norm"] == pytest.approx(rows["single"]["train/grad_norm"], rel=1e-4)


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_offloaded_shards_stay_in_host_memory(cpu_offload, monkeypatch):
    strategy = FullySharded("gloo", 2, 1, reshard_after_forward=True, cpu_offload=cpu_offload)
    monkeypatch.setattr(FullySharded, "root_device", torch.device("meta"))
    strategy.model = torch.nn.Linear(2, 2)
    strategy.model_to_device()
    assert next(strategy.model.parameters()).device.type == ("cpu" if cpu_offload else "meta")


@pytest.mark.parametrize(("layers_together", "units"), [(1, [1, 1, 1]), (2, [2, 1]), (4, [3])])
def test_layers_are_gathered_together(layers_together, units, monkeypatch):
    made = []
    monkeypatch.setattr(fully_sharded, "init_device_mesh", lambda *_, **__: {"shard": None})
    monkeypatch.setattr(fully_sharded, "fully_shard", lambda module, **_: made.append(module))
    monkeypatch.setattr(FullySharded, "root_device", torch.device("cpu"))
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    strategy = FullySharded("gloo", 2, 1, reshard_after_forward=True, layers_together=layers_together)
    strategy.shard(model)
    assert [len(unit) for unit in made[:-1]] == units
    assert [layer for unit in made[:-1] for layer in unit] == [*model.layers]
    assert made[-1] is model


def test_a_model_comes_back_to_where_it_computes():
    model = torch.nn.Linear(2, 2)
    strategy = strategies.single(accelerator="cpu", devices=1, num_nodes=1)
    strategy._root_device = torch.device("meta")
    strategies.bring_back(strategy, model)
    assert model.weight.device.type == "meta"


def test_one_device_needs_no_strategy():
    settings = {"accelerator": "cpu", "devices": 1, "num_nodes": 1}
    made = [
        strategies.single(**settings),
        strategies.ddp(**settings),
        strategies.fsdp(**settings, replicas=1, reshard_after_forward=True),
        strategies.deepspeed_zero(**settings, stage=3, gradient_clip_norm=1.0),
    ]
    assert len({type(strategy) for strategy in made}) == 1


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda s: strategies.single(**s), "trainer.devices=2"),
        (lambda s: strategies.fsdp(**s, replicas=3, reshard_after_forward=True), "strategy.replicas=3"),
        (lambda s: strategies.fsdp(**s, replicas=1, reshard_after_forward=True, layers_together=0), "at least 1"),
        (lambda s: strategies.deepspeed_zero(**s, stage=4, gradient_clip_norm=1.0), "strategy.stage=4"),
        (
            lambda s: strategies.deepspeed_zero(**s, stage=3, gradient_clip_norm=1.0, compile="always"),
            "trainer.compile",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, complaint):
    with pytest.raises(UserError, match=complaint):
        make({"accelerator": "cpu", "devices": 2, "num_nodes": 1})


def test_a_missing_deepspeed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'mamba3-train\[deepspeed\]'"):
        strategies.deepspeed_zero(accelerator="cpu", devices=2, num_nodes=1, stage=1, gradient_clip_norm=1.0)
