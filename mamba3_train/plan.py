"""`python -m mamba3_train.plan +recipe=NAME gpus=N`: what a run would need and take, in seconds and without a GPU."""

import sys

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from mamba3_train.config import command
from mamba3_train.errors import UserError
from mamba3_train.model.config import Mamba3Config
from mamba3_train.model.cost import Cost, model_cost, state_bytes
from mamba3_train.model.memory import SHARDED, Memory, step_memory

GIB = 2**30
# Name → memory that programs can use in GiB, dense bfloat16 peak in FLOP/s (vendor data sheets).
GPUS = {
    "a100-40gb": (39.4, 312e12),
    "a100-80gb": (79.2, 312e12),
    "h100": (79.1, 989e12),
    "h200": (139.8, 989e12),
    "b200": (178.4, 2250e12),
}
HOPPER = ("h100", "h200")  # which have scan kernels of their own
# What the caching allocator and the CUDA context take beside the tensors, at least.
MARGIN = 0.06
# Measured on one H200 with the 1.5B recipes, docs/performance.md: share of the peak by the mixer's rank.
MEASURED_MFU = {1: 0.482, 4: 0.369}


@command("plan")
def main(config: DictConfig) -> None:
    """Print the plan."""
    from hydra.utils import instantiate

    model: Mamba3Config = instantiate(config.model)
    check(config)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    cost = model_cost(model, config.data.sequence_length)
    console.print(counts(config, model, cost))
    console.print(memory_table(config, model, cost))
    console.print(speed(config, model, cost))
    console.print(f"\nSubmit it to Slurm with\n  {submit_command(config)}", soft_wrap=True)
    console.print(f"\nRun it with\n  {launch_command(config)}", soft_wrap=True)


def check(config: DictConfig) -> None:
    """Raise UserError for GPUs that are unknown, uncountable, or too many for the global batch."""
    for key in ("data.sequence_length", "data.global_batch_size", "trainer.max_steps"):
        if (value := OmegaConf.select(config, key)) < 1:
            raise UserError(f"{key}={value} must be at least 1")
    if config.mfu is not None and not 0 < config.mfu <= 1:
        raise UserError(f"mfu={config.mfu} must be a share of the peak, above 0 and at most 1")
    if config.gpu not in GPUS:
        raise UserError(f"gpu={config.gpu} is not known: choose one of {', '.join(GPUS)}")
    for key in ("gpus", "gpus_per_node"):
        if config[key] < 1:
            raise UserError(f"{key}={config[key]} must be at least 1")
    if config.gpus > config.gpus_per_node and config.gpus % config.gpus_per_node:
        raise UserError(f"gpus={config.gpus} is not a multiple of gpus_per_node={config.gpus_per_node}")
    rows = config.data.global_batch_size
    if rows % config.gpus:
        raise UserError(f"data.global_batch_size={rows} is not a multiple of gpus={config.gpus}")


def micro_batch_size(config: DictConfig, gpus: int | None = None) -> int:
    """The micro-batch asked for, or the next smaller one that divides a GPU's rows."""
    rows = config.data.global_batch_size // (gpus or config.gpus)
    return next(size for size in range(min(config.data.micro_batch_size, rows), 0, -1) if rows % size == 0)


def counts(config: DictConfig, model: Mamba3Config, cost: Cost) -> Table:
    """Parameters and FLOPs by part, and the size of what is stored."""
    table = _table("Model", "", "parameters", "FLOPs a token, forward")
    flops = {"embedding": None, "mixers": None, "norms": None, "lm_head": None, **cost.forward_flops}
    for part in dict.fromkeys([*cost.parameters, *flops]):
        parameters, forward = cost.parameters.get(part), flops.get(part)
        if parameters or forward:
            table.add_row(part, f"{parameters:,}" if parameters else "", f"{forward:,.0f}" if forward else "")
    table.add_row("all", f"{cost.total_parameters:,}", f"{cost.forward_flops_per_token:,.0f}")
    length = config.data.sequence_length
    table.caption = (
        f"training: 3 × forward = {cost.training_flops_per_token / 1e9:,.2f} GFLOP a token at {length:,} tokens a row; "
        f"a checkpoint: {12 * cost.total_parameters / GIB:,.1f} GiB; recurrent state of a sequence: "
        f"{state_bytes(model, length) / 2**20:,.1f} MiB"
    )
    return table


