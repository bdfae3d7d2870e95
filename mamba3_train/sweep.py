"""`python -m mamba3_train.sweep +recipe=NAME sweep=NAME`: many runs of one recipe, and the best of them."""

import os
import signal
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mamba3_train.command_line import config_dirs, given_overrides, key_of
from mamba3_train.config import command, compose
from mamba3_train.errors import UserError

PREEMPTED = 85
# Not for trials: what is the sweep's, or each trial's own.
OURS = ("sweep", "workers", "show", "resume", "run.name", "run.dir")
# With what makes a run the run it is, what trials must share to be compared.
IDENTITY = (
    *("schedule", "trainer.max_steps", "trainer.precision", "trainer.gradient_clip_norm", "validation"),
    *(f"sweep.{key}" for key in ("space", "sampler", "seed", "pruner", "prune_after", "startup_trials")),
    "sweep.equal_tokens",
)


@command("sweep")
def main(config: DictConfig) -> int:
    """Search, or show what a search has found; returns the exit code."""
    from rich.console import Console

    from mamba3_train.sweeping.display import Display
    from mamba3_train.sweeping.journal import Journal
    from mamba3_train.sweeping.workers import Workers

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if config.show is not None:
        return report(Journal(Path(config.show)), console)
    environments = worker_environments(config)
    journal, start = open_sweep(config)
    with Display(journal, console) as display:
        stopped = Workers(journal, start, environments, display).run()
    if stopped:
        console.print("the sweep is stopped; the same command goes on with it")
        return 128 + stopped if stopped == signal.SIGINT else PREEMPTED
    return report(journal, console)


def worker_environments(config: DictConfig) -> list[dict[str, str]]:
    """Variables for the trainings of each worker: its GPUs, or its share of the cores.

    Raises:
        UserError: more GPUs are needed than there are, or processes that only a launcher can start.
    """
    workers, devices = config.workers, config.trainer.devices
    if workers < 1:
        raise UserError(f"workers={workers} must be at least 1")
    if config.trainer.num_nodes > 1:
        raise UserError(f"trainer.num_nodes={config.trainer.num_nodes}: a trial trains on one machine")
    if "RANK" in os.environ:
        raise UserError("a sweep starts its trainings itself: give this command without a launcher, once a machine")

    import torch

    from mamba3_train.training.hardware import on_gpu

    if not on_gpu(config.trainer.accelerator):
        threads = max(len(os.sched_getaffinity(0)) // (workers * devices), 1)
        return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * workers
    count = torch.cuda.device_count()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]
    if workers * devices > count:
        raise UserError(
            f"workers={workers} of trainer.devices={devices} each need {workers * devices} GPUs, but there are {count}"
        )
    shares = [gpus[devices * worker : devices * (worker + 1)] for worker in range(workers)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def open_sweep(config: DictConfig):
    """The journal of a sweep, and what starts a trial of it.

    Raises:
        UserError: a mistake in what was given, found before anything is written.
    """
    from mamba3_train.sweeping.journal import Journal, trial_name
    from mamba3_train.sweeping.search import Search
    from mamba3_train.sweeping.space import read_space
    from mamba3_train.sweeping.trial_command import TrialCommand, program
    from mamba3_train.sweeping.trial_process import TrialProcess

    settings, folder = config.sweep, Path(config.sweep.dir)
    search = Search(
        dimensions=read_space(OmegaConf.to_container(settings.space, resolve=True), config),
        sampler_name=settings.sampler,
        pruner_name=settings.pruner,
        **{key: settings[key] for key in ("trials", "seed", "startup_trials", "prune_after")},
    )
    check_given(config, [dimension.key for dimension in search.dimensions])
    check_validation(config)
    given = [override for override in given_overrides() if not key_of(override).startswith(OURS)]
    folders = [argument for path in config_dirs() for argument in ("--config-dir", path)]
    command = TrialCommand.of(config, [*folders, *given])
    check_trials(search.dimensions, command, given)
    about = {
        "name": settings.name,
        "command": vars(command),
        "keys": {dimension.key: dimension.log for dimension in search.dimensions},
        "identity": identity(config),
    }

    def start(claim, environment):
        path = folder / trial_name(claim.number)
        arguments = command.arguments(claim.values, name=f"{settings.name}-{path.name}", folder=str(path))
        return TrialProcess(claim, [*program(), *arguments], path, command.steps(claim.values), environment)

    return Journal(folder, about, search), start


def check_given(config: DictConfig, keys: list[str]) -> None:
    """Refuse what contradicts the search."""
    from mamba3_train.sweeping.trial_command import TOKENS_A_STEP

    for override in given_overrides():
        key = key_of(override)
        if key in keys:
            raise UserError(f"{override} is given, but sweep.space searches {key}: leave one of them out")
        if key == "run.dir":
            raise UserError(f"{override}: every trial has its own; sweep.dir={config.sweep.dir} is the folder of all")
    if config.sweep.equal_tokens and "trainer.max_steps" in keys and any(key in keys for key in TOKENS_A_STEP):
        raise UserError("sweep.space searches trainer.max_steps, which sweep.equal_tokens sets: make it false")
    folder = Path(config.sweep.dir)
    if config.resume.name == "never" and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"resume=never needs an empty folder, but {folder} is in use: choose another sweep.name")


