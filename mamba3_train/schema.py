"""The typed roots of configs: the keys of every command that are not a group of `conf/`, with their defaults."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


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
    """Largest norm of the whole gradient; inf: any."""
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


class Keep(Enum):
    """inputs needs the least memory and computes the most again, outputs the other way round."""

    inputs = "inputs"
    scales = "scales"
    states = "states"
    outputs = "outputs"


@dataclass
class KernelsSection:
    """Which implementation of the scan."""

    backend: str = "auto"
    keep: Keep = Keep.scales
    """What the Triton scan keeps for its backward, see docs/distributed.md: inputs, scales, states or outputs."""


@dataclass
class GuardsSection:
    """What is done about steps that go wrong: docs/guards.md."""

    max_nonfinite_in_a_row: int = 10
    """A step whose loss or gradient is not finite is skipped; after so many in a row the run ends with an error."""
    spike_threshold: float = 10.0
    """A step is skipped whose loss lies so many robust standard deviations above the median of recent ones. 0: none."""
    spike_window: int = 128
    """Losses that are recent; the first half window is not judged."""
    max_spikes_in_a_row: int = 10
    """After so many spikes, what was a spike becomes the new level, or with max_rollbacks the run is rolled back."""
    max_rollbacks: int = 0
    """How often a run may return to the newest checkpoint from before the spikes, and pass over the data since."""
    straggler_factor: float = 1.5
    """A rank is named whose own work takes so many times the others' in three rows in a row. 0: none is."""


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
    kernels: KernelsSection = field(default_factory=KernelsSection)


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
    """File for the results as JSON; null: evaluation-step-NNNNNNNN.json in the run's folder, if it is a run; its name
    also has what is asked for otherwise than by default."""


ROOTS = {
    "train": TrainConfig,
    "plan": PlanConfig,
    "sweep": SweepConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}
"""By the name of the file in conf/ that each is the root of."""
