"""Time decoding on one GPU: the recurrence of one layer, token by token, and a whole model's step in a CUDA graph.

    python tools/benchmark_decode.py                                # the 1.5B layer, SISO and MIMO, batch 1 to 512
    python tools/benchmark_decode.py --batch 128 --state bfloat16 --no-model
    python tools/benchmark_decode.py --batch 128 --sweep --no-model # both kernels in several launch configurations
    python tools/benchmark_decode.py --output result.json

Times are replays of a CUDA graph, the L2 cache flushed before each. Bytes are the least a step moves: the state read
and written once, and what one token brings and leaves. The floor is those bytes at the machine's measured copy
bandwidth. Each layer's step up to batch 128 is checked against the recurrence in float64 before it is timed. The model
is the recipe's with random weights, in bfloat16.
"""

import argparse
import datetime
import json
import subprocess
import sys

HEADS, HEAD_DIM, D_STATE, PAIRS = 64, 64, 128, 32
STATES = ("bfloat16", "float32")
RECIPES = ("1.5b_siso", "1.5b_mimo")
LIMIT = 1e-2  # of the error of one step in bfloat16, root mean square over root mean square


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 16, 128, 512], help="sequences that decode together"
    )
    parser.add_argument("--rank", type=int, nargs="+", default=[1, 4], choices=(1, 2, 4, 8))
    parser.add_argument("--state", nargs="+", default=STATES, choices=STATES, help="what the state is stored in")
    parser.add_argument("--recipe", nargs="+", default=RECIPES, help="models whose whole step is timed")
    parser.add_argument("--no-model", action="store_true", help="the layers only")
    parser.add_argument(
        "--sweep", action="store_true", help="every layer by elements and by products, in several tiles"
    )
    parser.add_argument("--output", help="write everything as JSON")
    return parser.parse_args()


def layer_inputs(batch, rank):
    """One token as the 1.5B mixer makes it: bfloat16 slices of a projection, float32 steps, decays and weights."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, device="cuda").to(dtype)

    inner, half = HEADS * HEAD_DIM, torch.bfloat16
    z, x, trap, angles = normal(batch, 1, 2 * inner + HEADS + PAIRS, dtype=half).split([inner, inner, HEADS, PAIRS], -1)
    shared = (batch, 1, rank, 1, D_STATE)
    log_step = torch.empty(HEADS, device="cuda").uniform_(-6.9, -2.3)
    decay = normal(batch, 1, HEADS)
    inputs = {
        "x": x.unflatten(-1, (HEADS, HEAD_DIM)),
        "B": normal(*shared, dtype=half),
        "C": normal(*shared, dtype=half),
        "dt": F.softplus(0.5 * normal(batch, 1, HEADS) + log_step.exp().expm1().log()),
        "A": -torch.where(decay >= 0, 1 + decay, 1 / (1 - decay)),
        "trap": trap,
        "angles": angles,
        "B_bias": torch.ones(HEADS, rank, D_STATE, device="cuda"),
        "C_bias": torch.ones(HEADS, rank, D_STATE, device="cuda"),
        "D": torch.ones(HEADS, device="cuda"),
        "z": z.unflatten(-1, (HEADS, HEAD_DIM)),
    }
    if rank > 1:
        inputs |= {name: normal(HEADS, rank, HEAD_DIM) / rank for name in ("mimo_x", "mimo_z", "mimo_o")}
    return inputs


def least_bytes(batch, heads, head_dim, d_state, pairs, rank, state_bytes):
    """The state in and out; x, x before, z and B, B before, C in, x, B and the output out; steps, decays, angles."""
    state = 2 * heads * head_dim * d_state * state_bytes
    token = 2 * (5 * heads * head_dim + 4 * rank * d_state + pairs) + 10 * heads
    return batch * (state + token)


def median_ms(function):
    """Median time on the device, the L2 cache flushed before each call."""
    import triton

    return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")


def graph_of(function):
    """The function's kernels recorded once, to be replayed without work on the host."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def check_step(inputs, state):
    """Relative errors of output and state after one step, against float64."""
    from mamba3_train.kernels import ScanState, StepState, mamba3_scan, mamba3_step

    wide = {name: tensor.double() for name, tensor in inputs.items()}
    before = ScanState(*(tensor.double() for tensor in state))
    expected, after = mamba3_scan(**wide, initial_state=before, return_state=True)
    copy = StepState.of(state)
    y = mamba3_step(**inputs, state=copy, backend="triton")
    pairs = {"y": (y, expected), "state": (copy.ssm, after.ssm)}
    errors = {name: ((a.double() - e).norm() / e.norm()).item() for name, (a, e) in pairs.items()}
    if not all(error <= LIMIT for error in errors.values()):
        sys.exit(f"wrong: relative errors {errors} against float64, more than {LIMIT}")
    return errors


def time_layer(batch, rank, state_dtype, gb_per_s):
    import torch

    from mamba3_train.kernels import StepState, mamba3_step

    inputs = layer_inputs(batch, rank)
    shapes = (batch, HEADS, HEAD_DIM, D_STATE), (batch, rank, 1, D_STATE)
    state = StepState.zeros(*shapes, ssm_dtype=getattr(torch, state_dtype), dtype=torch.bfloat16, device="cuda")
    for tensor in state:
        tensor.normal_()
    row = {"rank": rank, "batch": batch, "state": state_dtype}
    if batch <= 128:
        row |= {f"error_{name}": error for name, error in check_step(inputs, state).items()}
    graph = graph_of(lambda: mamba3_step(**inputs, state=state, backend="triton"))
    row["ms"] = median_ms(graph.replay)
    row["eager_ms"] = median_ms(lambda: mamba3_step(**inputs, state=state, backend="triton"))
    moved = least_bytes(batch, HEADS, HEAD_DIM, D_STATE, PAIRS, rank, state.ssm.element_size())
    row["gb_per_s"] = moved / row["ms"] / 1e6
    row["floor_ms"] = moved / gb_per_s / 1e6
    row["share_of_floor"] = row["floor_ms"] / row["ms"]
    return row