def memory_table(config: DictConfig, model: Mamba3Config, cost: Cost) -> Table:
    """Peak memory of a GPU by strategy, and whether it fits."""
    limit, _ = GPUS[config.gpu]
    columns = ("parameters", "moments", "gradients", "casts", "activations", "head", "backward")
    title = f"GiB on each of {config.gpus} {config.gpu.upper()}, micro-batches of {micro_batch_size(config)} rows"
    table = _table(title, "strategy", *columns, "peak", "")
    for strategy in SHARDED:
        if (strategy == "single") != (config.gpus == 1):
            continue
        memory = memory_of(config, model, cost, strategy)
        fits = "fits" if memory.peak / GIB <= limit * (1 - MARGIN) else "does not fit"
        parts = (f"{getattr(memory, column) / GIB:,.1f}" for column in columns)
        table.add_row(strategy, *parts, f"{memory.peak / GIB:,.1f}", fits)
    others = ["trainer.activation_checkpointing=selective", "trainer.activation_checkpointing=full"]
    if config.gpu in HOPPER and "M" in model.layers:
        others += ["kernels.keep=states", "kernels.keep=outputs"]
    otherwise = []
    for setting in others:
        changed = OmegaConf.merge(config, OmegaConf.from_dotlist([setting]))
        if changed != config:
            saved = memory_of(changed, model, cost, "single").activations / GIB
            otherwise.append(f"activations {saved:,.1f} with {setting}")
    table.caption = (
        f"of {limit:,.0f} GiB, layers compiled; peak: beside what layers keep the larger of head, where the forward "
        f"pass ends, and backward, of one layer; gradients then only of earlier micro-batches, or place kept for them; "
        f"{'; '.join(otherwise)}"
    )
    return table


def memory_of(config: DictConfig, model: Mamba3Config, cost: Cost, strategy: str) -> Memory:
    """Memory of a step under a strategy on the GPUs asked for."""
    shards = min(config.gpus, config.gpus_per_node) if strategy == "hsdp" else config.gpus
    rows = micro_batch_size(config)
    length = config.data.get("segment_length") or config.data.sequence_length
    return step_memory(
        model,
        cost,
        rows=rows,
        length=length,
        strategy=strategy,
        shards=shards,
        recompute=config.trainer.activation_checkpointing,
        passes=config.data.global_batch_size // config.gpus // rows * -(-config.data.sequence_length // length),
        on_hopper=config.gpu in HOPPER,
        keep=config.kernels.keep.name,
        layers_together=config.strategy.get("layers_together", 1),
    )


def speed(config: DictConfig, model: Mamba3Config, cost: Cost) -> Table:
    """Steps, tokens a second, days."""
    _, peak = GPUS[config.gpu]
    mfu, source = config.mfu, "mfu="
    if mfu is None:
        rank = model.mixer.rank
        mfu = MEASURED_MFU.get(rank, MEASURED_MFU[4] if rank > 1 else MEASURED_MFU[1])
        source = "measured on one H200 with the 1.5B recipe"
    per_step = config.data.global_batch_size * config.data.sequence_length
    tokens = per_step * config.trainer.max_steps
    rate = config.gpus * peak * mfu / cost.training_flops_per_token
    rows = config.data.global_batch_size // config.gpus
    table = _table("Run", "", "")
    table.add_row("steps × tokens a step", f"{config.trainer.max_steps:,} × {per_step:,} = {tokens / 1e9:,.2f}B tokens")
    table.add_row(
        "rows a GPU and step",
        f"{rows:,} in {rows // micro_batch_size(config):,} micro-batches of {micro_batch_size(config)}",
    )
    table.add_row("MFU", f"{mfu:.1%} ({source}; losses to communication not counted)")
    table.add_row("tokens/s", f"{rate:,.0f}, {rate / config.gpus:,.0f} a GPU")
    table.add_row("time", f"{tokens / rate / 3600:,.1f} hours = {tokens / rate / 86400:,.2f} days")
    return table


def submit_command(config: DictConfig) -> str:
    """The command that submits the run to Slurm, which fills in strategy, devices and micro-batch by itself."""
    nodes, devices = max(1, config.gpus // config.gpus_per_node), min(config.gpus, config.gpus_per_node)
    flags = f"--nodes {nodes} --gpus-per-node {devices} --time 24:00:00 --dry-run"
    return " ".join(["python slurm/submit.py", *_given(), flags])


def launch_command(config: DictConfig) -> str:
    """The command that starts the run on these GPUs."""
    given = _given()
    strategy = any(a.startswith("strategy=") for a in given)
    nodes, devices = max(1, config.gpus // config.gpus_per_node), min(config.gpus, config.gpus_per_node)
    extra = [] if strategy or config.gpus == 1 else ["strategy=fsdp" if nodes == 1 else "strategy=hsdp"]
    extra += [f"trainer.devices={devices}"] if config.gpus > 1 else []
    if micro_batch_size(config) != config.data.micro_batch_size:
        given = [a for a in given if not a.startswith("data.micro_batch_size=")]
        extra += [f"data.micro_batch_size={micro_batch_size(config)}"]
    extra += [f"trainer.num_nodes={nodes}"] if nodes > 1 else []
    start = "python -m mamba3_train"
    if nodes > 1:
        start = f"torchrun --nnodes={nodes} --nproc-per-node={devices} --rdzv-endpoint=HOST:29500 -m mamba3_train"
    return " ".join([start, *given, *extra])


def _given() -> list[str]:
    """What was given of the run itself."""
    return [a for a in sys.argv[1:] if a.partition("=")[0] not in ("gpus", "gpus_per_node", "gpu", "mfu")]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or len(columns) == 2 else "right")
    return table


if __name__ == "__main__":
    main()
