"""The comparison: variants that are what they say, and the command from training to table and picture."""

import json
import os
import subprocess
import sys

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mamba3_train.config import compose
from mamba3_train.evaluation import comparison
from mamba3_train.model.cost import model_cost

STATE_TRACKING = ("mod_arithmetic", "mod_arithmetic_brackets")


def variants(recipe):
    """Name → model config."""
    plain = compose(f"+recipe={recipe}")
    return {
        name: instantiate(compose(f"+recipe={recipe}", *changes).model)
        for name, changes in plain.comparison.variants.items()
    }


def test_state_tracking_compares_the_papers_variants():
    mixers = {name: config.mixer for name, config in variants("parity").items()}
    switches = {name: (m.rotation, m.trapezoid, m.B_bias, m.C_bias) for name, m in mixers.items()}
    assert switches == {
        "mamba3": ("data_dependent", True, True, True),
        "without_rotation": ("none", True, True, True),
        "data_independent_rotation": ("data_independent", True, True, True),
        "like_mamba2": ("none", False, False, False),
    }
    plain = compose("+recipe=parity").comparison
    assert all(compose(f"+recipe={recipe}").comparison == plain for recipe in STATE_TRACKING)


@pytest.mark.parametrize(
    ("recipe", "layers_and_ranks"),
    [
        ("compare_small", {("*", 1), ("M", 1), ("M", 4)}),
        ("compare_state_size", {("M", 1), ("M", 4)}),
    ],
)
def test_language_models_are_of_equal_size(recipe, layers_and_ranks):
    configs = variants(recipe)
    assert {(config.layers[0], config.mixer.rank) for config in configs.values()} == layers_and_ranks
    sizes = [model_cost(config, 512).total_parameters for config in configs.values()]
    assert len(sizes) == 4
    assert max(sizes) / min(sizes) < 1.0005
    assert list(compose(f"+recipe={recipe}").comparison.seeds) == [0, 1, 2]


def test_mean_and_deviation_over_seeds():
    runs = [
        {"variant": name, "seed": seed, "parameters": 5, "tokens": 7, "score": score}
        for name, scores in (("a", (1.0, 2.0, 3.0)), ("b", (4.0, 4.0, 4.0)))
        for seed, score in enumerate(scores)
    ]
    drawn = comparison.table({"score": "val/loss", "runs": runs})
    assert list(drawn.columns[3].cells) == ["2.0000 ± 1.0000", "4.0000 ± 0.0000"]
    by_length = [run | {"score": {"8": run["score"] / 4, "16": 0.5}} for run in runs]
    drawn = comparison.table({"score": "scaled_accuracy", "runs": by_length})
    assert list(drawn.columns[3].cells) == ["50.0 ± 25.0 %", "100.0 ± 0.0 %"]
    assert [column.header for column in drawn.columns[3:]] == ["length 8", "length 16"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of one variant of parity, six steps; returns folder and output."""
    folder = tmp_path_factory.mktemp("compared") / "parity"
    command = [
        sys.executable, "-m", "mamba3_train.compare", "+recipe=parity", f"run.dir={folder}", "trainer.max_steps=6",
        "trainer.accelerator=cpu", "data.curriculum_steps=3", "trainer.log_every_n_steps=2", "data.num_workers=0",
        "data.sequence_length=64", "data.longest=[4,64]", "data.global_batch_size=16", "data.micro_batch_size=16",
        "report.accuracy_lengths=[8,48]", "report.accuracy_documents=40", "~comparison.variants.without_rotation",
        "~comparison.variants.data_independent_rotation", "~comparison.variants.mamba3",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_the_command_ends_with_table_and_picture(compared):
    folder, out = compared
    results = json.loads((folder / "comparison.json").read_text())
    assert [(run["variant"], run["seed"]) for run in results["runs"]] == [("like_mamba2", 0)]
    assert results["score"] == "scaled_accuracy"
    for run in results["runs"]:
        assert set(run["score"]) == {"8", "48"}
        for value in run["score"].values():
            right = 40 * (value + 1) / 2
            assert right == pytest.approx(round(right))
            assert 0 <= right <= 40
        assert run["tokens"] == 6 * 16 * 64
        summary = json.loads((folder / f"{run['variant']}-seed0" / "summary.json").read_text())
        assert summary["scaled_accuracy"] == run["score"]
        assert summary["val/loss"] > 0
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert OmegaConf.load(folder / "like_mamba2-seed0" / "config.yaml").model.mixer.rotation == "none"
    assert (folder / "like_mamba2-seed0" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "length 48" in out
    assert "like_mamba2" in out


def test_a_mistake_in_a_variant_stops_before_training(tmp_path):
    command = [sys.executable, "-m", "mamba3_train.compare", "+recipe=parity", f"run.dir={tmp_path}/run"]
    command.append("comparison.variants.like_mamba2=[model.mixer.rotatoin=none]")
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "rotatoin" in result.stderr
    assert not (tmp_path / "run").exists()
