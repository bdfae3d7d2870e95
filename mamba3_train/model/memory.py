"""What a training step keeps in a GPU's memory, from the model's config alone, in bytes.

Counted for bf16-mixed: float32 parameters, gradients and AdamW moments; the bfloat16 copies of matrices that autocast
makes; what every layer saves for its backward pass; a block of the head's logits. The peak is where the forward pass
ends, all activations there and no gradients yet, or where the backward pass ends.
"""

from dataclasses import dataclass

from mamba3_train.errors import UserError
from mamba3_train.kernels import linear_cross_entropy
from mamba3_train.model.config import Mamba3Config
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
    moments: float
    casts: float
    """Matrices in bfloat16, kept from forward to backward."""
    activations: float
    head: float
    """A block of logits and the head's gradient, which is there when the forward pass ends."""
    accumulates: bool
    """Whether there are gradients of earlier micro-batches in the forward pass."""

    @property
    def peak(self) -> float:
        """The larger of the two: the end of the (last) forward pass, and the end of the backward pass."""
        forward = self.casts + self.activations + self.head + (self.gradients if self.accumulates else 0)
        return self.parameters + self.moments + max(forward, self.gradients)


def step_memory(
    config: Mamba3Config,
    cost: Cost,
    *,
    tokens: int,
    strategy: str,
    shards: int,
    recompute: str = "none",
    micro_batches: int = 1,
) -> Memory:
    """Memory of a step.

    Args:
        cost: of the same config, for its parameters.
        tokens: of one micro-batch.
        strategy: a name of SHARDED.
        shards: devices that share one copy of the model.
        recompute: `none`, `selective` or `full`.
        micro_batches: of one step on one GPU.

    Raises:
        UserError: an unknown strategy.
    """
    if strategy not in SHARDED:
        raise UserError(f"strategy={strategy} is not one that a plan knows: {', '.join(SHARDED)}")
    total = cost.total_parameters
    part = {
        name: total / shards if name in SHARDED[strategy] else total for name in ("parameters", "gradients", "moments")
    }
    parameters = 4 * part["parameters"]
    embedding, layer = cost.parameters["embedding"] + cost.parameters["lm_head"], _layer_parameters(config, cost)
    if "parameters" in SHARDED[strategy] and shards > 1:
        # The root stays gathered, and two layers at a time, the next on its way while one computes.
        parameters += 4 * (embedding + 2 * layer)
    if strategy.startswith("deepspeed") and shards > 1:
        parameters += 4 * total / shards
    gathered = embedding if "parameters" in SHARDED[strategy] else total
    return Memory(
        parameters=parameters,
        gradients=4 * part["gradients"] + (4 * (embedding + layer) if "gradients" in SHARDED[strategy] else 0),
        moments=8 * part["moments"],
        casts=2 * gathered,
        activations=tokens * _saved_per_token(config, recompute),
        head=2 * min(tokens, linear_cross_entropy.ROWS) * config.padded_vocab_size + 4 * embedding,
        accumulates=micro_batches > 1,
    )


def _layer_parameters(config: Mamba3Config, cost: Cost) -> float:
    outside = cost.parameters["embedding"] + cost.parameters["lm_head"]
    return (cost.total_parameters - outside) / config.n_layers


def _saved_per_token(config: Mamba3Config, recompute: str) -> float:
    """Bytes a token that all layers keep for the backward pass, and the head."""
    residual = 4 * config.d_model
    layers = 0.0
    widest = 0.0
    for kind in config.layers:
        whole = _mamba_saves(config, recompute) if kind == "M" else _attention_saves(config, recompute)
        mlp = 2 * (2 * config.d_mlp + (config.d_mlp if recompute == "none" else 0)) if config.d_mlp else 0
        # Around each half: the residual stream before it, and its norm in bfloat16.
        around = (2 if config.d_mlp else 1) * (residual + 2 * config.d_model if recompute == "none" else 0)
        everything = whole + mlp + around
        widest = max(widest, everything)
        layers += everything if recompute == "none" else residual + (everything if recompute == "selective" else 0)
    # Recomputing everything needs one layer's worth besides.
    return layers + (widest if recompute == "full" else 0) + residual + 2 * config.d_model


def _mamba_saves(config: Mamba3Config, recompute: str) -> float:
    mixer = config.mixer
    heads = mixer.heads(config.d_model)
    inner, shared = heads * mixer.head_dim, mixer.rank * mixer.groups * mixer.d_state
    inputs = 2 * (2 * inner + 2 * shared) + 4 * 4 * heads  # x, z, B, C; dt, A, trap and what they came from
    scan = 3 * 4 * heads + 2 * heads * mixer.rotated_pairs + 2 * inner  # scales, phases, result
    kept_y = 2 * inner if mixer.rank == 1 and not mixer.output_norm else 0
    normed = 2 * 2 * shared if recompute == "none" else 2 * config.d_model
    return inputs + scan + kept_y + normed


def _attention_saves(config: Mamba3Config, recompute: str) -> float:
    attention = config.attention
    heads = 2 * attention.n_heads + 2 * attention.n_kv_heads  # q, result, k, v
    return 2 * heads * attention.head_dim + 4 * attention.n_heads + (0 if recompute == "none" else 2 * config.d_model)