def check_validation(config: DictConfig) -> None:
    """Refuse a corpus that is there already and leaves nothing to judge a trial by.

    Raises:
        UserError: it has no validation split, or none of it is read.
    """
    from mamba3_train.data.corpus_files import MANIFEST
    from mamba3_train.data.token_shards import read_manifest

    data, judged = config.data, "a sweep judges its trials by val/loss"
    if data.get("validation_sequences", 1) == 0:
        raise UserError(f"data.validation_sequences=0 leaves nothing to validate on: {judged}")
    path = Path(data.get("path") or "")
    if (path / MANIFEST).exists() and not read_manifest(path).tokens("validation"):
        raise UserError(
            f"data.path={path} has no validation split: {judged}; prepare it with validation_fraction above 0"
        )


def check_trials(dimensions, command, given: list[str]) -> None:
    """Compose the configs of some trials, so that every key, bound and choice is tried once.

    Raises:
        UserError, HydraException, OmegaConfBaseException: one that training would refuse.
    """
    from mamba3_train.sweeping.space import hydra_text

    folders = [f"hydra.searchpath={hydra_text(config_dirs())}"] if config_dirs() else []
    samples = {dimension.key: dimension.samples() for dimension in dimensions}
    for number in range(max(map(len, samples.values()))):
        values = {key: some[min(number, len(some) - 1)] for key, some in samples.items()}
        config = compose(*folders, *given, *command.overrides(values))
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def identity(config: DictConfig) -> dict:
    """What may not change between two calls of a sweep's command, by dotted key."""
    from mamba3_train.checkpoint import resume

    resolved = OmegaConf.create(OmegaConf.to_container(config, resolve=True, enum_to_str=True))
    keys = (*resume.IDENTITY, *IDENTITY)
    return {k: v for key in keys for k, v in resume.flat(OmegaConf.select(resolved, key), key).items()}


def report(journal, console) -> int:
    """Show and write what has been found so far; the exit code is 1 where every trial failed."""
    from mamba3_train.sweeping import results

    with journal.held() as records:
        results.write(journal, records)
        best = results.best(records)
        if best:
            results.plot(records, journal.about, journal.folder / "results.png")
    console.print(results.table(records, list(journal.about["keys"])))
    if best:
        console.print(f"{'picture':<9} {journal.folder / 'results.png'}", soft_wrap=True)
    console.print(f"{'results':<9} {journal.folder / 'results.json'}", soft_wrap=True)
    states = [record.state for record in records]
    for state, advice in (("running", "other workers train them"), ("stopped", "the same command goes on with them")):
        if state in states:
            console.print(f"{states.count(state)} {state}: {advice}")
    if best:
        command = results.best_command(journal.about, best)
        console.print(f"\nTrain with the values of {best.name}\n  {command}", soft_wrap=True)
    if records and all(state == "failed" for state in states):
        print(f"error: every trial failed; {records[-1].name}: {records[-1].error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    main()
