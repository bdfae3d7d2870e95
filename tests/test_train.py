"""The quickstart as a user runs it, made small: killed, interrupted, resumed, finished; and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from mamba3_train.errors import UserError
from mamba3_train.train import cli
from mamba3_train.training.report import check_accuracy_lengths

TWO_PROCESSES = {
    "ddp": ["strategy=ddp", "trainer.devices=2", "data.micro_batch_size=1"],
    "fsdp": ["strategy=fsdp", "trainer.devices=2", "data.micro_batch_size=1", "trainer.activation_checkpointing=full"],
}

SMALL = [
    "+recipe=quickstart", "data.prepare.automatic=false", "data.validation_sequences=8", "data.sequence_length=64",
    "model.d_model=64", "model.d_mlp=64", "model.n_layers=2", "model.mixer.head_dim=16", "model.mixer.d_state=8",
    "trainer.max_steps=24", "trainer.log_every_n_steps=1", "validation.every_n_steps=8", "checkpoint.every_n_steps=5",
    "report.sample_tokens=8", "trainer.log_layer_norms=true", "data.micro_batch_size=2",
]  # fmt: skip


class Run:
    """One run folder and the command that trains in it."""

    def __init__(self, folder, corpus):
        self.folder = folder
        self.command = [sys.executable, "-m", "mamba3_train", *SMALL, f"data.path={corpus}", f"run.dir={folder}"]

    def start(self, *overrides):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*self.command, *overrides], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def finish(self, *overrides, code=0):
        process = self.start(*overrides)
        out, err = process.communicate(timeout=240)
        assert process.returncode == code, err
        return out, err

    def refused(self, *overrides):
        """What the command says to a mistake; in this process, because nothing is trained."""
        err = self.here(*overrides, code=2)[1]
        assert len(err.strip().splitlines()) == 1, err
        return err

    def here(self, *overrides, code=0):
        """The command in this process, for what ends before training; returns output and errors."""
        with (
            pytest.MonkeyPatch.context() as patch,
            redirect_stdout(StringIO()) as out,
            redirect_stderr(StringIO()) as err,
        ):
            patch.setattr(sys, "argv", ["mamba3_train", *self.command[3:], *overrides])
            try:
                cli()
                ended = 0
            except SystemExit as end:
                ended = end.code
        assert ended == code, err.getvalue()
        return out.getvalue(), err.getvalue()

    def stop_at(self, step, number, *overrides, rank=None):
        """Send a signal once a step is logged, to a rank or to the process that was started with all that it started in
        its group, as a terminal and a scheduler do; returns output and code."""
        process = self.start(*overrides)
        while process.poll() is None and self.last_step() < step:
            time.sleep(0.01)
        if rank is None:
            os.killpg(process.pid, number)
        else:
            os.kill(rank_process(process.pid, rank), number)
        out, _ = process.communicate(timeout=60)
        assert self.last_step() < 24, "the run was over before the signal"
        return out, process.returncode

    def last_step(self):
        return max((row["step"] for row in self.rows()), default=0)

    def rows(self):
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def losses(self):
        """What does not depend on time, of every row."""
        exact, kinds = ("step", "tokens", "lr"), ("train/", "val/")
        return [{key: row[key] for key in row if key in exact or key.startswith(kinds)} for row in self.rows()]

    def tensors(self):
        """All that the last checkpoint holds, by file: weights, optimizer, random numbers."""
        files = (self.folder / "checkpoints" / "step-00000024").glob("*.safetensors")
        return {file.name: load_file(file) for file in files}


def rank_process(parent: int, rank: int) -> int:
    """Process id of a rank among the children of the process that started it."""
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in path.read_text().split():
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                return int(child)
    raise LookupError(f"no rank {rank} below process {parent}")


def assert_same(run, expected):
    """Bit for bit: what was logged, weights, optimizer state, random numbers."""
    assert run.losses() == expected.losses()
    files, expected_files = run.tensors(), expected.tensors()
    assert files.keys() == expected_files.keys()
    for file, tensors in files.items():
        assert tensors.keys() == expected_files[file].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected_files[file][name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, quickstart_corpus):
    run = Run(tmp_path_factory.mktemp("runs") / "whole", quickstart_corpus)
    run.output, _ = run.finish()
    return run


def test_a_run_leaves_what_the_contract_says(uninterrupted):
    folder, rows = uninterrupted.folder, uninterrupted.rows()
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 25))
    assert [row["step"] for row in rows if "val/loss" in row] == [8, 16, 24]
    assert set(rows[0]) == {
        "step", "tokens", "train/loss", "train/grad_norm", "train/param_norm", "train/update_norm",
        "train/skipped_steps", "lr",
        "tokens_per_second", "tokens_per_second_per_gpu", "mfu", "data_wait", "epochs/all", "peak_memory_gib",
        *(f"train/grad_norm/{part}" for part in ("embedding", "layers.0", "layers.1", "norm")),
    }  # fmt: skip
    parts = sum(value**2 for key, value in rows[0].items() if key.startswith("train/grad_norm/"))
    assert parts == pytest.approx(rows[0]["train/grad_norm"] ** 2, rel=1e-4)
    assert all(0 <= row["data_wait"] < 1 for row in rows if "data_wait" in row)
    epochs = [row["epochs/all"] for row in rows if "epochs/all" in row]
    assert epochs == pytest.approx([epochs[-1] * step / 24 for step in range(1, 25)], abs=1e-4)
    assert rows[0]["mfu"] is None
    assert rows[0]["tokens"] == 4 * 64
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["step"] == 24
    assert summary["val/loss"] == rows[-1]["val/loss"]
    assert summary["sample"].startswith("def ")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "config.yaml").read_text().count("rank: 2") == 1
    steps = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert steps == ["step-00000020", "step-00000024"]
    for expected in ("step 24/24", "tokens/s", "validation loss", "loss.png", "summary.json"):
        assert expected in uninterrupted.output


def test_the_loss_falls(uninterrupted):
    losses = [row["train/loss"] for row in uninterrupted.rows() if "train/loss" in row]
    assert losses[0] == pytest.approx(8.3, abs=0.3), "about ln 4096 before training"
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.timeout(600)
def test_a_run_interrupted_three_times_goes_on_as_if_nothing_had_happened(tmp_path, quickstart_corpus, uninterrupted):
    """Every phase and every signal: tests/training/test_preemption.py."""
    run = Run(tmp_path / "run", quickstart_corpus)
    for step, number, expected in ((7, signal.SIGKILL, -9), (11, signal.SIGINT, 130), (15, signal.SIGTERM, 85)):
        out, code = run.stop_at(step, number)
        assert code == expected
        # A signal that can be caught saves at the step it came in; a kill costs what came after the last checkpoint.
        if number != signal.SIGKILL:
            assert "the same command goes on from there" in out
            saved = json.loads((sorted((run.folder / "checkpoints").glob("step-*"))[-1] / "state.json").read_text())
            assert saved["step"] == run.last_step()
    out, _ = run.finish()
    assert "resuming" in out
    assert_same(run, uninterrupted)


def test_a_run_asked_to_stop_before_it_begins_leaves_nothing_behind(tmp_path, quickstart_corpus):
    run = Run(tmp_path / "run", quickstart_corpus)
    process = run.start()
    while not takes(signal.SIGUSR1, process.pid):
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 85
    assert out == "stopped by SIGUSR1; there was nothing to save, and the same command goes on\n"
    assert not run.folder.exists()


def takes(number, pid):
    """Whether a process has a handler for a signal yet."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1


