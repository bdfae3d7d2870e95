"""What a state stored in bfloat16 costs: error of a long decode against float64, by tokens and by head, on a CPU.

    python tools/measure_state_rounding.py               # SISO, 4,096 tokens: a minute
    python tools/measure_state_rounding.py --rank 4 --decay 0.1

Six heads with steps dt of about 0.001 to 0.1; −A is `decay` times the heavy tail of normal logits.
"""

import argparse
from itertools import pairwise

import torch
import torch.nn.functional as F

from mamba3_train.kernels import StepState, mamba3_scan, mamba3_step

HEADS, HEAD_DIM, D_STATE, PAIRS = 6, 8, 32, 8
PER_TOKEN = ("x", "B", "C", "dt", "A", "trap", "angles")


def layer_inputs(tokens, rank, decay, rotation):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    step = torch.logspace(-3, -1, HEADS, dtype=torch.float64)
    logits = normal(1, tokens, HEADS)
    shared, ranks = (1, tokens, rank, 1, D_STATE), (HEADS, rank, HEAD_DIM)
    inputs = {
        "x": normal(1, tokens, HEADS, HEAD_DIM),
        "B": normal(*shared),
        "C": normal(*shared),
        "dt": F.softplus(0.5 * normal(1, tokens, HEADS) + step.expm1().log()),
        "A": -decay * torch.where(logits >= 0, 1 + logits, 1 / (1 - logits)),
        "trap": normal(1, tokens, HEADS),
        "B_bias": torch.ones(HEADS, rank, D_STATE, dtype=torch.float64),
        "C_bias": torch.ones(HEADS, rank, D_STATE, dtype=torch.float64),
    }
    if rotation:
        inputs["angles"] = normal(1, tokens, PAIRS)
    if rank > 1:
        inputs |= {name: torch.ones(*ranks, dtype=torch.float64) / rank for name in ("mimo_x", "mimo_o")}
    return inputs


def decode(inputs, rank, ssm_dtype):
    """All tokens one after the other, in float32 but for what is stored between them."""
    inputs = {name: tensor.float() for name, tensor in inputs.items()}
    shapes = (1, HEADS, HEAD_DIM, D_STATE), (1, rank, 1, D_STATE)
    state = StepState.zeros(*shapes, ssm_dtype=ssm_dtype, dtype=torch.float32)
    outputs = []
    for t in range(inputs["x"].shape[1]):
        token = {name: v[:, t : t + 1] if name in PER_TOKEN else v for name, v in inputs.items()}
        outputs.append(mamba3_step(**token, state=state, backend="recurrent"))
    return torch.cat(outputs, dim=1).double()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--decay", type=float, default=1.0)
    parser.add_argument("--no-rotation", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    inputs = layer_inputs(arguments.tokens, arguments.rank, arguments.decay, not arguments.no_rotation)
    expected = mamba3_scan(**inputs)
    edges = [0, *(n for n in (64, 512, 2048) if n < arguments.tokens), arguments.tokens]
    for dtype in (torch.float32, torch.bfloat16):
        wrong = decode(inputs, arguments.rank, dtype) - expected
        for first, last in pairwise(edges):
            e, y = wrong[:, first:last], expected[:, first:last]
            by_head = [(e[:, :, head].norm() / y[:, :, head].norm()).item() for head in range(HEADS)]
            print(f"{dtype}, tokens {first + 1}-{last}: {100 * (e.norm() / y.norm()).item():.4f} %, by head", end=" ")
            print(*(f"{100 * error:.4f}" for error in by_head))


if __name__ == "__main__":
    main()
