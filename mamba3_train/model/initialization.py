"""Every parameter's first value, in one function, and the two lists that every strategy is held to."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mamba3_train.model.config import Mamba3Config, MixerConfig

# Parameters of the state-space dynamics: stored in float32 whatever the strategy, and never decayed. By name, because
# attributes on parameters do not survive sharding.
DYNAMICS = ("dt_bias", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")


def keeps_float32(name: str) -> bool:
    """Whether the parameter of this (dotted) name must be stored in float32: the dynamics and all norm weights."""
    return name.rsplit(".", 1)[-1] in DYNAMICS or _is_norm(name)


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter of this (dotted) name: the matrices, embedding included."""
    return not keeps_float32(name)


def initialize(
    model: nn.Module,
    config: Mamba3Config,
    seed: int,
    assign: Callable[[nn.Parameter, Tensor], object] = Tensor.copy_,
    shape: Callable[[nn.Parameter], torch.Size] = lambda parameter: parameter.shape,
    value: "Callable[[str, torch.Size, Mamba3Config, int], Tensor] | None" = None,
) -> None:
    """Give every parameter of a model its first value, in place.

    | parameter | value |
    |---|---|
    | in_proj, qkv_proj, fc1, lm_head | uniform ± 1 / √fan_in |
    | out_proj, fc2 | the same divided by √n_layers |
    | embedding | normal, standard deviation 0.02 |
    | dt_bias | inverse softplus of log-uniform dt in [dt_min, dt_max] |
    | B_bias, C_bias, D, norms, mimo_z | 1 |
    | mimo_x, mimo_o | 1 / rank |

    Every parameter draws from a generator of its own, keyed by seed and name, on the CPU: its value depends neither
    on the others nor on the device. Where a parameter holds only a part of its value, `shape` tells that of the whole
    and `assign` puts a whole value into it. `value`, with the arguments of `first_value`, is asked in its place.

    Raises:
        ValueError: a parameter whose name has no rule.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Whatever default device the caller has set: Lightning sets the GPU.
            with torch.device("cpu"):
                assign(parameter, (value or first_value)(name, shape(parameter), config, seed))


def first_value(name: str, shape: torch.Size, config: Mamba3Config, seed: int) -> Tensor:
    """The value with which a parameter of this (dotted) name and shape begins, on the CPU; see `initialize`."""
    return _drawn(name, shape, config, torch.Generator().manual_seed(_name_seed(seed, name)))


def _drawn(name: str, shape: torch.Size, config: Mamba3Config, generator: torch.Generator) -> Tensor:
    role = _role(name)
    if role in ("in_proj", "qkv_proj", "fc1", "lm_head"):
        return _uniform(shape, shape[1] ** -0.5, generator)
    if role in ("out_proj", "fc2"):
        return _uniform(shape, shape[1] ** -0.5 / math.sqrt(config.n_layers), generator)
    if role == "embedding":
        return torch.empty(shape).normal_(0.0, 0.02, generator=generator)
    if role == "dt_bias":
        return _dt_bias(shape, config.mixer, generator)
    if role in ("mimo_x", "mimo_o"):
        return torch.full(shape, 1 / config.mixer.rank)
    if role in ("B_bias", "C_bias", "D", "mimo_z") or _is_norm(name):
        return torch.ones(shape)
    raise ValueError(f"no initial value is defined for parameter {name}: add a rule to model/initialization.py")


def _dt_bias(shape, config: MixerConfig, generator) -> Tensor:
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    dt = torch.exp(_uniform(shape, 1.0, generator) * (high - low) / 2 + (high + low) / 2)
    dt = dt.clamp(min=config.dt_init_floor)
    return dt + torch.log(-torch.expm1(-dt))


def _uniform(shape, bound: float, generator) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _role(name: str) -> str:
    """The last part of a name that is not `weight`: `layers.3.mlp.fc2.weight` → `fc2`."""
    parts = name.split(".")
    return parts[-2] if parts[-1] == "weight" else parts[-1]


def _is_norm(name: str) -> bool:
    return _role(name) in ("norm", "mlp_norm", "B_norm", "C_norm", "norm_weight")


def _name_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