def test_a_finished_run_is_left_alone(uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.folder.rglob("*")}
    out, _ = uninterrupted.here()
    assert "complete at step 24" in out
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["model.d_mlp=128"], "model.d_mlp (64 there, 128 now)"),
        (["optimizer.lr=1", "run.seed=3"], "optimizer.lr"),
        (["resume=never"], "resume=never needs an empty folder"),
    ],
)
def test_a_folder_of_another_run_is_refused(overrides, complaint, uninterrupted):
    before = {path: path.read_bytes() for path in uninterrupted.folder.rglob("*") if path.is_file()}
    assert complaint in uninterrupted.refused(*overrides)
    assert before == {path: path.read_bytes() for path in uninterrupted.folder.rglob("*") if path.is_file()}


def test_accuracies_that_the_data_has_not_are_refused_before_training(tmp_path, quickstart_corpus):
    run = Run(tmp_path / "run", quickstart_corpus)
    assert "is for data with a task" in run.refused("report.accuracy_lengths=[8]")
    assert not run.folder.exists()
    needle = SimpleNamespace(rows=SimpleNamespace(task=SimpleNamespace(shortest=13)))
    check_accuracy_lengths([13, 64], needle)
    with pytest.raises(UserError, match=r"accuracy_lengths=\[64, 12\] has a length below 13"):
        check_accuracy_lengths([64, 12], needle)


def test_a_folder_that_is_no_run_is_refused(tmp_path, quickstart_corpus):
    (tmp_path / "thesis.tex").write_text("chapter 1")
    assert "is not empty and holds no run" in Run(tmp_path, quickstart_corpus).refused()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path, quickstart_corpus):
    (tmp_path / "file").write_text("in the way")
    error = Run(tmp_path / "file" / "run", quickstart_corpus).refused()
    assert "cannot be written: [Errno 20] Not a directory" in error


