"""Random inputs of the scan, for the tests of its definition and of its kernels."""

import torch

from mamba3_train.kernels import ScanState


def scan_inputs(
    batch=2, seqlen=40, heads=4, head_dim=8, d_state=16, rank=2, groups=2, pairs=4, dtype=torch.float64, norm=True
):
    """Every tensor argument of `mamba3_scan` by name, drawn at random; mimo tensors only for rank > 1."""

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype)

    inputs = {
        "x": normal(batch, seqlen, heads, head_dim),
        "B": normal(batch, seqlen, rank, groups, d_state),
        "C": normal(batch, seqlen, rank, groups, d_state),
        "dt": 0.1 * normal(batch, seqlen, heads).exp(),
        "A": -normal(batch, seqlen, heads).exp(),
        "trap": normal(batch, seqlen, heads),
        "angles": normal(batch, seqlen, pairs),
        "B_bias": 1 + 0.1 * normal(heads, rank, d_state),
        "C_bias": 1 + 0.1 * normal(heads, rank, d_state),
        "D": normal(heads),
        "z": normal(batch, seqlen, heads, head_dim),
    }
    if rank > 1:
        inputs |= {name: normal(heads, rank, head_dim) for name in ("mimo_x", "mimo_z", "mimo_o")}
    if norm:
        inputs["norm_weight"] = normal(heads, head_dim)
    return inputs


def scan_state(inputs) -> ScanState:
    """A random initial state that fits the inputs."""
    batch, _, heads, head_dim = inputs["x"].shape
    rank, groups, d_state = inputs["B"].shape[2:]
    like = {"dtype": inputs["x"].dtype}
    return ScanState(
        torch.randn(batch, heads, head_dim, d_state, **like),
        torch.randn(batch, rank, groups, d_state, **like),
        torch.randn(batch, heads, head_dim, **like),
    )


PER_TOKEN = ("x", "B", "C", "dt", "A", "trap", "angles", "z")


def cut(inputs, start, stop):
    """The inputs of tokens start … stop − 1."""
    return {
        name: t[:, start:stop] if name in PER_TOKEN and t is not None and t.dim() > 2 else t
        for name, t in inputs.items()
    }


def random_documents(batch, seqlen):
    """Document ids with boundaries at random places."""
    return (torch.rand(batch, seqlen) < 0.1).cumsum(1)
