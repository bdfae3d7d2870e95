"""Every dimension of a model, with the checks that belong to them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mamba3_train.errors import UserError

A_ACTIVATIONS = ("heavy_tail", "softplus")
ROTATIONS = ("data_dependent", "data_independent", "none")


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """The Mamba-3 mixer. Rank 1 is SISO, more is MIMO; the last five fields are the paper's ablations."""

    d_state: int = 128
    """N, the width of the state of a head (of B and C)."""
    expand: int = 2
    """Inner width as a multiple of d_model."""
    head_dim: int = 64
    """P, the width of x in a head."""
    rank: int = 1
    """R, how many inputs and outputs share a state."""
    groups: int = 1
    """G, how many B and C there are; neighbouring heads share one."""
    rope_fraction: float = 0.5
    """Share of the state that rotates: 0.5 or 1."""
    a_activation: str = "heavy_tail"
    """−A = heavy_tail(a) or softplus(a)."""
    a_floor: float = 1e-4
    """Smallest −A."""
    dt_min: float = 1e-3
    dt_max: float = 0.1
    """Range of the step sizes at initialisation, log-uniform."""
    dt_init_floor: float = 1e-4
    output_norm: bool = False
    """RMS norm of each head before the gate; the paper uses it in hybrids."""
    trapezoid: bool = True
    """False fixes λ = 1: the exponential-Euler rule of Mamba-2."""
    rotation: str = "data_dependent"
    """`data_independent` is standard rotary embedding on B and C; `none` keeps the state real."""
    B_bias: bool = True
    C_bias: bool = True

    def __post_init__(self):
        for key in ("d_state", "expand", "head_dim", "rank", "groups"):
            _at_least_one(f"mixer.{key}", getattr(self, key))
        _one_of("mixer.a_activation", self.a_activation, A_ACTIVATIONS)
        _one_of("mixer.rotation", self.rotation, ROTATIONS)
        _one_of("mixer.rope_fraction", self.rope_fraction, (0.5, 1.0))
        if self.rotated_pairs == 0 and self.rotation != "none":
            raise UserError(
                f"mixer.d_state={self.d_state} is too small to rotate: use at least 4, or mixer.rotation=none"
            )
        if not 0 < self.dt_init_floor <= self.dt_min <= self.dt_max:
            raise UserError(
                "mixer.dt_init_floor, dt_min and dt_max must be positive and in this order, "
                f"got {self.dt_init_floor}, {self.dt_min}, {self.dt_max}"
            )

    @property
    def rotated_pairs(self) -> int:
        """S, the number of pairs of the state that rotate."""
        return 0 if self.rotation == "none" else int(self.d_state * self.rope_fraction) // 2

    def heads(self, d_model: int) -> int:
        """H, the number of heads at this model width."""
        return self.expand * d_model // self.head_dim

    def in_proj_widths(self, d_model: int) -> dict[str, int]:
        """Columns of the input projection at this model width, in order."""
        heads = self.heads(d_model)
        inner, shared = heads * self.head_dim, self.rank * self.groups * self.d_state
        return {
            "z": inner,
            "x": inner,
            "B": shared,
            "C": shared,
            "dt": heads,
            "A": heads,
            "trap": heads if self.trapezoid else 0,
            "angles": self.rotated_pairs if self.rotation == "data_dependent" else 0,
        }


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal grouped-query attention, without positions unless `rotary`."""

    n_heads: int = 16
    n_kv_heads: int = 4
    head_dim: int = 64
    rotary: bool = False
    rope_theta: float = 10_000.0

    def __post_init__(self):
        for key in ("n_heads", "n_kv_heads", "head_dim"):
            _at_least_one(f"attention.{key}", getattr(self, key))
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"attention.n_heads={self.n_heads} is not a multiple of attention.n_kv_heads={self.n_kv_heads}: "
                "every key-value head serves the same number of heads"
            )
        if self.rotary and self.head_dim % 2:
            raise UserError(f"attention.head_dim={self.head_dim} is odd: rotary positions need an even width")


@dataclass(frozen=True, kw_only=True)
class Mamba3Config:
    """A language model: layers of mixer and MLP by a pattern of `M` (Mamba-3) and `*` (attention)."""

    vocab_size: int
    d_model: int
    n_layers: int
    d_mlp: int
    """Inner width of the SwiGLU MLP after every mixer; 0 for none."""
    layer_pattern: str = "M"
    """Repeated to n_layers: `M` is pure Mamba-3, `MMMMM*` five to one, `*` the Transformer."""
    mixer: MixerConfig = field(default_factory=MixerConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    tie_embeddings: bool = True
    vocab_multiple: int = 8
    """The vocabulary is padded to a multiple of this."""
    norm_eps: float = 1e-5

    def __post_init__(self):
        for key in ("vocab_size", "d_model", "n_layers", "vocab_multiple"):
            _at_least_one(f"model.{key}", getattr(self, key))
        if self.d_mlp < 0:
            raise UserError(f"model.d_mlp={self.d_mlp} must be 0 (no MLP) or more")
        if not self.layer_pattern or set(self.layer_pattern) - set("M*"):
            raise UserError(
                f"model.layer_pattern={self.layer_pattern!r} must be made of M (Mamba-3) and * (attention), e.g. MMMMM*"
            )
        mixer = self.mixer
        if "M" in self.layers and mixer.expand * self.d_model % mixer.head_dim:
            raise UserError(
                f"model.d_model={self.d_model} times model.mixer.expand={mixer.expand} is not a multiple of "
                f"model.mixer.head_dim={mixer.head_dim}: choose sizes that divide"
            )
        if "M" in self.layers and mixer.heads(self.d_model) % mixer.groups:
            raise UserError(
                f"model.mixer.groups={mixer.groups} does not divide the {mixer.heads(self.d_model)} heads "
                "(model.mixer.expand · model.d_model / model.mixer.head_dim): choose a divisor"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Mamba3Config":
        """The config that `to_dict` gave, or the section `model` of a run's config.yaml; nothing in it is executed.

        Raises:
            UserError: a field is missing, unknown or of the wrong kind.
        """
        parts = {"mixer": MixerConfig, "attention": AttentionConfig}
        given = {key: value for key, value in values.items() if not (key in parts and value is None)}
        made = {key: _from_dict(part, given[key], f"{key}.") for key, part in parts.items() if key in given}
        return _from_dict(cls, given | made)

    def to_dict(self) -> dict[str, Any]:
        """All fields, the mixer's and the attention's in dictionaries of their own: what JSON can hold."""
        return asdict(self)

    @property
    def layers(self) -> str:
        """The pattern written out, one character a layer."""
        return (self.layer_pattern * self.n_layers)[: self.n_layers]

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding, and width of the logits."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def _from_dict(part: type, values: Mapping[str, Any], prefix: str = ""):
    """A dataclass of plain values; `_target_`, which Hydra would call, is left out."""
    if not isinstance(values, Mapping):
        raise UserError(f"the model's config has {prefix.rstrip('.') or 'itself'} = {values!r} instead of its fields")
    values = {key: value for key, value in values.items() if key != "_target_"}
    unknown = sorted(values.keys() - {field.name for field in fields(part)})
    if unknown:
        raise UserError(
            f"the model's config has {', '.join(prefix + key for key in unknown)}, which this version does not know"
        )
    try:
        return part(**values)
    except TypeError as error:
        raise UserError(f"the model's config cannot be used: {error}") from error


def _at_least_one(key, value):
    if value < 1:
        raise UserError(f"{key}={value} must be at least 1")


def _one_of(key, value, choices):
    if value not in choices:
        raise UserError(f"{key}={value} must be one of {', '.join(map(str, choices))}")