def test_a_corrupt_or_missing_corpus_is_named_before_anything_is_written(tmp_path, quickstart_corpus):
    corpus = tmp_path / "corpus"
    shutil.copytree(quickstart_corpus, corpus)
    shard = max(corpus.rglob("*.bin"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    run = Run(tmp_path / "run", corpus)
    assert shard.name in run.refused()
    shutil.rmtree(corpus)
    assert f"no prepared corpus at data.path={corpus}" in run.refused()
    assert not run.folder.exists()


def test_accumulation_validation_size_and_wandb_do_not_change_the_run(tmp_path, quickstart_corpus, uninterrupted):
    """Micro-batches of one row sum to the same gradient, up to the order of the sums; wandb needs no account."""
    run = Run(tmp_path / "run", quickstart_corpus)
    run.finish(
        "data.micro_batch_size=1", "trainer.max_steps=4", "schedule.total_steps=24", "validation.every_n_steps=0",
        "logger=wandb", "logger.offline=true",
    )  # fmt: skip
    assert list((run.folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert run.last_step() == 4
    for row, expected in zip(run.rows()[:4], uninterrupted.rows(), strict=False):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-4)
        assert row["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-3)
    assert [row["step"] for row in run.rows() if "val/loss" in row] == [4], "validated at the end only"


def test_a_run_that_cannot_save_trains_to_its_end_and_says_so(tmp_path, quickstart_corpus, uninterrupted):
    """No file may grow beyond 1 MB, less than a checkpoint and more than a tokenizer: saves fail half written."""
    run = Run(tmp_path / "run", quickstart_corpus)
    run.command = ["bash", "-c", 'ulimit -f 1000 && exec "$@"', "bash", *run.command]
    out, err = run.finish("checkpoint.every_n_steps=2", "trainer.max_steps=5", "schedule.total_steps=24", code=2)
    assert "step 2 is not saved: rank 0: File too large; the newest checkpoint is none" in out
    assert out.count("training goes on; the next try is at step") >= 1
    assert err.startswith("error: step 5 is not saved: rank 0: File too large")
    assert len(err.strip().splitlines()) == 1
    assert [row["step"] for row in run.rows() if "train/loss" in row] == [1, 2, 3, 4, 5]
    assert json.loads((run.folder / "summary.json").read_text())["step"] == 5
    assert list((run.folder / "checkpoints").iterdir()) == []
    del run.command[:4]
    run.finish("checkpoint.every_n_steps=2", "trainer.max_steps=5", "schedule.total_steps=24", "profile=[2,3]")
    assert run.losses()[:5] == uninterrupted.losses()[:5]
    assert [path.name for path in (run.folder / "profile").iterdir()] == ["steps-2-3.trace.json.gz"]
    assert len(list((run.folder / "checkpoints").iterdir())) == 2


@pytest.fixture(scope="module")
def uninterrupted_pair(tmp_path_factory, quickstart_corpus):
    """A run of two processes that nothing stopped; each accumulates over two micro-batches."""
    run = Run(tmp_path_factory.mktemp("runs") / "pair", quickstart_corpus)
    run.output, _ = run.finish(*TWO_PROCESSES["fsdp"])
    return run


def test_two_processes_train_as_one_does(uninterrupted_pair, uninterrupted):
    """Started by the command itself; every strategy's numbers are compared in tests/training/test_strategies.py."""
    run, out = uninterrupted_pair, uninterrupted_pair.output
    assert out.count("step 24/24") == uninterrupted.output.count("step 24/24"), "only rank 0 speaks"
    assert [row.keys() for row in run.rows()] == [row.keys() for row in uninterrupted.rows()]
    for row, expected in zip(run.losses(), uninterrupted.losses(), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)
    # Before the first update only the order of sums differs; that of the norm runs over 262,144 squares in float32,
    # whose rounding alone was seen to move it by 3e-5.
    first, expected = run.rows()[0], uninterrupted.rows()[0]
    assert first["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
    assert first["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-4)


def test_two_processes_of_which_one_is_killed_go_on_as_if_nothing_had_happened(
    tmp_path, quickstart_corpus, uninterrupted_pair
):
    """Asked to stop, by every signal: tests/training/test_preemption.py, and below."""
    run = Run(tmp_path / "run", quickstart_corpus)
    _, code = run.stop_at(7, signal.SIGKILL, *TWO_PROCESSES["fsdp"], rank=1)
    assert code not in (0, 85)
    run.finish(*TWO_PROCESSES["fsdp"])
    assert_same(run, uninterrupted_pair)


def test_a_run_goes_on_on_another_number_of_devices(tmp_path, quickstart_corpus, uninterrupted):
    """Stopped by a signal to their launcher. Every strategy after every other: tests/training/test_strategies.py."""
    run = Run(tmp_path / "run", quickstart_corpus)
    out, code = run.stop_at(7, signal.SIGUSR2, *TWO_PROCESSES["ddp"])
    assert code == 85
    assert out.count("the same command goes on from there") == 1
    out, _ = run.finish()
    assert "resuming" in out
    for row, expected in zip(run.losses(), uninterrupted.losses(), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


def test_a_mistake_found_by_two_processes_is_said_once(uninterrupted):
    _, err = uninterrupted.finish(*TWO_PROCESSES["ddp"], "model.d_mlp=128", code=2)
    assert len(err.strip().splitlines()) == 1, err
    assert "model.d_mlp (64 there, 128 now)" in err
