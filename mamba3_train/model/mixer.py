"""The Mamba-3 mixer: project → norm of B and C → scan → project (paper §3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3_train.kernels import ScanState, StepState, mamba3_scan, mamba3_step
from mamba3_train.model.config import MixerConfig


class Mamba3Mixer(nn.Module):
    """Sequence mixing by a complex state with exponential-trapezoidal steps, SISO (rank 1) or MIMO.

    Args:
        d_model: width of input and output.
        config: the mixer's dimensions.
        norm_eps: epsilon of all norms in it.
        kernels, keep: backend of the scan and what it keeps for its backward, see `mamba3_scan`.
    """

    def __init__(self, d_model: int, config: MixerConfig, *, norm_eps: float = 1e-5, kernels: str = "reference",
                 keep: str = "scales"):  # fmt: skip
        super().__init__()
        self.d_model, self.config, self.norm_eps = d_model, config, norm_eps
        self.kernels, self.keep = kernels, keep
        self.heads = config.heads(d_model)
        heads, rank, d_state, head_dim = self.heads, config.rank, config.d_state, config.head_dim
        self.in_proj = nn.Linear(d_model, sum(config.in_proj_widths(d_model).values()), bias=False)
        self.B_norm = nn.RMSNorm(d_state, eps=norm_eps)
        self.C_norm = nn.RMSNorm(d_state, eps=norm_eps)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.B_bias = _parameter(config.B_bias, heads, rank, d_state)
        self.C_bias = _parameter(config.C_bias, heads, rank, d_state)
        self.mimo_x = _parameter(rank > 1, heads, rank, head_dim)
        self.mimo_z = _parameter(rank > 1, heads, rank, head_dim)
        self.mimo_o = _parameter(rank > 1, heads, rank, head_dim)
        self.norm_weight = _parameter(config.output_norm, heads, head_dim)
        self.out_proj = nn.Linear(heads * head_dim, d_model, bias=False)

    def forward(
        self,
        u: Tensor,
        document_ids: Tensor | None = None,
        state: ScanState | StepState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, ScanState | StepState]:
        """(batch, seqlen, d_model) → the same shape; document_ids, state and return_state as in `mamba3_scan`.

        A `StepState` takes one token, changes, and is returned itself, see `mamba3_step`.
        """
        inputs, options = self._scan_arguments(u)
        if isinstance(state, StepState):
            y, new_state = mamba3_step(*inputs, state=state, **options), state
        else:
            options |= {"document_ids": document_ids, "initial_state": state, "return_state": return_state}
            scanned = mamba3_scan(*inputs, keep=self.keep, **options)
            y, new_state = scanned if return_state else (scanned, None)
        out = self.out_proj(y.flatten(-2))
        return (out, new_state) if return_state else out

    def zero_state(self, batch: int, ssm_dtype: torch.dtype = torch.float32) -> StepState:
        """The state before the first token of each of `batch` sequences."""
        config, weight = self.config, self.in_proj.weight
        ssm = (batch, self.heads, config.head_dim, config.d_state)
        B = (batch, config.rank, config.groups, config.d_state)
        return StepState.zeros(ssm, B, ssm_dtype=ssm_dtype, dtype=weight.dtype, device=weight.device)

    def _scan_arguments(self, u: Tensor) -> tuple[tuple[Tensor | None, ...], dict]:
        """What the scan and the step take, by position and by name."""
        config = self.config
        widths = list(config.in_proj_widths(self.d_model).values())
        z, x, B, C, dt, A, trap, angles = self.in_proj(u).split(widths, dim=-1)
        z, x = (v.unflatten(-1, (self.heads, config.head_dim)) for v in (z, x))
        B, C = (v.unflatten(-1, (config.rank, config.groups, config.d_state)) for v in (B, C))
        # Step sizes and decays stay in the parameters' own precision whatever autocast does to the projection.
        precise = self.dt_bias.dtype
        inputs = (
            x,
            self.B_norm(B).to(x.dtype),
            self.C_norm(C).to(x.dtype),
            F.softplus(dt.to(precise) + self.dt_bias),
            self._decay_rate(A.to(precise)),
            trap if config.trapezoid else None,
            self._angles(angles),
            self.B_bias,
            self.C_bias,
            self.D,
            z,
            self.mimo_x,
            self.mimo_z,
            self.mimo_o,
        )
        return inputs, {"norm_weight": self.norm_weight, "norm_eps": self.norm_eps, "backend": self.kernels}

    def _decay_rate(self, a: Tensor) -> Tensor:
        """A < 0. heavy_tail(a) is 1 + a for a ≥ 0 and 1 / (1 − a) below: positive, with a gradient that dies slowly."""
        if self.config.a_activation == "softplus":
            rate = F.softplus(a)
        else:
            rate = torch.where(a >= 0, 1 + a, 1 / (1 - a.clamp(max=0)))
        return -rate.clamp(min=self.config.a_floor)

    def _angles(self, angles: Tensor) -> Tensor | None:
        """Logits of the rotation, or the fixed frequencies of rotary embedding (θ_i = 10000^(−i/S)), or None."""
        if self.config.rotation == "none":
            return None
        if self.config.rotation == "data_dependent":
            return angles
        pairs = self.config.rotated_pairs
        return 10_000.0 ** (-torch.arange(pairs, device=angles.device, dtype=torch.float32) / pairs)


def _parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(shape)) if wanted else None
