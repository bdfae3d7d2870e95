"""Where configuration lives, its typed root, and how every command composes it and reports mistakes in it."""

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mamba3_train.command_line import one_of_many
from mamba3_train.errors import UserError, nearest
from mamba3_train.training.guard_settings import GuardsSection

PACKAGE = Path(__file__).parent
MISTAKES = (UserError, HydraException, OmegaConfBaseException)


def shipped_folder(name: str) -> Path:
    """Folder of shipped yaml: inside the package in a wheel, beside it in a clone or editable install."""
    for candidate in (PACKAGE / name, PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"the folder {name} is missing from this installation of mamba3_train: install it again")


@dataclass
class RunSection:
    """Who a run is: its name, its folder and its seed."""

    name: str = MISSING
    dir: str = "runs/${run.name}"
    seed: int = 0


@dataclass
class TrainerSection:
    """How long and on what."""

    max_steps: int = MISSING
    max_hours: float | None = None
    """Hours after its start at which this process saves and leaves with exit code 85; null: no limit but the job's."""
    stop_before_seconds: float = 120.0
    """Under Slurm, how long before the end of the job it does so."""
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: str = "auto"
    """auto: bf16-mixed where the device computes in bfloat16, else 32-true."""
    gradient_clip_norm: float = 1.0
    activation_checkpointing: str = "none"
    """none; selective: layers keep matrix products, scan and attention, and compute the rest again; full: their input
    alone."""
    compile: str = "never"
    """torch.compile by layer, where the first step takes longer and every later one less: never; gpu, on a GPU only,
    because a CPU's reference kernels take minutes to compile; always."""
    log_every_n_steps: int = 10
    log_layer_norms: bool = False
    """Rows also hold the gradient's norm of every layer, before clipping."""
    watchdog_seconds: float = 600.0
    """A process ends with an error when a step takes longer; the first may take three times as long. 0: no limit."""


@dataclass
class CheckpointSection:
    """When to save, and how much to keep."""

    every_n_steps: int = 1000
    keep_last: int = 3
    keep_every_n_steps: int = 0
    """Checkpoints of multiples of this stay for good; 0 is none."""
    asynchronous: bool = True
    """Train on while a checkpoint is written."""


@dataclass
class ValidationSection:
    """When to validate; 0 is only at the end."""

    every_n_steps: int = 1000


@dataclass
class EvaluationSection:
    """Tasks of lm-evaluation-harness while training; none by default."""

    tasks: list[str] = field(default_factory=list)
    every_n_steps: int = 5000
    limit: int = 100
    """Documents of each task: training waits."""
    include_path: str | None = None
    """Folder with tasks of one's own."""
    tokens_per_batch: int = 8192
    """In one pass of a device."""


@dataclass
class KernelsSection:
    """Which implementation of the scan."""

    backend: str = "auto"


@dataclass
class ReportSection:
    """What is shown when a run ends."""

    sample_prompt: str | None = None
    sample_tokens: int = 160
    sample_temperature: float = 0.7
    accuracy_lengths: list[int] = field(default_factory=list)
    """Lengths of the documents of a synthetic task at which accuracy is measured."""
    accuracy_documents: int = 256
    """How many of each length."""


@dataclass
class ComparisonSection:
    """What `python -m mamba3_train.compare` runs beside each other, and what it compares."""

    variants: dict[str, list[str]] = field(default_factory=dict)
    """By name, the overrides that make a variant."""
    seeds: list[int] = field(default_factory=lambda: [0])
    score: str = "val/loss"
    """Key of summary.json: a number, or numbers by length."""


class Resume(Enum):
    """auto continues from the newest whole checkpoint of run.dir; never insists on an empty folder."""

    auto = "auto"
    never = "never"


