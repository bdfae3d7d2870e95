"""slurm/submit.py: what it writes, what it refuses, and how its script answers exit codes, without any Slurm."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "slurm" / "submit.py"
SMALL = ["+recipe=quickstart", "--gpus-per-node", "0", "--time", "10"]


def load(monkeypatch):
    """The script as a module."""
    description = importlib.util.spec_from_file_location("submit", PATH)
    module = importlib.util.module_from_spec(description)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "submit", module)  # its dataclass looks itself up
    description.loader.exec_module(module)
    return module


def submit(monkeypatch, capfd, *arguments):
    """Call the command; returns exit code, output and errors."""
    module, code = load(monkeypatch), 0
    monkeypatch.setattr(sys, "argv", ["submit.py", *arguments])
    try:
        module.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capfd.readouterr()


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Call the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: submit(monkeypatch, capfd, *arguments)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Put a command of Slurm, made of lines of shell, before the real one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name, *lines):
        (folder / name).write_text("\n".join(["#!/bin/bash", *lines, ""]))
        (folder / name).chmod(0o755)

    return make


def valid(script):
    return subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_a_dry_run_shows_the_script_and_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    code, script, errors = run(
        "+recipe=1.5b_mimo", "--nodes", "8", "--gpus-per-node", "8", "--time", "24:00:00", "--partition", "gpu",
        "--account", "me", "--qos", "high", "--constraint", "h200", "--cpus-per-task", "12", "--requeues", "3",
        "--sbatch=--exclusive", "optimizer.lr=1e-3", "--dry-run",
    )  # fmt: skip
    assert code == 0, errors
    assert valid(script)
    folder = tmp_path / "runs" / "1.5b_mimo"
    directives = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert directives == [
        "--job-name=1.5b_mimo", "--nodes=8", "--time=24:00:00", "--ntasks-per-node=8", "--gpus-per-node=8",
        "--cpus-per-task=12", "--partition=gpu", "--account=me", "--qos=high", "--constraint=h200",
        "--signal=USR1@300", "--requeue", "--open-mode=append", f"--output={folder}/slurm/%j.out", "--exclusive",
    ]  # fmt: skip
    # 256 rows over 64 GPUs are 4 each: the recipe's micro-batch of 8 becomes 4.
    assert (
        f"{sys.executable} -m mamba3_train +recipe=1.5b_mimo optimizer.lr=1e-3 trainer.devices=8 trainer.num_nodes=8 "
        "trainer.stop_before_seconds=150 strategy=hsdp data.micro_batch_size=4\n"
    ) in script
    assert f"code={folder}/slurm/code-" in script
    assert '[ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]' in script
    assert "note: no prepared corpus at data.path=data/fineweb_edu" in errors
    assert list(tmp_path.iterdir()) == []


def test_hooks_for_environment_and_containers(run, tmp_path):
    hook = tmp_path / "hook.sh"
    hook.write_text("module load cuda/13\n")
    _, script, _ = run(*SMALL, "--environment", "hook.sh", "--container", "image.sif", "--dry-run")
    assert valid(script)
    assert script.index("\nmodule load cuda/13\n") < script.index("\nsrun ")
    here = f"{tmp_path}:{tmp_path}"
    assert f"apptainer exec --nv --bind {here}," in script
    assert "image.sif \\\n    python3 -m mamba3_train +recipe=quickstart" in script
    _, script, _ = run(*SMALL, "--container", "registry#image:1", "--container-mounts", "/data:/data", "--dry-run")
    assert valid(script)
    assert f"--container-image='registry#image:1' --container-mounts={here}," in script
    assert ",/data:/data --container-workdir=" in script


def test_what_a_container_is_given(run, command, tmp_path):
    (tmp_path / "hook.sh").write_text("export FROM_HOOK='a value'\n")
    _, script, _ = run(*SMALL, "--environment", "hook.sh", "--container", "my image.sif", "--dry-run")
    command("srun", "while [[ $1 = --* ]]; do shift; done", 'exec "$@"')
    names = ("FROM_HOOK", "PYTHONPATH", "TRITON_CACHE_DIR", "SLURM_JOB_END_TIME")
    command("apptainer", 'printf "%s\\n" "$@"', *(f'echo "{name}=${name}"' for name in names))
    command("squeue", "echo 7 7 2027-01-15T08:00:00")
    environment = {"PATH": os.environ["PATH"], "TZ": "UTC", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    environment["TMPDIR"] = "/scratch"
    done = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, check=True)
    _, *said, _ = done.stdout.splitlines()
    assert said[:6] == ["exec", "--nv", "--bind", f"{tmp_path}:{tmp_path},{tmp_path}/runs/quickstart:"
                        f"{tmp_path}/runs/quickstart", "my image.sif", "python3"]  # fmt: skip
    code = re.search("^code=(.*)$", script, re.MULTILINE).group(1)
    assert said[-4:] == [
        "FROM_HOOK=a value", f"PYTHONPATH={code}", "TRITON_CACHE_DIR=/scratch/mamba3_train-7/triton",
        "SLURM_JOB_END_TIME=1800000000",
    ]  # fmt: skip


def test_arrays(run, tmp_path):
    code, script, errors = run(*SMALL, "--array", "3-5", "run.name='seed-${oc.env:SLURM_ARRAY_TASK_ID}'", "--dry-run")
    assert code == 0, errors
    assert "#SBATCH --array=3-5\n" in script
    assert f"#SBATCH --output={tmp_path}/runs/seed-3/slurm/%A_%a.out" in script
    assert """'run.name='"'"'seed-${oc.env:SLURM_ARRAY_TASK_ID}'"'"''""" in script
    assert run(*SMALL, "--array", "1-10%1", "--dry-run")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["+recipe=quikstart", "--time", "1"], "there is no recipe named 'quikstart'. Did you mean quickstart"),
        ([*SMALL, "trainer.max_step=1"], "unknown key trainer.max_step. Did you mean max_steps"),
        ([*SMALL, "trainer.devices=2"], "trainer.devices is set from --gpus-per-node: leave it out"),
        ([*SMALL, "--nodes", "0"], "--nodes 0 must be at least 1"),
        ([*SMALL, "--nodes", "3"], "data.global_batch_size=4 is not a multiple of"),
        ([*SMALL, "--nodes", "2", "strategy=single"], "strategy=single runs one process"),
        ([*SMALL, "--nodes", "2", "data.micro_batch_size=4"], "data.global_batch_size=4 is not a multiple of 8"),
        ([*SMALL, "model.mixer.head_dim=33"], "model.mixer.head_dim=33"),
        ([*SMALL, "--time", "soon"], "--time soon must be MINUTES"),
        ([*SMALL, "--stop-before", "600"], "--stop-before 600 must be less than --time, 600 seconds"),
        ([*SMALL, "--array", "a"], "--array a must look like 0-3"),
        ([*SMALL, "--array", "0-30%10"], "put ${oc.env:SLURM_ARRAY_TASK_ID} into run.name"),
        ([*SMALL, "--array", "0-3"], "put ${oc.env:SLURM_ARRAY_TASK_ID} into run.name, or go on with one run by"),
        ([*SMALL, "--environment", "nothing.sh"], "--environment nothing.sh is no file"),
        ([*SMALL, "--config-dir", "nothing"], "--config-dir nothing is no folder"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_cost_no_queue_time(arguments, complaint, run, tmp_path):
    code, out, errors = run(*arguments, "--dry-run")
    assert (code, out) == (2, "")
    assert len(errors.strip().splitlines()) == 1, errors
    assert complaint in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-0", 172800), ("1-12:30", 131400), ("0-0:0:5", 5)],
)
def test_limits_are_read_as_slurm_reads_them(time, seconds, monkeypatch):
    assert load(monkeypatch).limit_seconds(time) == seconds


def test_submitted_code_stays_as_it_is(run, command, tmp_path, quickstart_corpus):
    command("sbatch", f'echo "$@" > {tmp_path}/asked', "echo '42;cluster'")
    corpus = f"data.path={quickstart_corpus}"
    code, out, errors = run(*SMALL, corpus)
    assert code == 0, errors
    folder = tmp_path / "runs" / "quickstart" / "slurm"
    assert (tmp_path / "asked").read_text() == f"--parsable {folder}/job.sh\n"
    assert f"submitted {folder}/job.sh as job 42" in out
    (copy,) = folder.glob("code-*")
    assert (copy / "mamba3_train" / "train.py").read_bytes() == (PATH.parents[1] / "mamba3_train/train.py").read_bytes()
    assert (copy / "recipes" / "quickstart.yaml").exists()
    assert (copy / "COMMIT").read_text().startswith(("commit ", "not under git"))
    # The copy is what runs, though the job starts in a folder that may hold another one.
    (tmp_path / "mamba3_train").mkdir()
    (tmp_path / "mamba3_train" / "__init__.py").write_text("raise SystemExit('the wrong code')")
    script = (folder / "job.sh").read_text().splitlines()
    lines = [line for line in script if line.startswith(("code=", "export PYTHONPATH="))]
    where = "python -c 'import mamba3_train.config as c; print(c.PACKAGE, c.shipped_folder(\"conf\"))'"
    shell = "; ".join([*lines, where.replace("python", sys.executable, 1)])
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == [f"{copy}/mamba3_train", f"{copy}/conf"]
    # The run folder is still new to the run, and the same code is not copied again.
    from mamba3_train.checkpoint.resume import open_run_folder
    from mamba3_train.config import compose

    assert open_run_folder(compose("+recipe=quickstart", corpus, "resume=never")) is None
    assert run(*SMALL, corpus)[0] == 0
    assert list(folder.glob("code-*")) == [copy]


def test_what_sbatch_says_is_one_line(run, command, quickstart_corpus):
    command("sbatch", "echo 'sbatch: error: invalid partition' >&2", "exit 1")
    code, _, errors = run(*SMALL, f"data.path={quickstart_corpus}")
    assert code == 2
    assert errors.strip().endswith("job.sh: sbatch: error: invalid partition")
    assert len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("ended", "restarts", "state", "code", "requeued"),
    [
        (0, 0, "RUNNING", 0, False),
        (85, 0, "RUNNING", 0, True),
        (85, 2, "RUNNING", 85, False),  # often enough
        (85, 0, "COMPLETING", 85, False),  # somebody cancelled it
        (1, 0, "RUNNING", 1, False),
        (75, 0, "RUNNING", 75, False),  # the watchdog's
        (137, 0, "RUNNING", 137, False),
    ],
)
def test_the_script_requeues_what_was_stopped_and_nothing_else(
    ended, restarts, state, code, requeued, run, command, tmp_path
):
    _, script, _ = run(*SMALL, "--requeues", "2", "--dry-run")
    command("srun", f"exit {ended}")
    command("squeue", f'case "$*" in *%T*) echo {state};; *) echo "7 7 $(date -Is)";; esac')
    command("scontrol", f'echo "$@" >> {tmp_path}/asked')
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "SLURM_JOB_NODELIST": "n1"}
    done = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == ("requeue 7\n" if requeued else "")


@pytest.mark.parametrize("script", ["job.sh", "sweep.sh"])
def test_a_task_of_an_array_is_asked_for_and_requeued_alone(script, run, command, tmp_path):
    """The number of the last task's job is the number of the array, and stands for all of its tasks."""
    command("srun", "echo the job ends at $SLURM_JOB_END_TIME", "exit 85")
    command(
        "squeue", 'case "$*" in', '*--array*=7*"%A %i %e") echo 8 7_2 N/A; echo 7 7_3 2027-01-15T08:00:00;;',
        '*--array*=7*"%A %i %T") echo 8 7_2 COMPLETING; echo 7 7_3 RUNNING;;', "*=7_3*%T) echo RUNNING;; esac",
    )  # fmt: skip
    command("scontrol", f'echo "$@" >> {tmp_path}/asked')
    # Of the job that submitted this one.
    others = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_END_TIME": "1700000000"}
    environment = os.environ | others | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "TZ": "UTC"}
    text = run(*SMALL, "--dry-run")[1] if script == "job.sh" else PATH.with_name(script).read_text()
    done = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert (tmp_path / "asked").read_text() == "requeue 7_3\n"
    assert script == "sweep.sh" or "the job ends at 1800000000\n" in done.stdout
