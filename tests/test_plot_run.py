"""tools/plot_run.py on two made runs: what is drawn, with rows and keys missing."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from matplotlib.axes import Axes

TOOL = Path(__file__).parent.parent / "tools" / "plot_run.py"


@pytest.fixture
def runs(tmp_path):
    """Two folders: a run with validations, and one that began late, without norms, cut off in a line."""
    whole = [
        {"step": step, "tokens": 8 * step, "train/loss": 5 - step / 10, "train/grad_norm": 1.0, "lr": 1e-3,
         "tokens_per_second": 100.0} for step in range(1, 11)
    ]  # fmt: skip
    whole += [{"step": 10, "tokens": 80, "val/loss": 4.5}]
    cut = [
        {"step": step, "tokens": 8 * step, "train/loss": float("nan") if step == 7 else 4.0} for step in (5, 6, 7, 9)
    ]
    for name, rows in (("a", whole), ("b", cut)):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text + '{"step": 11, "tra')
    return [str(tmp_path / name) for name in ("a", "b")]


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run the tool; returns exit code, what it printed, and the lines it drew: colour or marker, x, y."""
    drawn = []
    original = Axes.plot

    def plot(axis, x, y, *style, **kwargs):
        drawn.append((style[0] if style else kwargs.get("alpha", "line"), list(x), list(y)))
        return original(axis, x, y, *style, **kwargs)

    monkeypatch.setattr(Axes, "plot", plot)

    def call(*arguments):
        drawn.clear()
        monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        else:
            code = 0
        return code, "".join(capsys.readouterr()), drawn

    return call


def test_what_is_drawn(runs, tool, tmp_path):
    output = tmp_path / "both.png"
    code, out, drawn = tool(*runs, "--output", str(output))
    assert (code, out) == (0, f"{output}\n")
    assert output.read_bytes().startswith(b"\x89PNG")
    steps = list(range(1, 11))
    assert [points for style, *points in drawn[:5]] == [
        [steps, [5 - step / 10 for step in steps]], [steps, [1.0] * 10], [steps, [1e-3] * 10], [steps, [100.0] * 10],
        [[10], [4.5]],
    ]  # fmt: skip
    assert drawn[4][0] == "o"
    assert drawn[5][1:] == ([5, 6, 9], [4.0] * 3), "a loss that is not a number is left out"
    assert [points for _, *points in drawn[6:]] == [[[], []]] * 4


def test_smoothing_tokens_and_skipping(runs, tool):
    code, out, drawn = tool(runs[0], "--smooth", "0.5", "--x", "tokens", "--skip", "8")
    assert (code, out) == (0, f"{runs[0]}/curves.png\n")
    raw, smooth = drawn[:2]
    assert (raw[1], raw[2]) == ([72, 80], [4.1, 4.0])
    # (0.5² · 4.1 + 0.5 · 4.0) / (0.5² + 0.5)
    assert smooth[2] == pytest.approx([4.1, (0.25 * 4.1 + 0.5 * 4.0) / 0.75])


def test_mistakes_get_one_line(runs, tool, tmp_path):
    code, _, _ = tool(str(tmp_path / "none"))
    assert code.startswith(f"error: {tmp_path}/none is no run: ")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    assert tool(str(tmp_path / "empty"))[0] == f"error: {tmp_path}/empty/metrics.jsonl has no rows yet"
    code, out, _ = tool(runs[0], "--smooth", "1")
    assert code == 2
    assert "1 must be at least 0 and less than 1" in out
    code, out, _ = tool("--help")
    assert code == 0
    assert "--smooth" in out
