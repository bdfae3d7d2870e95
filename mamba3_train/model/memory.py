"""What a training step keeps in a GPU's memory, from the model's config alone, in bytes.

Counted for bf16-mixed and compiled layers: float32 parameters, gradients and AdamW moments; the bfloat16 copies of
matrices that autocast makes; what every layer saves for its backward pass; what the head with its loss, and one layer's
backward pass, need for themselves. AdamW is fused and clipping works in place: the optimizer's step needs no more.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from mamba3_train.errors import UserError
from mamba3_train.kernels import launch_table, linear_cross_entropy
from mamba3_train.model.config import Mamba3Config, MixerConfig
from mamba3_train.model.cost import Cost

SHARDED = {
    "single": (), "ddp": (),
    "deepspeed_zero1": ("moments",), "deepspeed_zero2": ("moments", "gradients"),
    "deepspeed_zero3": ("moments", "gradients", "parameters"),
    "fsdp": ("moments", "gradients", "parameters"), "hsdp": ("moments", "gradients", "parameters"),
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part."""

    parameters: float
    """Float32, with DeepSpeed's second copy of them, and whatever shards are gathered at a time."""
    gradients: float
    """Where the backward pass ends."""
    moments: float
    earlier_gradients: float
    """Of earlier passes of the step, there during the last one, or the place that is kept for them."""
    casts: float
    """The layers' matrices in bfloat16, kept from forward to backward."""
    activations: float
    """What the layers save."""
    head: float
    """In the forward pass: hidden states, logits, the weight in bfloat16, and all their gradients."""
    backward: float
    """In a layer's backward pass: the head's gradient, what is computed again, and the scan's workspace."""

    @property
    def peak(self) -> float:
        """The largest of three: in the head, in the last layer's backward pass, where the backward pass ends.

        Of a step's last pass; until the last layer's backward pass nothing that layers saved is freed.
        """
        between = self.earlier_gradients + self.casts + self.activations + max(self.head, self.backward)
        return self.parameters + self.moments + max(between, self.gradients)


class Saved(NamedTuple):
    """Bytes a token that one layer keeps for its backward pass, besides its input."""

    expensive: float
    """Results of matrix products, scan and attention: all that `selective` keeps."""
    cheap: float
    """Everything else."""


def step_memory(
    config: Mamba3Config,
    cost: Cost,
    *,
    rows: int,
    length: int,
    strategy: str,
    shards: int,
    recompute: str = "none",
    passes: int = 1,
    on_hopper: bool = True,
    keep: str = "scales",
    layers_together: int = 1,
) -> Memory:
    """Memory of a step.

    Args:
        cost: of the same config, for its parameters.
        rows: of one micro-batch.
        length: tokens of each row in one pass, a segment's where rows are cut into segments.
        strategy: a name of SHARDED.
        shards: devices that share one copy of the model.
        recompute: `none`, `selective` or `full`.
        passes: forward and backward passes of one step on one GPU: micro-batches, times segments.
        on_hopper: whether the GPU is of the kind that `kernels.hopper` is for (H100, H200).
        keep: what the scan keeps for its backward, see `mamba3_scan`.
        layers_together: that FSDP2 gathers at once.

    Raises:
        UserError: an unknown strategy.
    """
    if strategy not in SHARDED:
        raise UserError(f"strategy={strategy} is not one that a plan knows: {', '.join(SHARDED)}")
    tokens, layer = rows * length, _layer_parameters(config, cost)
    saved, again = _layers_save(config, length, recompute, on_hopper, keep)
    # Layers that recompute cast again, too, and stage 3 gathers matrices in bfloat16 each time.
    keeps_casts = recompute == "none" and strategy != "deepspeed_zero3"
    backward = 4 * config.padded_vocab_size * config.d_model
    backward += tokens * (4 * config.d_model + again + scan_workspace(config, length, on_hopper, keep))
    return Memory(
        **_states(config, cost, strategy, shards, passes, layers_together),
        casts=2 * layer * config.n_layers if keeps_casts else 0,
        activations=tokens * saved,
        head=_head(config, tokens),
        backward=backward + (0 if recompute == "none" else 2 * layer),
    )


