"""Submit a training run to Slurm: check its config, copy the code, write the job's script, hand it to sbatch.

    python slurm/submit.py +recipe=1.5b_mimo --nodes 8 --gpus-per-node 8 --time 24:00:00 --partition gpu --account me

Recipes and key=value are those of `python -m mamba3_train`. Before its time limit, and when it is preempted, the job
saves and is put into the queue again. docs/cluster.md has the rest.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# The code that is here, which is what the job gets, also where another one is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mamba3_train.config import MISTAKES, PACKAGE, compose, explain, shipped_folder
from mamba3_train.errors import UserError
from mamba3_train.training.stop_signals import STOPPED

TEMPLATE = Path(__file__).with_name("job.sh")
# Set from the flags, so that they cannot disagree with what is asked of Slurm.
OURS = {"trainer.devices": "--gpus-per-node", "trainer.num_nodes": "--nodes"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python slurm/submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("overrides", nargs="*", metavar="key=value", help="of the training run, +recipe=NAME first")
    add("--dry-run", action="store_true", help="show the script; write and submit nothing (needs no Slurm)")
    job = made.add_argument_group("the job")
    add = job.add_argument
    add("--nodes", type=int, default=1, help="machines (default 1)")
    add("--gpus-per-node", type=int, default=8, help="and so many tasks on each; 0: one task, on the CPU (default 8)")
    add("--time", required=True, help="limit, as Slurm writes it: MINUTES, HH:MM:SS, D-HH or D-HH:MM:SS")
    add("--cpus-per-task", type=int, help="for a rank and its loader workers (default: what Slurm gives)")
    for name in ("partition", "account", "qos", "constraint"):
        add(f"--{name}", help="as Slurm knows it")
    add("--array", help="tasks of a job array: 0-3 for runs that differ by ${oc.env:SLURM_ARRAY_TASK_ID} in run.name "
        "and elsewhere, 1-10%%1 to go on with one run ten times in a row")  # fmt: skip
    add(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other option of sbatch, as often as needed"
    )
    stop = made.add_argument_group("stopping and going on")
    add = stop.add_argument
    add("--requeues", type=int, default=20, help="how often it may be put into the queue again (default 20)")
    add("--stop-before", type=int, metavar="SECONDS",
        help="before the limit, when the job saves and leaves (default: a tenth of it, at most 300)")  # fmt: skip
    there = made.add_argument_group("what runs there")
    add = there.add_argument
    add("--environment", type=Path, metavar="FILE",
        help="lines of shell to run first, such as `module load`; copied into the script")  # fmt: skip
    add("--container", metavar="IMAGE", help="a .sif file for Apptainer, or an image for Slurm's plugin pyxis")
    add("--container-mounts", metavar="FROM:TO,…", help="besides this folder, the run's and the code's")
    add("--python", help="interpreter (default: this one, in a container python3)")
    add("--config-dir", type=Path, help="folder of your own recipes, copied with the code")
    return made


@dataclass
class Job:
    """What is to be submitted; paths are absolute."""

    options: argparse.Namespace
    overrides: list[str]
    run: Path
    seconds: int
    code: Path
    files: dict[str, Path]
    """Of the code's copy: name there → where it comes from."""
    commit: str

    @property
    def folder(self) -> Path:
        """Where the script, the code and the logs lie."""
        return self.run / "slurm"

    @property
    def script(self) -> Path:
        """The script that sbatch gets."""
        return self.folder / "job.sh"


