"""Numbers that the documents show are those that were recorded."""

import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def kernels():
    """(rank, batch, seqlen) → recorded row of the scan."""
    rows = json.loads((RESULTS / "benchmark_kernels_h200.json").read_text())["rows"]
    ours = (row for row in rows if row["kernel"].startswith("triton rank "))
    return {(int(row["kernel"].split()[-1]), row["batch"], row["seqlen"]): row for row in ours}


def table(document, pattern):
    """Matches of a table's rows in a document, thousands without commas."""
    found = re.findall(pattern, (ROOT / document).read_text().replace(",", ""), re.MULTILINE)
    assert found, f"no such table in {document}"
    return found


CASE = r"^\| (?:SISO|MIMO R = (\d)) (\d+) × (\d+) "


def test_the_scan_in_the_readme():
    for rank, batch, seqlen, ms, mib in table("README.md", CASE + r"\| ([\d.]+) \| [\d.]+ \| (\d+) \|"):
        row = kernels()[int(rank or 1), int(batch), int(seqlen)]
        assert float(ms) == pytest.approx(row["sum_ms"], abs=0.051)
        assert int(mib) == row["peak_mib"]


def test_the_scan_in_its_own_document():
    cells = r"\| ([\d.]+) \| ([\d.]+) \| \*\*([\d.]+)\*\* \| [\d.]+ \| [\d.]+ \| (\d+) \|"
    for rank, batch, seqlen, forward, backward, both, mib in table("docs/kernels.md", CASE + cells):
        row = kernels()[int(rank or 1), int(batch), int(seqlen)]
        assert float(forward) == pytest.approx(row["forward_ms"], abs=0.0051)
        assert float(backward) == pytest.approx(row["backward_ms"], abs=0.0051)
        assert float(both) == pytest.approx(row["sum_ms"], abs=0.051)
        assert int(mib) == row["peak_mib"]


def scaling():
    return json.loads((RESULTS / "scaling_440m_siso_2xh200.json").read_text())


def test_two_gpus_in_the_readme():
    (shares,) = table("README.md", r"`ddp` at ([\d.]+) % of what both do alone under `fsdp` at ([\d.]+) %")
    for strategy, share in zip(("ddp", "fsdp"), shares, strict=True):
        recorded = scaling()[f"host 3, 2 GPUs, {strategy}"]["share_of_twice_one_gpu"]
        assert float(share) == pytest.approx(100 * recorded, abs=0.051)


def test_two_gpus_in_their_own_document():
    recorded = {round(run["tokens_per_second"]): run for run in scaling().values()}
    rows = table("docs/distributed.md", r"^\| (?:one GPU.*|`.*) \| (\d+) \| (?:([\d.]+) %)? ?\| ([\d.]+) GiB \|$")
    assert {int(row[0]) for row in rows} == set(recorded)
    for tokens, share, gib in rows:
        run = recorded[int(tokens)]
        assert float(share or 0) == pytest.approx(100 * run.get("share_of_twice_one_gpu", 0), abs=0.051)
        assert float(gib) == pytest.approx(run["peak_memory_gib"], abs=0.051)


def test_beside_a_transformer():
    runs = json.loads((RESULTS / "transformer_1.5b_h200.json").read_text())
    transformer, ours = ([r for r in runs if ("layer_pattern" in r["command"]) == is_one] for is_one in (True, False))
    row = r"^\| (Transformer|Mamba-3 SISO|Mamba-3 / Transformer) \| ([\d.]+) \| ([\d.]+) \|$"
    for name, *cells in table("docs/performance.md", row):
        for cell, theirs, run in zip(cells, transformer, ours, strict=True):
            value = theirs if name == "Transformer" else run
            if "/" in name:
                ratio = run["tokens_per_second"] / theirs["tokens_per_second"]
                assert float(cell) == pytest.approx(ratio, abs=0.0051)
            else:
                assert int(cell) == round(value["tokens_per_second"])


def test_steps():
    recorded = {round(r["step_ms"]): r for r in json.loads((RESULTS / "step_1.5b_h200.json").read_text())}
    assert len(recorded) == 29
    parts = r"^\| .* \| (\d+) \| (\d+(?: both)?) \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+|in rest) \| (\d+|←) "
    rows = table("docs/performance.md", parts + r"\| \*\*(\d+)\*\* \| (\d+) \| ([\d.]+) % \| ([\d.]+) \|$")
    shown = table("README.md", r"^\| 1.5B .* \| (\d+) \| (\d+) \| ([\d.]+) % \| ([\d.]+) \|$")
    assert {int(row[7]) for row in rows} == set(recorded)
    assert len(shown) == 2
    ((ms, gib),) = table("README.md", r"otherwise computes again: (\d+) ms and ([\d.]+)\nGiB for MIMO")
    assert "kernels.keep=states" in recorded[int(ms)]["command"]
    assert float(gib) == pytest.approx(recorded[int(ms)]["peak_memory_gib"], abs=0.051)
    for ms, tokens, mfu, gib in [row[7:] for row in rows] + shown:
        row = recorded[int(ms)]
        assert round(row["tokens_per_second"]) == int(tokens)
        assert float(mfu) == pytest.approx(100 * row["mfu"], abs=0.051)
        assert float(gib) == pytest.approx(row["peak_memory_gib"], abs=0.051)
    names = ("matrix products", "scan", "optimizer", "norms", "copies", "loss", "elementwise and rest")
    for *cells, ms, _, _, _ in rows:
        by_part = dict(zip(names, cells, strict=True))
        if by_part["elementwise and rest"] == "←":  # recorded as one with the scan
            by_part["scan, elementwise and rest"] = by_part.pop("scan").removesuffix(" both")
            del by_part["elementwise and rest"]
        for name, cell in by_part.items():
            if cell != "in rest":
                within = 0.051 if "." in cell else 0.51
                assert float(cell) == pytest.approx(recorded[int(ms)]["ms_by_part"][name], abs=within), name