def _states(
    config: Mamba3Config, cost: Cost, strategy: str, shards: int, passes: int, layers_together: int
) -> dict[str, float]:
    """What there is of every parameter, in shards or whole: the first parts of `Memory`."""
    total, layer = cost.total_parameters, _layer_parameters(config, cost)
    embedding = total - config.n_layers * layer
    unit = layer * (layers_together if strategy in ("fsdp", "hsdp") else 1)
    part = {
        name: total / shards if name in SHARDED[strategy] else total for name in ("parameters", "gradients", "moments")
    }
    parameters = 4 * part["parameters"]
    if "parameters" in SHARDED[strategy] and shards > 1:
        # The root stays gathered, and two units of layers at a time, the next on its way while one computes.
        parameters += 4 * (embedding + 2 * unit)
    if strategy.startswith("deepspeed") and shards > 1:
        parameters += 4 * total / shards
    gradients = 4 * part["gradients"] + (4 * (embedding + unit) if "gradients" in SHARDED[strategy] else 0)
    if strategy in ("fsdp", "hsdp") and passes > 1:
        gradients = 4 * total  # FSDP2 keeps them whole until the last pass, when they are exchanged
    # DDP's gradients are views of buckets, which stay when the gradients are forgotten.
    have_place = passes > 1 or (strategy == "ddp" and shards > 1)
    return {
        "parameters": parameters,
        "gradients": gradients,
        "moments": 8 * part["moments"],
        "earlier_gradients": gradients if have_place else 0,
    }


def _layer_parameters(config: Mamba3Config, cost: Cost) -> float:
    outside = cost.parameters["embedding"] + cost.parameters["lm_head"]
    return (cost.total_parameters - outside) / config.n_layers


def _head(config: Mamba3Config, tokens: int) -> float:
    """`linear_cross_entropy` in its forward pass, where it computes its gradients as well."""
    vocabulary, rows = config.padded_vocab_size, linear_cross_entropy.ROWS
    weight = vocabulary * config.d_model
    # A block of logits is there until the next one is, or, from the second on, beside its share, in float32, of the
    # weight's gradient.
    share = 4 * weight if tokens > rows else 0
    logits = max(2 * vocabulary * min(tokens, 2 * rows), 2 * vocabulary * min(tokens, rows) + share)
    # The residual stream and its norm in float32, that in bfloat16, and its gradient.
    hidden = tokens * (4 + 4 + 2 + 2) * config.d_model
    return 2 * weight + 4 * weight + logits + hidden


def _layers_save(
    config: Mamba3Config, length: int, recompute: str, on_hopper: bool, keep: str
) -> tuple[float, float]:  # fmt: skip
    """Bytes a token that all layers keep for the backward pass, and that one of them computes again in it, at most."""
    by_kind = {kind: layer_saves(config, kind, length, on_hopper, keep) for kind in set(config.layers)}
    kept = {
        kind: {"none": sum(saved), "selective": saved.expensive, "full": 0}[recompute]
        for kind, saved in by_kind.items()
    }
    # Recomputed attention does not go by blocks: it makes a mask of documents.
    mask = 2 * length if recompute != "none" else 0
    again = max(sum(saved) - kept[kind] + (mask if kind == "*" else 0) for kind, saved in by_kind.items())
    return sum(4 * config.d_model + kept[kind] for kind in config.layers), again


def layer_saves(
    config: Mamba3Config, kind: str, length: int, on_hopper: bool = True, keep: str = "scales"
) -> Saved:  # fmt: skip
    """What a compiled layer saves, as PyTorch's partitioner chooses it, but for the norms' one number a row."""
    expensive, cheap = _mamba_saves(config, length, on_hopper, keep) if kind == "M" else _attention_saves(config)
    cheap += 2 * config.d_model  # the norm's result
    if config.d_mlp:
        expensive += 2 * config.d_model + 2 * 2 * config.d_mlp  # results of the mixer and of fc1
        cheap += 2 * config.d_model + 2 * config.d_mlp  # of the norm between them, and of the gate
    return Saved(expensive, cheap)


def _mamba_saves(config: Mamba3Config, length: int, on_hopper: bool, keep: str) -> Saved:
    mixer = config.mixer
    heads, shared = mixer.heads(config.d_model), mixer.rank * mixer.groups * mixer.d_state
    inner = heads * mixer.head_dim
    projected = 2 * sum(mixer.in_proj_widths(config.d_model).values())  # x, z, trap and angles are read in it
    kept = scan_keeps(config, length, on_hopper, keep)
    # Cheap: B and C behind their norm; dt and A, in float32.
    return Saved(projected + 2 * inner + kept, 2 * 2 * shared + 2 * 4 * heads)