def plan_job(options: argparse.Namespace) -> Job:
    """Check everything that can be known now.

    Raises:
        UserError: a mistake in the flags or in the run's config.
    """
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("requeues", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {least}")
    seconds = limit_seconds(options.time)
    if options.stop_before is None:
        options.stop_before = min(300, seconds // 10)
    if not 0 < options.stop_before < seconds:
        raise UserError(
            f"--stop-before {options.stop_before} must be less than --time, {seconds} seconds, and positive"
        )
    if options.environment is not None and not options.environment.is_file():
        raise UserError(f"--environment {options.environment} is no file")
    if options.config_dir is not None and not options.config_dir.is_dir():
        raise UserError(f"--config-dir {options.config_dir} is no folder")
    for override in options.overrides:
        if (key := override.partition("=")[0].lstrip("+")) in OURS:
            raise UserError(f"{key} is set from {OURS[key]}: leave it out")
    overrides, run = resolve_run(options)
    files = code_files(options.config_dir)
    digest = hashlib.sha256()
    for name, source in files.items():
        digest.update(name.encode() + b"\0" + source.read_bytes())
    code = run / "slurm" / f"code-{digest.hexdigest()[:12]}"
    return Job(options, overrides, run, seconds, code, files, commit())


def limit_seconds(time: str) -> int:
    """Seconds of a time limit as Slurm writes it."""
    form = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if form is None:
        raise UserError(f"--time {time} must be MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
    days, *parts = (int(part) if part else None for part in form.groups())
    given = [part for part in parts if part is not None]
    # After days come hours; alone, one number is minutes, and the last of two is seconds.
    if days is None and len(given) < 3:
        given = [0, *given]
    hours, minutes, seconds = [*given, 0, 0][:3]
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def resolve_run(options: argparse.Namespace) -> tuple[list[str], Path]:
    """The overrides with what the flags add, and the run folder, after composing and checking the config."""
    devices = max(1, options.gpus_per_node)
    overrides = [*options.overrides, f"trainer.devices={devices}", f"trainer.num_nodes={options.nodes}"]
    if options.gpus_per_node == 0:
        overrides.append("trainer.accelerator=cpu")
    searched = [f"hydra.searchpath=[file://{options.config_dir.resolve()}]"] if options.config_dir else []
    folders = []
    for task in array_tasks(options.array):
        if task is not None:
            os.environ["SLURM_ARRAY_TASK_ID"] = task
        config = compose(*overrides, *searched)
        folders.append(Path(config.run.dir).resolve())
    if not any(override.startswith("trainer.stop_before_seconds=") for override in overrides):
        # The run's own look at the clock is for a signal that does not come.
        overrides.append(f"trainer.stop_before_seconds={options.stop_before // 2}")
    overrides += left_open(config, overrides, options.nodes, devices)
    config = compose(*overrides, *searched)
    if len(set(folders)) < len(folders) and not options.array.endswith("%1"):
        raise UserError(
            f"all tasks of --array {options.array} would train in {folders[0]}: put ${{oc.env:SLURM_ARRAY_TASK_ID}} "
            f"into run.name, or go on with one run by --array {options.array}%1"
        )
    check_run(config, options.dry_run)
    return overrides, folders[0]


def left_open(config, given: list[str], nodes: int, devices: int) -> list[str]:
    """What so many devices need, where nothing was asked for: a strategy, and a micro-batch that divides their rows."""
    from mamba3_train.plan import micro_batch_size

    keys, added, gpus = {override.partition("=")[0] for override in given}, [], nodes * devices
    if gpus > 1 and "strategy" not in keys and config.strategy._target_.endswith(".single"):
        added.append("strategy=fsdp" if nodes == 1 else "strategy=hsdp")
    if "data.micro_batch_size" not in keys and config.data.global_batch_size % gpus == 0:
        size = micro_batch_size(config, gpus)
        added += [f"data.micro_batch_size={size}"] if size != config.data.micro_batch_size else []
    return added


def array_tasks(array: str | None) -> list[str | None]:
    """The first tasks of an array, two at most; None is no array."""
    if array is None:
        return [None]
    if not re.fullmatch(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?", array):
        raise UserError(f"--array {array} must look like 0-3, 1,5,9 or 1-10%1")
    return re.findall(r"\d+", array.partition("%")[0])[:2]


def check_run(config, dry_run: bool) -> None:
    """Build what a training run builds before it starts its processes; a mistake here would have cost queue time."""
    from hydra.utils import instantiate

    from mamba3_train.training import assembly

    # There need be no GPU where jobs are submitted.
    config.trainer.accelerator = "auto" if config.trainer.accelerator == "gpu" else config.trainer.accelerator
    model, data = instantiate(config.model), instantiate(config.data)
    assembly.build_module(config, model, assembly.open_start(config, model))
    assembly.build_strategy(config)
    assembly.build_checkpointing(config, data)
    assembly.build_logger(config)
    data.check_batch_size(config.trainer.devices * config.trainer.num_nodes)
    if data.prepare is None or not data.prepare.automatic:
        try:
            data.manifest  # noqa: B018 - read when it is asked for
        except UserError as error:
            if not dry_run:
                raise
            print(f"note: {error}", file=sys.stderr)


def code_files(config_dir: Path | None) -> dict[str, Path]:
    """Files of the package, of conf/, of recipes/ and of the user's recipes, by their names in the copy."""
    roots = {"mamba3_train": PACKAGE, "config_dir": config_dir}
    roots |= {name: shipped_folder(name) for name in ("conf", "recipes") if shipped_folder(name).parent != PACKAGE}
    found = {}
    for name, root in roots.items():
        if root is None:
            continue
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                found[f"{name}/{path.relative_to(root).as_posix()}"] = path
    return found


def commit() -> str:
    """What git knows the code by."""
    here = ["git", "-C", str(PACKAGE)]
    try:
        head = subprocess.run([*here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*here, "status", "--porcelain", "."], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "not under git"
    return f"commit {head}{' with local changes' if changed else ''}"


def script(job: Job) -> str:
    """The text of the job's script."""
    options = job.options
    quote = shlex.quote
    python = options.python or ("python3" if options.container else sys.executable)
    arguments = [*(["--config-dir", str(job.code / "config_dir")] if options.config_dir else []), *job.overrides]
    values = {
        "title": f"run {job.run.name}",
        "commit": job.commit,
        "directives": "\n".join(f"#SBATCH {line}" for line in directives(job)),
        "directory": quote(os.getcwd()),
        "environment": options.environment.read_text().strip()
        if options.environment
        else "# --environment FILE goes here",
        "code": quote(str(job.code)),
        "logs": quote(str(job.folder)),
        "container": container(job),
        "python": quote(python),
        "arguments": " ".join(map(quote, arguments)),
        "stopped": str(STOPPED),
        "requeues": str(options.requeues),
    }
    return re.sub(r"@(\w+)@", lambda found: values[found.group(1)], TEMPLATE.read_text())


def directives(job: Job) -> list[str]:
    """Options of sbatch."""
    options = job.options
    lines = [f"--job-name={job.run.name}", f"--nodes={options.nodes}", f"--time={options.time}"]
    lines.append(f"--ntasks-per-node={max(1, options.gpus_per_node)}")
    lines += [f"--gpus-per-node={options.gpus_per_node}"] if options.gpus_per_node else []
    for name in ("cpus_per_task", "partition", "account", "qos", "constraint", "array"):
        if getattr(options, name) is not None:
            lines.append(f"--{name.replace('_', '-')}={getattr(options, name)}")
    lines += [f"--signal=USR1@{options.stop_before}", "--requeue", "--open-mode=append"]
    lines.append(f"--output={job.folder}/{'%A_%a' if options.array else '%j'}.out")
    return lines + options.sbatch


def container(job: Job) -> str:
    """What stands between srun and Python."""
    image = job.options.container
    if image is None:
        return ""
    own = [f"{path}:{path}" for path in dict.fromkeys((os.getcwd(), str(job.run)))]
    mounts = ",".join([*own, *([job.options.container_mounts] if job.options.container_mounts else [])])
    if image.endswith(".sif"):
        return f"apptainer exec --nv --bind {shlex.quote(mounts)} {shlex.quote(image)} "
    where = f"--container-workdir={shlex.quote(os.getcwd())}"
    return f"--container-image={shlex.quote(image)} --container-mounts={shlex.quote(mounts)} {where} "


def submit(job: Job) -> str:
    """Copy the code, write the script, hand it to sbatch; returns the job's number."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not installed here: submit where it is, or see the script by --dry-run")
    try:
        for name, source in job.files.items():
            copy = job.code / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
        (job.code / "COMMIT").write_text(job.commit + "\n")
        job.script.write_text(script(job))
    except OSError as error:
        raise UserError(f"the run folder {job.run} cannot be written: {error}") from error
    done = subprocess.run(["sbatch", "--parsable", str(job.script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch refused {job.script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def main() -> None:
    """Plan, then show or submit."""
    options = parser().parse_intermixed_args()
    try:
        job = plan_job(options)
        if options.dry_run:
            print(script(job), end="")
            return
        number = submit(job)
    except MISTAKES as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(2)
    name = f"{number}_*" if options.array else number
    print(f"submitted {job.script} as job {number}\n  its messages  {job.folder}/{name}.out")
    print(f"  logs by rank  {job.folder}/{name}/rank-0000.log\n  save and end  scancel {number}")


if __name__ == "__main__":
    main()