@dataclass
class TrainConfig:
    """Root of a training config; every section is a group of `conf/` or typed here, so a misspelt one fails."""

    run: RunSection = field(default_factory=RunSection)
    trainer: TrainerSection = field(default_factory=TrainerSection)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] | None = None
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    kernels: KernelsSection = field(default_factory=KernelsSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    validation: ValidationSection = field(default_factory=ValidationSection)
    guards: GuardsSection = field(default_factory=GuardsSection)
    report: ReportSection = field(default_factory=ReportSection)
    comparison: ComparisonSection = field(default_factory=ComparisonSection)
    profile: list[int] | None = None
    """First and last step, counted from 1, to record with PyTorch's profiler into the run folder."""
    resume: Resume = Resume.auto
    init_from: str | None = None
    """Begin with the weights of this run, checkpoint, export or public checkpoint; a run that goes on has its own."""


@dataclass
class PlanConfig(TrainConfig):
    """Root of a plan's config: a training config, and where it would run."""

    gpus: int = 1
    gpus_per_node: int = 8
    gpu: str = "h200"
    mfu: float | None = None
    """Share of the GPU's dense bfloat16 peak; null: what was measured on one H200."""


@dataclass
class UseConfig:
    """Which trained model, and how it is opened: what every command that uses one has."""

    run: str = MISSING
    """Folder of a run or of one of its checkpoints, an exported folder, or a public mamba_ssm checkpoint."""
    step: int | None = None
    """Which checkpoint of a run; null: the newest whole one."""
    tokenizer: str | None = None
    """A tokenizer.json, a folder with one, or a name on the hub; null: the model's own."""
    device: str = "auto"
    dtype: str = "auto"
    """Of the matrices: float32, bfloat16, float64; auto: bfloat16 on a GPU, else float32."""
    kernels: str = "auto"


@dataclass
class GenerateConfig(UseConfig):
    """Root of a config of generation."""

    prompt: str | None = None
    prompts: str | None = None
    """File with a prompt a line, JSON where its name ends in .jsonl; - is the standard input."""
    max_new_tokens: int = 200
    samples: int = 1
    """Continuations of every prompt."""
    batch_size: int = 16
    """Sequences that are continued together."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Keep the likeliest tokens up to this probability together."""
    min_p: float = 0.0
    """Keep tokens at least so likely as this share of the likeliest."""
    repetition_penalty: float = 1.0
    stop: Any = None
    """A text or a list of them; \\n is a new line."""
    seed: int = 0
    cuda_graph: bool = False
    """Record the step of decoding once and replay it, on a GPU."""
    state_dtype: str = "auto"
    """What Mamba-3 states are stored in between tokens: auto is float32 or wider, bfloat16 half of it."""
    output: str | None = None
    """A file for the results, a JSON object a line."""


@dataclass
class ExportConfig:
    """Root of a config of an export."""

    run: str = MISSING
    step: int | None = None
    to: str = "hf"
    output: str = MISSING
    dtype: str = "float32"
    tokenizer: str | None = None
    shard_gib: float = 4.6
    """Most that one file of weights holds."""


@dataclass
class SweepSection:
    """What a sweep searches, and how."""

    name: str = "${run.name}-sweep"
    dir: str = "runs/${sweep.name}"
    space: dict[str, Any] = field(default_factory=dict)
    """Keys as in the config; at the end of each {log_uniform: [low, high]}, {uniform: …}, {int: …}, {log_int: …} or
    {choice: [a, b]}; 0.5x is half of what the config has. Grids take points: N of an interval, or step: N of an int."""
    sampler: str = "random"
    """random; grid; tpe."""
    trials: int | None = None
    """null: every point of a grid, else 16. It may be raised later."""
    seed: int = 0
    """The same seed gives the same trials."""
    pruner: str = "none"
    """none; median: worse than half of the trials before it at as many validations; successive_halving."""
    prune_after: int = 1
    """Validations that no trial is pruned before."""
    startup_trials: int = 5
    """Complete trials before median prunes, and before tpe draws otherwise than at random."""
    equal_tokens: bool = True
    """Where batch or sequence length are searched, other numbers of steps give every trial the same tokens."""


@dataclass
class SweepConfig(TrainConfig):
    """Root of a sweep's config: a training config, what to search, and how many trials run at a time here."""

    sweep: SweepSection = field(default_factory=SweepSection)
    workers: int = 1
    """Trials that train at a time on this machine, each on trainer.devices GPUs."""
    show: str | None = None
    """Folder of a sweep to look at."""


@dataclass
class EvaluateConfig(UseConfig):
    """Root of a config of evaluation."""

    tasks: list[str] = field(default_factory=lambda: ["perplexity"])
    """perplexity; paper, the paper's seven tasks; any task of lm-evaluation-harness."""
    devices: int = 1
    corpus: str | None = None
    """Prepared corpus for the perplexity; null: the one the run was trained on."""
    split: str = "validation"
    rows: int | None = None
    """Most rows of each source of it; null: all."""
    sequence_length: int | None = None
    """Tokens in a row, and most of them in a pass of a task; null: those of training, or 2048."""
    tokens_per_batch: int = 8192
    """In one pass of a device."""
    limit: int | None = None
    """Documents of each task; null: all."""
    num_fewshot: int | None = None
    """Examples before each question; null: the task's own number."""
    include_path: str | None = None
    """Folder with tasks of one's own, in the yaml of lm-evaluation-harness."""
    output: str | None = None
    """File for the results as JSON; null: evaluation-step-NNNNNNNN.json in the run's folder, if it is a run."""


def register_configs() -> None:
    """Store the root schemas, and every file of recipes/ as group `recipe`, in Hydra's ConfigStore."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="plan_schema", node=PlanConfig)
    store.store(name="generate_schema", node=GenerateConfig)
    store.store(name="export_schema", node=ExportConfig)
    store.store(name="sweep_schema", node=SweepConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    folder = shipped_folder("recipes")
    for path in sorted(folder.rglob("*.yaml")):
        group = "/".join(["recipe", *path.relative_to(folder).parts[:-1]])
        store.store(group=group, name=path.stem, node=OmegaConf.load(path), package="_global_")


def compose(*overrides: str, config_name: str = "train") -> DictConfig:
    """Compose a config as a command would, for tests and other commands: `compose("+recipe=quickstart")`."""
    register_configs()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(shipped_folder("conf"))):
        config = hydra.compose(config_name, list(overrides))
    check_keys(config)
    return config


def verbatim(argument: str, keys: Sequence[str]) -> str:
    """`key=text` so quoted that Hydra takes any text for what it is, if the key is one of those; else unchanged."""
    key, equals, text = argument.partition("=")
    if key not in keys or not equals or text == "null":
        return argument
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text)
    return f"{key}='{text}'"


def command(
    config_name: str, texts: Sequence[str] = ()
) -> Callable[[Callable[[DictConfig], int | None]], Callable[[], None]]:
    """Make a command line out of `run(config)`: Hydra's key=value, `--help`, `--cfg job`, multirun.

    A `UserError`, or a mistake in the config itself, is printed as one line; the exit code is then 2. Otherwise it is
    what `run` returns, None meaning 0.

    Args:
        config_name: the file in conf/.
        texts: keys whose values are taken as they are, whatever Hydra's grammar would make of them.
    """

    def decorate(run: Callable[[DictConfig], int | None]) -> Callable[[], None]:
        @functools.wraps(run)
        def task(config: DictConfig) -> None:
            # Mistakes are reported here, because Hydra adds a line of its own to any exception that leaves a job.
            try:
                with one_of_many(config):
                    check_keys(config)
                    code = run(config)
            except MISTAKES as error:
                _fail(explain(error, config_name))
            except SystemExit as stop:
                code = stop.code  # a process that started others has ended well, which must not end other jobs
            if code:
                sys.exit(code)

        @functools.wraps(run)
        def cli() -> None:
            register_configs()
            sys.argv[1:] = [verbatim(argument, texts) for argument in sys.argv[1:]]
            # Hydra would otherwise print a traceback of its own and leave with code 1.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            # Read when torch loads. OpenMP threads that spin for long take the cores from loader workers and from
            # whatever else runs: on two cores beside one busy process, training was ten times slower than with this.
            os.environ.setdefault("GOMP_SPINCOUNT", "10000")
            GlobalHydra.instance().clear()
            main = hydra.main(version_base="1.3", config_path=str(shipped_folder("conf")), config_name=config_name)
            try:
                main(task)()
            except MISTAKES as error:
                _fail(explain(error, config_name))

        return cli

    return decorate


def check_keys(config: DictConfig | ListConfig, path: str = "") -> None:
    """Raise UserError for a key that the `_target_` of its section does not take, with the nearest ones it does."""
    items = config.items_ex(resolve=False) if isinstance(config, DictConfig) else enumerate(config)
    for key, value in items:
        if isinstance(value, DictConfig | ListConfig) and not value._is_none():
            check_keys(value, f"{path}{key}.")
    target = config.get("_target_") if isinstance(config, DictConfig) else None
    if target is None:
        return
    try:
        parameters = inspect.signature(hydra.utils.get_object(target)).parameters
    except ValueError:  # a builtin without a signature
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for key in config:
        if not key.startswith("_") and key not in parameters:
            raise UserError(f"unknown key {path}{key}. {nearest(key, list(parameters))}")


def explain(error: Exception, config_name: str = "train") -> str:
    """One line for a mistake in the command line or a yaml file, with the nearest valid names."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for link in chain:
        if isinstance(link, UserError):
            return link.line
        if isinstance(link, MissingConfigException) and link.missing_cfg_file:
            group, _, name = link.missing_cfg_file.rpartition("/")
            return f"there is no {group or 'config'} named {name!r}. {nearest(name, link.options or [])}"
    lines = [line for link in chain for line in str(link).splitlines()]
    missing = re.search(r"Missing mandatory value: (\S+)", " ".join(lines))
    if missing:
        return f"{missing.group(1)} is not set: give {missing.group(1)}=VALUE, or a recipe (+recipe=NAME) that sets it"
    unknown = re.search(r"Could not override '([^'@]+)", lines[0])
    if unknown:
        key = unknown.group(1)
        return f"unknown key {key}. {nearest(key.rpartition('.')[2], _valid_keys(key, config_name))}"
    key = re.search(r"full_key: (\S+)", " ".join(lines))
    reason = next((line for line in lines[1:] if "full_key" not in line), lines[0]) if len(chain) > 1 else lines[0]
    return f"{key.group(1)}: {reason.strip()}" if key else " ".join(line.strip() for line in lines)


def _valid_keys(wrong: str, config_name: str) -> list[str]:
    """Names that could stand in place of a wrong key: those of its section, composed without the wrong override."""
    parent = wrong.rpartition(".")[0]
    overrides = [
        o for o in sys.argv[1:] if "=" in o and not o.startswith("-") and o.split("=")[0].lstrip("+~") != wrong
    ]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(shipped_folder("conf"))):
            node = hydra.compose(config_name, overrides)
    except (HydraException, OmegaConfBaseException):
        return []
    keys = list(OmegaConf.select(node, parent) or {}) if parent else list(node)
    if not parent:
        keys += [folder.name for folder in shipped_folder("conf").iterdir() if folder.is_dir()]
    return [str(key) for key in keys if not str(key).startswith("_")]


def _fail(message: str) -> None:
    # One line, however many processes find the same mistake.
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