def scan_keeps(config: Mamba3Config, length: int, on_hopper: bool, keep: str) -> float:
    """Bytes a token that the Triton scan keeps for its backward besides its inputs."""
    mixer = config.mixer
    heads = mixer.heads(config.d_model)
    state = heads * mixer.head_dim * mixer.d_state
    if keep == "inputs":
        return 0
    scales = 3 * 4 * heads + 2 * heads * mixer.rotated_pairs
    if not (on_hopper and serves_on_hopper(mixer)):
        return scales + (2 * heads * mixer.head_dim if scan_keeps_y(mixer) else 0)
    chunks = math.ceil(length / scan_passes(mixer)[0])
    if keep in ("states", "outputs"):
        y = 2 * mixer.rank * heads * mixer.head_dim if keep == "outputs" and not mixer.output_norm else 0
        return scales + y + 2 * state * (chunks + 1) / length
    return scales + 4 * state * math.ceil(chunks / launch_table.chunks_of_span(mixer.rank)) / length


def _attention_saves(config: Mamba3Config) -> Saved:
    attention = config.attention
    heads = 2 * attention.n_heads + 2 * attention.n_kv_heads  # q, result, k, v
    rotated = 2 * (2 * attention.n_heads + attention.n_kv_heads) * attention.head_dim if attention.rotary else 0
    # Cheap: q and k turned and, because they lie by head then, the result by token.
    return Saved(2 * heads * attention.head_dim + 4 * attention.n_heads, rotated)


def scan_workspace(config: Mamba3Config, length: int, on_hopper: bool = True, keep: str = "scales") -> float:
    """Bytes a token of the Triton scan's backward: gradients of its inputs, what one pass of heads needs, and what the
    forward did not keep.
    """
    if "M" not in config.layers:
        return 0
    mixer = config.mixer
    heads, rank, width = mixer.heads(config.d_model), mixer.rank, mixer.head_dim
    chunk, wanted = scan_passes(mixer)
    # States before a chunk, which on Hopper become their own gradients, otherwise those beside them; the gradients of
    # the rows of C or B, of y and of the phases, where all states are kept of two passes.
    on_hopper = on_hopper and serves_on_hopper(mixer)
    states = 1 if on_hopper else 2
    phases = (2 if on_hopper and keep in ("states", "outputs") else 1) * mixer.rotated_pairs
    a_head = states * 2 * width * mixer.d_state / chunk + 2 * rank * (mixer.d_state + width) + 4 * phases
    inputs = 2 * 2 * heads * width + 2 * 4 * rank * mixer.groups * mixer.d_state  # of x and z, B and C
    # The biases' by blocks of tokens, as `kernels.head_sum.tile`, the rank weights' by chunks.
    a_block, rank_weights = (16, 0) if rank == 1 else (32, 3 * width / chunk)
    again = scan_keeps(config, length, on_hopper, "scales") if keep == "inputs" else 0
    weights = 4 * heads * rank * (2 * mixer.d_state / a_block + rank_weights)
    return launch_table.heads_in_pass(heads, mixer.groups, wanted) * a_head + inputs + weights + again


def scan_passes(mixer: MixerConfig) -> tuple[int, int]:
    """Tokens of a chunk and heads of a backward pass at 16 bit; of the largest sizes served, for models beyond them."""
    row = launch_table.find("half", min(mixer.d_state * mixer.head_dim, 256 * 128))
    return row["rows"] // mixer.rank, launch_table.heads_of_pass(row, mixer.rank)


def serves_on_hopper(mixer: MixerConfig) -> bool:
    """Whether there are kernels for Hopper for this mixer in 16 bit: see `kernels.launch.runs_on_hopper`."""
    pairs, rest = mixer.rotated_pairs, mixer.d_state - 2 * mixer.rotated_pairs
    return mixer.head_dim == 64 and mixer.d_state <= 128 and pairs in (16, 32, 64) and rest in (0, 16, 32, 64)


def scan_keeps_y(mixer: MixerConfig) -> bool:
    """Whether the portable scan keeps y, as `kernels.sizes.Sizes` in 16 bit."""
    return mixer.rank == 1 and not mixer.output_norm
