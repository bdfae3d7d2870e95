"""What a model costs: parameters, FLOPs a token and bytes of state, from its config alone.

A multiply and an add are two FLOPs. Counted: all matrix products, the scan and the attention scores. Not counted:
norms, activations, the embedding look-up, and anything computed twice to save memory.
"""

from dataclasses import dataclass

from mamba3_train.errors import UserError
from mamba3_train.model.config import Mamba3Config, MixerConfig


@dataclass(frozen=True)
class Cost:
    """Counts of one model, by part."""

    parameters: dict[str, int]
    """embedding, mixers, attention, mlp, norms, lm_head."""
    forward_flops: dict[str, float]
    """FLOPs a token, forward: projections, scan, attention, mlp, head."""

    @property
    def total_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(self.parameters.values())

    @property
    def forward_flops_per_token(self) -> float:
        """FLOPs of a forward pass, a token."""
        return sum(self.forward_flops.values())

    @property
    def training_flops_per_token(self) -> float:
        """Forward and backward: every product has two gradients of its own size, so three times the forward."""
        return 3 * self.forward_flops_per_token


def model_cost(config: Mamba3Config, seqlen: int) -> Cost:
    """Cost of a model on rows of seqlen tokens (only attention depends on seqlen)."""
    n_mamba, n_attention = config.layers.count("M"), config.layers.count("*")
    d_model, vocab = config.d_model, config.padded_vocab_size
    mixer_matrices, mixer_vectors = _mixer_parameters(config)
    attention_matrices = _attention_parameters(config)
    mlp_matrices = 3 * d_model * config.d_mlp
    norms_per_layer = 2 if config.d_mlp else 1
    parameters = {
        "embedding": vocab * d_model,
        "mixers": n_mamba * (mixer_matrices + mixer_vectors),
        "attention": n_attention * attention_matrices,
        "mlp": config.n_layers * mlp_matrices,
        "norms": d_model * (config.n_layers * norms_per_layer + 1),
        "lm_head": 0 if config.tie_embeddings else vocab * d_model,
    }
    forward_flops = {
        "projections": 2.0 * (n_mamba * mixer_matrices + n_attention * attention_matrices),
        "scan": float(n_mamba * config.mixer.heads(d_model) * scan_flops_per_token(config.mixer)),
        "attention": n_attention * attention_flops_per_token(config, seqlen),
        "mlp": 2.0 * config.n_layers * mlp_matrices,
        "head": 2.0 * vocab * d_model,
    }
    return Cost(parameters, forward_flops)


def scan_flops_per_token(mixer: MixerConfig) -> int:
    """FLOPs of the chunked scan, a token and head: 2·c·R²·(N + P) inside a chunk of c tokens, 4·R·N·P for the states.

    c = 64 / R (at least 1), the chunk that makes MIMO cost R times SISO (paper §3.3); the whole c × c block counts.
    """
    rank, d_state, head_dim = mixer.rank, mixer.d_state, mixer.head_dim
    chunk = max(64 // rank, 1)
    return 2 * chunk * rank**2 * (d_state + head_dim) + 4 * rank * d_state * head_dim


def attention_flops_per_token(config: Mamba3Config, seqlen: int) -> float:
    """FLOPs of scores and weighted values, a token: causal, so (seqlen + 1) / 2 keys on average."""
    attention = config.attention
    return 4.0 * attention.n_heads * attention.head_dim * (seqlen + 1) / 2


def state_bytes(config: Mamba3Config, tokens: int, element_bytes: int = 2) -> int:
    """Bytes of recurrent state of one sequence after `tokens` tokens: float32 SSM states, the rest in element_bytes.

    In attention layers keys, values, and a byte a token that says whether it is seen.
    """
    mixer, attention = config.mixer, config.attention
    heads = mixer.heads(config.d_model)
    previous = mixer.rank * mixer.groups * mixer.d_state + heads * mixer.head_dim
    mamba = 4 * heads * mixer.head_dim * mixer.d_state + element_bytes * previous
    keys_values = tokens * (2 * attention.n_kv_heads * attention.head_dim * element_bytes + 1)
    return config.layers.count("M") * mamba + config.layers.count("*") * keys_values


def mlp_width_matching_siso(d_model: int, siso_width: int, mixer: MixerConfig) -> int:
    """MLP width with which a MIMO model has exactly the parameters of the SISO model of MLP width siso_width.

    ΔMLP = [2NG(R−1)·d + 2HN(R−1) + 3HRP] / (3d).

    Raises:
        UserError: no whole width matches exactly.
    """
    heads, rank, d_state = mixer.heads(d_model), mixer.rank, mixer.d_state
    if rank == 1:
        return siso_width
    biases = (mixer.B_bias + mixer.C_bias) * heads * d_state * (rank - 1)
    projections = 2 * d_state * mixer.groups * (rank - 1) * d_model
    extra = projections + biases + 3 * heads * rank * mixer.head_dim
    if extra % (3 * d_model):
        raise UserError(
            f"no MLP width gives MIMO rank {rank} at d_model {d_model} the parameters of SISO with {siso_width}: "
            f"the difference is {extra} parameters a layer, {3 * d_model} a unit of width"
        )
    return siso_width - extra // (3 * d_model)


def _mixer_parameters(config: Mamba3Config) -> tuple[int, int]:
    """Parameters of one Mamba-3 mixer: in matrices, and in everything else."""
    mixer, d_model = config.mixer, config.d_model
    heads = mixer.heads(d_model)
    inner = heads * mixer.head_dim
    matrices = d_model * sum(mixer.in_proj_widths(d_model).values()) + inner * d_model
    vectors = 2 * mixer.d_state + 2 * heads + (mixer.B_bias + mixer.C_bias) * heads * mixer.rank * mixer.d_state
    if mixer.rank > 1:
        vectors += 3 * heads * mixer.rank * mixer.head_dim
    if mixer.output_norm:
        vectors += inner
    return matrices, vectors


def _attention_parameters(config: Mamba3Config) -> int:
    attention = config.attention
    return config.d_model * attention.head_dim * 2 * (attention.n_heads + attention.n_kv_heads)
