"""Faults put into trainings: each ends as the table of docs/guards.md says it does."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fault_runs import ISOLATED, REPEATED, ROLL_BACK, train
from safetensors.torch import load_file
from strategy_runs import ALONE, STRATEGIES, free_port

from mamba3_train.checkpoint import saver
from mamba3_train.data import corpus_files
from mamba3_train.data.batches import TrainingBatches
from mamba3_train.training import loggers
from mamba3_train.training.watchdog import EXIT_CODE

DOCUMENT = Path(__file__).parents[2] / "docs" / "guards.md"
WORKER = Path(__file__).with_name("fault_runs.py")
# (step, batch of the data, whether it changed anything) of a run with ISOLATED and REPEATED faults and a roll back.
HISTORY = [
    *[(1, 0, True), (2, 1, False), (3, 2, False), (4, 3, True), (5, 4, False), (6, 5, True), (7, 6, False)],
    *[(8, 7, False), (7, 8, True), (8, 9, True), (9, 10, True)],
]

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


def documented(fault):
    """The exit code that the table gives for a fault."""
    (row,) = [line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| {fault} |")]
    return int(re.search(r"\| (\d+)[^|]* \|$", row).group(1))


def rows(folder):
    """What does not depend on time, of every row."""
    timed = ("tokens_per_second", "tokens_per_second_per_gpu", "data_wait", "peak_memory_gib")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timed} for row in found]


def state(folder):
    newest = max((folder / "checkpoints").glob("step-*"))
    saved = json.loads((newest / "state.json").read_text())
    return saved | {"tensors": {k: v for file in newest.glob("*.safetensors") for k, v in load_file(file).items()}}


def assert_same(folder, expected):
    """Bit for bit: rows, weights, optimizer, random numbers, the guard's memory, the data's cursor."""
    assert rows(folder) == rows(expected)
    found, wanted = state(folder), state(expected)
    tensors, wanted_tensors = found.pop("tensors"), wanted.pop("tensors")
    assert found == wanted
    assert tensors.keys() == wanted_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, wanted_tensors[name]), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quickstart_corpus):
    """Folder of the runs: `single` in this process, and those of two processes by the names of fault_runs.py."""
    made = tmp_path_factory.mktemp("faults")
    code, history = train(made / "single", quickstart_corpus, *ALONE, *ROLL_BACK, faults=ISOLATED | REPEATED)
    assert code == 0
    assert history == HISTORY
    return made


@pytest.fixture(scope="module")
def pair(folder, quickstart_corpus):
    """Exit codes and output of two processes that trained under every strategy, until one of them was stopped."""
    command = [sys.executable, str(WORKER), str(folder), "--corpus", str(quickstart_corpus)]
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = []
    for rank in ("0", "1"):
        with (folder / f"output-{rank}").open("w") as output:
            environment = common | {"RANK": rank, "LOCAL_RANK": rank}
            ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        codes = [ranks[0].wait(timeout=500)]
        ranks[1].send_signal(signal.SIGCONT)
        codes.append(ranks[1].wait(timeout=100))
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return codes, [(folder / f"output-{rank}").read_text() for rank in range(2)]


def test_a_run_with_faults_says_what_it_skipped_and_where_it_went_back(folder):
    found = rows(folder / "single")
    assert [row["step"] for row in found] == list(range(1, 10))
    assert [row["train/skipped_steps"] for row in found] == [0, 1, 2, 2, 3, 3, 3, 3, 3]
    assert [row["train/loss"] is None for row in found] == [False, True] + [False] * 7
    assert [row["train/grad_norm"] is None for row in found] == [False, True, True] + [False] * 6
    assert [row["train/update_norm"] == 0 for row in found] == [False, True, True, False, True] + [False] * 4
    # Rows of four samples; after the roll back the seventh step reads what the ninth would have read.
    epochs = [round(row["epochs/all"] / found[0]["epochs/all"]) for row in found]
    assert epochs == pytest.approx([1, 2, 3, 4, 5, 6, 9, 10, 11], abs=1)
    assert (state(folder / "single")["samples"], state(folder / "single")["rollbacks"]) == (44, 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_skips_and_rolls_back_as_one_process_does(strategy, folder, pair):
    for rank in range(2):
        outcome = json.loads((folder / strategy / f"outcome-{rank}.json").read_text())
        assert outcome == [0, [list(step) for step in HISTORY]]
    found, expected = rows(folder / strategy), rows(folder / "single")
    for key in ("train/skipped_steps", "epochs/all"):
        assert [row[key] for row in found] == [row[key] for row in expected]
    for key, rounding in (("train/loss", 1e-5), ("train/grad_norm", 1e-4)):
        values = [[row[key] for row in run if row[key] is not None] for run in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=rounding)


def test_a_run_goes_on_after_a_roll_back_on_two_processes_where_it_was_on_one(folder, pair):
    outcome = json.loads((folder / "resumed" / "outcome-1.json").read_text())
    assert outcome == [0, [[9, 10, True]]]
    found, expected = (rows(folder / run)[-1] for run in ("resumed", "single"))
    assert found["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
    assert found["train/skipped_steps"] == expected["train/skipped_steps"]
    assert state(folder / "resumed")["samples"] == state(folder / "single")["samples"]


def test_a_slow_rank_is_named_and_does_not_hide_in_what_others_wait_for(folder, pair):
    _, (output, _) = pair
    assert re.search(r"rank 1 on \S+ is slower than the others: 3\S* seconds", output)
    events = json.loads((folder / "slow" / "events-0.json").read_text())
    # Of the one layer's forward passes: its parameters are waited for before its work begins, never within.
    moments = [place for place, event in enumerate(events) if event == "moment"]
    assert len(moments) == 4 * 2
    for begin, end in zip(moments[::2], moments[1::2], strict=True):
        assert end == begin + 1
        assert events[begin - 1] == "parameters"


def test_a_stopped_rank_ends_the_others_and_then_itself(folder, pair):
    (first, second), (output, _) = pair
    assert first == EXIT_CODE == documented("a rank stopped (SIGSTOP)")
    assert "no progress for 5 seconds while taking step 4" in output
    assert "training_step" in (folder / "stopped" / "stacks-rank-00000.txt").read_text()
    # Let go on, it finds its time over or its partner gone, whichever it looks at first.
    assert second in (EXIT_CODE, 1)


class Killed(BaseException):
    """Ends a training as a kill does: nothing is saved."""


def test_interrupted_before_and_after_a_roll_back_it_ends_the_same(tmp_path, folder, quickstart_corpus):
    learned = []
    for last in (7, 9, 99):

        def kill(batch, last=last):
            learned.append(batch)
            if batch > last:
                raise Killed

        try:
            train(tmp_path, quickstart_corpus, *ALONE, *ROLL_BACK, faults=ISOLATED | REPEATED, at_batch=kill)
        except Killed:
            continue
    # The first kill came before anything was saved after the roll back: the spikes and the way back come again.
    assert learned == [*range(9), *range(6, 11), 10]
    assert_same(tmp_path, folder / "single")


@pytest.mark.parametrize("keep_last", [2, 9])
def test_saves_among_spikes_leave_the_way_back(keep_last, tmp_path, quickstart_corpus):
    """Four steps are skipped and saved before the row that tells of them, where two in a row are too many."""
    late = ["trainer.log_every_n_steps=8", f"checkpoint.keep_last={keep_last}"]
    spikes = dict.fromkeys(range(4, 8), ("spike", None))
    code, history = train(tmp_path, quickstart_corpus, *ALONE, *ROLL_BACK, *late, faults=spikes)
    assert code == 0
    assert history[7:10] == [(8, 7, False), (5, 8, True), (6, 9, True)]


def test_a_roll_back_waits_for_the_checkpoint_that_is_being_written(tmp_path, quickstart_corpus, monkeypatch):
    """Writing step 4 takes longer than the two spikes after it."""
    write = saver.write_shard
    monkeypatch.setattr(saver, "write_shard", lambda *arguments: time.sleep(1.5) or write(*arguments))
    saves = ["checkpoint.every_n_steps=4", "checkpoint.asynchronous=true", "trainer.log_every_n_steps=1"]
    spikes = dict.fromkeys((4, 5), ("spike", None))
    code, history = train(tmp_path, quickstart_corpus, *ALONE, *ROLL_BACK, *saves, faults=spikes)
    assert code == 0
    assert history[5:7] == [(6, 5, False), (5, 6, True)]


def test_a_loss_that_stays_non_finite_ends_the_run(tmp_path, quickstart_corpus, capsys):
    faults = dict.fromkeys(range(4, 99), ("nan", None))
    code, history = train(tmp_path, quickstart_corpus, *ALONE, "guards.max_nonfinite_in_a_row=3", faults=faults)
    assert code == documented("non-finite, too many in a row")
    assert history[-1] == (7, 6, False)
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "at step 7 the loss or its gradient has not been finite 3 times in a row" in error
    assert "from sample 16 on" in error


def test_spikes_that_come_back_after_the_last_roll_back_end_the_run(tmp_path, quickstart_corpus, capsys):
    faults = dict.fromkeys(range(4, 99), ("spike", None))
    code, history = train(tmp_path, quickstart_corpus, *ALONE, *ROLL_BACK, faults=faults)
    assert code == documented("spikes, too many in a row, no roll backs left")
    assert [step for step, _, _ in history] == [1, 2, 3, 4, 5, 6, 5, 6]
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "rolled back 1 times already (guards.max_rollbacks=1)" in error
    assert state(tmp_path)["rollbacks"] == 1, "the same command does not begin to count anew"


def test_a_loader_that_fails_ends_the_run_which_then_goes_on(tmp_path, quickstart_corpus, monkeypatch):
    def read(batches, positions):
        if positions.start >= 4 * 5:
            raise ConnectionResetError("the loader's storage is gone")
        return original(batches, positions)

    original = TrainingBatches.__getitem__
    monkeypatch.setattr(TrainingBatches, "__getitem__", read)
    with pytest.raises(ConnectionResetError, match="the loader's storage is gone"):  # Python then ends with code 1
        train(tmp_path / "run", quickstart_corpus, *ALONE, "data.num_workers=1")
    assert documented("the loader raises an exception") == 1
    monkeypatch.undo()
    code, history = train(tmp_path / "run", quickstart_corpus, *ALONE)
    assert (code, history) == (0, [(step, step - 1, True) for step in range(5, 10)])


def test_a_shard_that_changes_ends_the_run_with_its_name(tmp_path, quickstart_corpus, monkeypatch, capsys):
    monkeypatch.setattr(corpus_files, "RECHECK_SECONDS", -1.0)
    shutil.copytree(quickstart_corpus, tmp_path / "corpus")
    shard = max((tmp_path / "corpus").glob("*-train-*.bin"), key=lambda path: path.stat().st_size)

    def corrupt(batch):
        if batch == 4:
            shard.write_bytes(shard.read_bytes()[::-1])

    code, history = train(tmp_path / "run", tmp_path / "corpus", *ALONE, at_batch=corrupt)
    assert code == documented("a shard changes under the run")
    assert history[-1][1] == 4
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert f"shard changed while it was being read: {shard}" in error


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_foretold_and_stops_nothing_but_saving(small_disk, quickstart_corpus, capsys):
    """Checkpoints of 17 MiB: three fit, a fourth does not."""
    settings = ["model.d_model=256", "checkpoint.every_n_steps=1", "trainer.max_steps=5"]
    code, history = train(small_disk / "run", quickstart_corpus, *ALONE, *settings)
    assert code == documented("the disk is full")
    assert [step for step, _, changed in history if changed] == [1, 2, 3, 4, 5]
    out, err = capsys.readouterr()
    said = [
        r"GiB free, checkpoints will need 0.\d\d GiB more \(10 of 0.02\)",
        r"GiB free, less than the 0.02 GiB of the next checkpoint",
        r"step 4 is not saved: rank 0: No space left on device",
    ]
    places = [re.search(words, re.sub(r"\s+", " ", out)).start() for words in said]
    assert places == sorted(places), "said before it was full"
    assert "step 5 is not saved" in err
    whole = sorted(path.name for path in (small_disk / "run" / "checkpoints").iterdir())
    assert whole == ["step-00000001", "step-00000002", "step-00000003"]
    assert rows(small_disk / "run")[-1]["step"] == 5


def test_wandb_that_cannot_be_reached_stops_nothing(tmp_path, quickstart_corpus, monkeypatch, capsys):
    """Neither its server nor its offline mode; the real server's absence is in test_loggers.py."""

    class Unreachable:
        def __init__(self, **settings):
            raise ConnectionError("no route to host")

    monkeypatch.setattr(loggers, "WandbLogger", Unreachable)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(teardown=lambda: None))  # importing it takes seconds
    settings = ["logger=wandb", "trainer.max_steps=3", "checkpoint.every_n_steps=9"]
    code, history = train(tmp_path, quickstart_corpus, *ALONE, *settings)
    assert (code, len(history)) == (documented("wandb unreachable"), 3)
    assert "training goes on" in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_every_fault_of_the_table_has_its_test():
    table = DOCUMENT.read_text().partition("| fault |")[2].partition("\n\n")[0]
    faults = re.findall(r"^\| ([^|-][^|]*) \|", table, flags=re.MULTILINE)
    source = Path(__file__).read_text()
    together = {"NaN on one rank", "an inf gradient", "a spike of the loss", "spikes, too many in a row"}
    elsewhere = together | {"a rank is slow", "a rank killed"}
    assert {fault for fault in faults if f'documented("{fault}")' not in source} == elsewhere