def test_the_decode_step():
    recorded = json.loads((RESULTS / "benchmark_decode_h200.json").read_text())["layers"]
    recorded = {("SISO" if row["rank"] == 1 else "MIMO R = 4", row["state"]): row for row in recorded}
    row = r"^\| (SISO|MIMO R = 4) \| (bfloat16|float32) \| \*\*([\d.]+)\*\* \| ([\d.]+) \| (\d+) % \| (\d+) \|.*\|$"
    rows = table("docs/kernels.md", row)
    assert len(rows) == len(recorded) == 4
    for variant, state, ms, floor, share, rate in rows:
        row = recorded[variant, state]
        assert float(ms) == pytest.approx(row["ms"], abs=0.00051)
        assert float(floor) == pytest.approx(row["floor_ms"], abs=0.00051)
        assert int(share) == round(100 * row["share_of_floor"])
        assert int(rate) == round(row["gb_per_s"])


def test_parity():
    recorded = json.loads((RESULTS / "parity_cpu.json").read_text())["runs"]
    names = "|".join(run["variant"] for run in recorded)
    row = rf"^\| ({names}) \| (\d+)" + 5 * r" \| (-?[\d.]+)" + r" \|$"
    rows = table("docs/evaluation.md", row)
    assert len(rows) == len(recorded) == 4
    for run, (variant, step, *accuracies) in zip(recorded, rows, strict=True):
        assert (run["variant"], run["steps"]) == (variant, int(step))
        for value, shown in zip(run["scaled_accuracy"].values(), accuracies, strict=True):
            assert float(shown) == pytest.approx(100 * value, abs=0.051)


def recipes(*names):
    """What was recorded on H200s of these recipes: runs, and what answers that know less would score."""
    groups = json.loads((RESULTS / "recipes_h200.json").read_text())["groups"]
    rows = [row for group in groups for row in group["runs"] + group.get("guesses", [])]
    return [row for row in rows if row["recipe"] in names]


def test_accuracies_on_gpus():
    head, line = r"^\| `(\w+)` ((?:\| \d+ )+)\|.*\n\|[-|]+\n", r"(?:\| .+ \|\n)"
    tables = table("docs/evaluation.md", f"{head}({line}+)")
    assert [recipe for recipe, *_ in tables] == ["mod_arithmetic", "mod_arithmetic_brackets", "needle"]
    for recipe, lengths, lines in tables:
        lengths = lengths.strip("| ").split(" | ")
        shown = [text.strip("| ").split(" | ") for text in lines.splitlines()]
        recorded = {row.get("variant") or row["guess"]: row["scaled_accuracy"] for row in recipes(recipe)}
        assert [name for name, *_ in shown] == list(recorded)
        for name, *cells in shown:
            for length, cell in zip(lengths, cells, strict=False):  # some have a column of the paper's
                assert float(cell) == pytest.approx(100 * recorded[name][length], abs=0.051)
            assert len(cells) >= len(lengths) == len(recorded[name])


def test_accuracies_in_the_readme():
    flat = {run["variant"]: run["scaled_accuracy"] for run in recipes("mod_arithmetic")}
    nested, needle = recipes("mod_arithmetic_brackets")[0], recipes("needle")[0]
    assert (nested["variant"], needle["variant"]) == ("mamba3", "pure")
    recorded = [flat.pop("mamba3")["255"], max(accuracy["255"] for accuracy in flat.values())]
    recorded += [needle["scaled_accuracy"]["512"], *(nested["scaled_accuracy"][length] for length in ("40", "80"))]
    flat_shares = r"accuracy ([\d.]+) % at 255 tokens the other variants at most ([\d.]+)\)"
    shares = rf"{flat_shares}[^%]*\(([\d.]+) % at 512\)[^%]*?([\d.]+) % at 40 tokens and ([\d.]+) at 80"
    (shown,) = table("README.md", shares)
    assert [float(cell) for cell in shown] == pytest.approx([100 * share for share in recorded], abs=0.051)


def test_width_of_the_state():
    row = r"^\| ((?:siso|mimo)_\d+)" + 7 * r" \| ([\d.]+)" + r" \|$"
    shown, recorded = table("docs/evaluation.md", row), recipes("compare_state_size")
    assert [name for name, *_ in shown] == [run["variant"] for run in recorded]
    for run, (_, *losses, training) in zip(recorded, shown, strict=True):
        assert [float(loss) for loss in losses] == pytest.approx([*run["val_loss_by_step"].values()], abs=0.00051)
        assert float(training) == pytest.approx(run["train_loss_by_step"][str(run["steps"])], abs=0.00051)


def test_small_language_models():
    runs = recipes("compare_small")
    names = "transformer|like_mamba2|mamba3_siso|mamba3_mimo"
    rows = table("docs/evaluation.md", rf"^\| ({names})" + 5 * r" \|(?: ([\d.]+) ± ([\d.]+))?" + r" \|$")
    assert len(rows) == 4
    for variant, *cells in rows:
        seeds = [run for run in runs if run["variant"] == variant]
        assert len(seeds) == 3
        for step, mean, deviation in zip((250, 500, 750, 1000, 1500), cells[::2], cells[1::2], strict=True):
            found = [run["val_loss_by_step"][str(step)] for run in seeds if str(step) in run["val_loss_by_step"]]
            assert bool(found) == bool(mean)
            if found:
                assert float(mean) == pytest.approx(statistics.mean(found), abs=0.00051)
                assert float(deviation) == pytest.approx(statistics.stdev(found), abs=0.00051)
