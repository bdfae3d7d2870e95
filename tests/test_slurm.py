"""Jobs on a real Slurm, of two nodes whose names do not resolve: submitted, preempted, requeued, cancelled, ended."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from slurm_cluster import Cluster, NoCluster
from test_submit import submit
from waiting_logger import STEP

from mamba3_train.sweeping.journal import Journal

SWEEP = Path(__file__).parents[1] / "slurm" / "sweep.sh"
SMALL = [
    "+recipe=quickstart", "data.prepare.automatic=false", "data.validation_sequences=8", "data.sequence_length=32",
    "model.d_model=32", "model.d_mlp=32", "model.n_layers=1", "model.mixer.head_dim=16", "model.mixer.d_state=8",
    "trainer.max_steps=12", "trainer.log_every_n_steps=1", "validation.every_n_steps=4", "checkpoint.every_n_steps=5",
    "report.sample_prompt=null", "data.micro_batch_size=2", "strategy=ddp",
]  # fmt: skip

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    try:
        cluster = Cluster(folder)
        cluster.start()
    except NoCluster as reason:
        pytest.skip(f"no Slurm here: {reason}")
    yield cluster
    cluster.stop()


@pytest.fixture
def folder(cluster, tmp_path, monkeypatch):
    """A folder to submit from, with a logger that waits in `mine`."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{cluster.environment['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "logger").mkdir(parents=True)
    (tmp_path / "mine" / "logger" / "waiting.yaml").write_text("_target_: waiting_logger.Waiting\n")
    return tmp_path


def tensors(folder):
    return {file.name: load_file(file) for file in (folder / "checkpoints" / "step-00000012").glob("*.safetensors")}


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in row if key.startswith(("step", "lr", "train/", "val/"))} for row in rows]


def test_a_preempted_job_is_requeued_and_ends_like_one_that_never_was(
    cluster, quickstart_corpus, folder, monkeypatch, capfd
):
    """The job waits at step 7. Then its limit is lowered, so that Slurm finds, when it looks at limits the next time,
    which it does every half minute, that the signal before the limit is due."""
    hook = folder / "environment.sh"
    hook.write_text(f"export PYTHONPATH={Path(__file__).parent}\n")
    run = folder / "preempted"
    code, out, err = submit(
        monkeypatch, capfd, *SMALL, f"data.path={quickstart_corpus}", f"run.dir={run}", "logger=waiting",
        "--config-dir", "mine", "--environment", str(hook), "--nodes", "2", "--gpus-per-node", "0", "--time", "60",
        "--stop-before", "300",
    )  # fmt: skip
    assert code == 0, err
    number = out.split(" as job ")[1].split()[0]

    never = folder / "never-preempted"
    command = [sys.executable, "-m", "mamba3_train", *SMALL, f"data.path={quickstart_corpus}", f"run.dir={never}"]
    reference = subprocess.run(
        [*command, "trainer.devices=2"], env=os.environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert reference.returncode == 0, reference.stderr

    metrics = run / "metrics.jsonl"
    job = cluster.wait(
        number, lambda job: metrics.exists() and len(losses(run)) > STEP
    )  # a row more: that of a validation
    hours, minutes, _ = map(int, job["RunTime"].split(":"))
    cluster.run("scontrol", "update", f"JobId={number}", f"TimeLimit={60 * hours + minutes + 2}")
    cluster.wait(number, lambda job: job["Restarts"] == "1")
    cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    job = cluster.wait(number, lambda job: job["JobState"] == "COMPLETED")
    said = (run / "slurm" / f"{number}.out").read_text() + (run / "slurm" / number / "rank-0000.log").read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), said
    assert f"stopped by SIGUSR1 after step {STEP}; the same command goes on from there" in said
    assert f"resuming {run} at step {STEP}" in said
    assert losses(run) == losses(never)
    found, expected = tensors(run), tensors(never)
    assert len(expected) == 2
    for file, wanted in expected.items():
        assert all(torch.equal(found[file][name], wanted[name]) for name in wanted)


def test_a_sweep_as_an_array_loses_no_trial(cluster, quickstart_corpus, folder, monkeypatch):
    """Two tasks with a trial each, which wait at step 7: one is asked to stop and comes back, the other is cancelled.

    The one that comes back is the array's last task, whose SLURM_JOB_ID is the number of the array."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{SWEEP.parents[1]}")
    command = [
        "sbatch", "--parsable", "--array=0-1", str(SWEEP), "--config-dir", "mine", *SMALL, "logger=waiting",
        f"data.path={quickstart_corpus}", "sweep.dir=sweep", "sweep.space.optimizer.lr.points=2",
    ]  # fmt: skip
    array = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    other, last = f"{array}_0", f"{array}_1"
    trials = [folder / "sweep" / f"trial-{number:04d}" for number in range(2)]

    def both_wait(job):
        return all((trial / "metrics.jsonl").exists() and len(losses(trial)) > STEP for trial in trials)

    def ends(task, state, restarts):
        job = cluster.wait(task, lambda job: False)
        said = (folder / f"slurm-{task}.out").read_text()
        assert (job["JobState"], job["Restarts"]) == (state, restarts), said
        return said

    job = cluster.wait(last, both_wait)
    assert job["JobId"] == array
    assert both_wait(job), "".join(path.read_text() for path in folder.glob("slurm-*.out"))
    cluster.run("scancel", "--signal=USR1", last)
    said = ends(last, "COMPLETED", restarts="1")
    (mine,) = (trial for trial in trials if f"{trial.name} starts" in said)
    assert f"{mine.name} goes on after step {STEP}" in said
    assert f"{mine.name} complete" in said
    assert "1 running: other workers train them" in said
    assert [row["step"] for row in losses(mine) if "train/loss" in row] == list(range(1, 13))

    cluster.run("scancel", other)
    said = ends(other, "CANCELLED", restarts="0")
    (theirs,) = set(trials) - {mine}
    assert f"{theirs.name} stopped after step {STEP}" in said
    assert (theirs / "checkpoints" / f"step-{STEP:08d}").is_dir()
    states = {record.name: record.state for record in Journal(folder / "sweep").records()}
    assert states == {mine.name: "complete", theirs.name: "stopped"}