SWEPT = ("PRODUCTS", "ROWS", "REGISTERS", "AHEAD")  # of kernels/decode_step.py; PRODUCTS 9: every rank by elements
CONFIGURATIONS = [
    (9, 64, None, 0), (1, 64, None, 0), (1, 64, None, 2), (1, 64, None, 4), (1, 64, 96, 0), (1, 64, 96, 4),
    (1, 64, 80, 0), (1, 32, None, 0),
]  # fmt: skip


def sweep(batch, rank, state_dtype, gb_per_s):
    """The layer in each configuration, fastest first; one that is wrong is named and left out."""
    from mamba3_train.kernels import decode_step

    shipped = [getattr(decode_step, name) for name in SWEPT]
    rows = []
    for configuration in CONFIGURATIONS:
        named = dict(zip(SWEPT, configuration, strict=True))
        for name, value in named.items():
            setattr(decode_step, name, value)
        try:
            rows.append(named | time_layer(batch, rank, state_dtype, gb_per_s))
        except SystemExit as wrong:
            print(f"rank {rank}, {named}: {wrong}")
            continue
        print(f"rank {rank}, state {state_dtype}, {named}: {rows[-1]['ms']:.4f} ms", flush=True)
    for name, value in zip(SWEPT, shipped, strict=True):
        setattr(decode_step, name, value)
    return sorted(rows, key=lambda row: row["ms"])


def time_model(recipe, batch, state_dtype, gb_per_s):
    """One token of every sequence through the whole model, embedding to the likeliest token, as one CUDA graph."""
    import torch
    from hydra.utils import instantiate

    from mamba3_train.config import compose
    from mamba3_train.model import Mamba3LM, initialize
    from mamba3_train.model.initialization import keeps_float32

    config = instantiate(compose(f"+recipe={recipe}").model)
    if "*" in config.layers:
        sys.exit(
            f"recipe {recipe} has layers of attention, whose step depends on the length: name a pure Mamba-3 model"
        )
    with torch.device("cuda"):
        model = Mamba3LM(config, kernels="triton")
    initialize(model, config, seed=0)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if keeps_float32(name) else parameter.data.bfloat16()
    state = tuple(layer.mixer.zero_state(batch, getattr(torch, state_dtype)) for layer in model.layers)
    token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")

    def step():
        logits, _ = model(token, state=state, return_state=True)
        token.copy_(logits[:, :, : config.vocab_size].argmax(-1))

    row = {"recipe": recipe, "batch": batch, "state": state_dtype, "ms": median_ms(graph_of(step).replay)}
    row["tokens_per_second"] = batch / row["ms"] * 1e3
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    mixer = config.mixer
    sizes = mixer.heads(config.d_model), mixer.head_dim, mixer.d_state, mixer.rotated_pairs, mixer.rank
    moved = len(model.layers) * least_bytes(batch, *sizes, state[0].ssm.element_size())
    row["floor_ms"] = (weights + moved) / gb_per_s / 1e6
    row["share_of_floor"] = row["floor_ms"] / row["ms"]
    return row


def copy_bandwidth():
    """Bytes read and written a second when a large tensor is copied, in GB/s."""
    import torch

    source = torch.zeros(2**31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * 2**31 / median_ms(lambda: target.copy_(source)) / 1e6


def show(rows):
    """A table of rows with the same keys; where one lacks a figure of the first, nothing stands."""
    print(*(f"{name:>17}" for name in rows[0]))
    for row in rows:
        values = (row.get(name, "") for name in rows[0])
        print(*(f"{value:17.4f}" if isinstance(value, float) else f"{value!s:>17}" for value in values))


def main():
    """Check, time, print, and with --output write."""
    arguments = parse()
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmark_decode needs a CUDA device, and there is none here")
    import triton

    gb_per_s = copy_bandwidth()
    with torch.no_grad():
        choices = [(r, b, s) for r in arguments.rank for s in arguments.state for b in arguments.batch]
        layers = [time_layer(batch, rank, state, gb_per_s) for rank, batch, state in choices]
        swept = [row for r, b, s in choices if arguments.sweep for row in sweep(b, r, s, gb_per_s)]
        models = []
        for recipe in () if arguments.no_model else arguments.recipe:
            models += [time_model(recipe, b, s, gb_per_s) for s in arguments.state for b in arguments.batch]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    result = {
        "command": " ".join(["python tools/benchmark_decode.py", *sys.argv[1:]]), "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "layer": [HEADS, HEAD_DIM, D_STATE, PAIRS], "copy_gb_per_s": gb_per_s,
        "layers": layers, "sweep": swept, "models": models,
    }  # fmt: skip
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(result, file, indent=1)
    print(f"{result['gpu']}: copy {gb_per_s:.0f} GB/s")
    for rows in filter(None, (layers, swept, models)):
        show(rows)


if __name__ == "__main__":
    main()
