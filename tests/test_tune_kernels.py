"""tools/tune_kernels.py: what is taken as fastest, and the table it writes is the one that launches read."""

import json
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mamba3_train.kernels import launch, launch_table

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "tune_kernels.py"))


def test_the_present_configuration_stays_unless_another_gains_a_hundredth():
    choose_fastest = TOOL["choose_fastest"]
    present, other = (4, None), (4, 168)
    assert choose_fastest({present: 1.0, other: 0.995}, present) == present
    assert choose_fastest({present: 1.0, other: 0.98}, present) == other
    assert choose_fastest({other: 5.0}, present) == other  # the present one was left out: it does not run here


def test_launches_read_what_is_written(tmp_path, monkeypatch):
    table = json.loads(launch_table.TABLE.read_text())
    TOOL["write"](table, "half", 64 * 100, {"outputs": (8, 128), "states": (4, None), "keys": (8, None)})
    monkeypatch.setattr(launch_table, "TABLE", tmp_path / "table.json")
    launch_table.TABLE.write_text(json.dumps(table))
    launch_table.find.cache_clear()
    try:
        chosen = launch.choose(1, 64, 128, torch.float16)
        others = launch.choose(1, 128, 256, torch.float16)
    finally:
        launch_table.find.cache_clear()
    assert (chosen.outputs, chosen.states, chosen.keys, chosen.queries) == ((8, 128), (4, None), (8, None), (4, None))
    assert others.outputs == (4, None)
