"""Find the fastest warps and registers of each chunk kernel on this GPU, and write them to the launch table.

    python tools/tune_kernels.py                              # the 1.5B layer's regime: print what is fastest
    python tools/tune_kernels.py --write                      # and write mamba3_train/kernels/launch_table.json
    python tools/tune_kernels.py --gear portable --dtype float32 --d-state 64

Each kernel is timed inside whole forward and backward passes of rank 1 and 4, by the profiler, with the other kernels
as the table has them. A configuration that does not compile, does not fit, or gives other results than the table's is
left out, and one is only taken for at least 1 % of the kernel's time over all ranks. Tiles and heads of a pass decide
memory as well as time: they stay as they are.
"""

import argparse
import json
import sys

NAMES = {  # of each gear's kernels in the launch table: their names begin so
    "portable": {
        "states": "chunk_states", "outputs": "chunk_outputs", "outputs_backward": "chunk_outputs",
        "queries": "chunk_queries", "keys": "chunk_keys",
    },
    "hopper": {
        "states": ("hopper_state_walk", "hopper_gradient_walk"), "outputs": "hopper_chunk_outputs",
        "queries": "hopper_chunk_queries", "keys": "hopper_chunk_keys",
    },
}  # fmt: skip
CANDIDATES = ((4, None), (4, 168), (4, 128), (8, None), (8, 128))
GAIN, SAME = 0.01, 5e-3  # least share of a kernel's time to gain; most that results may differ, RMS over RMS


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gear", nargs="+", default=[*NAMES], choices=[*NAMES])
    parser.add_argument("--rank", type=int, nargs="+", default=[1, 4], choices=(1, 2, 4, 8))
    parser.add_argument("--head-dim", type=int, default=64, choices=(16, 32, 64, 128))
    parser.add_argument("--d-state", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--tokens", type=int, default=16384, help="in 8 rows")
    parser.add_argument("--write", action="store_true", help="write what is fastest to the launch table")
    return parser.parse_args()


def choose_fastest(times: dict, current) -> object:
    """The configuration with the least milliseconds, the current one unless another gains GAIN of its time."""
    best = min(times, key=times.get)
    return best if times[best] < (1 - GAIN) * times.get(current, float("inf")) else current


class Bench:
    """Whole passes of one gear and rank, with any row of the table in the place of its own."""

    def __init__(self, gear: str, rank: int, arguments):
        import torch
        from benchmark_kernels import layer_inputs

        from mamba3_train.kernels.inputs import Inputs

        dtype = getattr(torch, arguments.dtype)
        made = layer_inputs(8, arguments.tokens // 8, rank, arguments.head_dim, arguments.d_state, dtype)
        given = {name: tensor.detach() for name, tensor in made.items()}
        self.inputs = Inputs(*(given.get(name) for name in Inputs._fields)).readable()
        self.gear, self.row = gear, row_of(gear, arguments)
        self.d_out = torch.randn_like(self.inputs.x)
        self.expected = self.results(None)

    def results(self, row: dict | None) -> list:
        """Outputs and all gradients with this row of the table; None: the table's own."""
        from mamba3_train.kernels import launch_table, sizes, triton_scan

        kept = launch_table.find, sizes.runs_on_hopper
        find = kept[0] if row is None else lambda gear, size: row if gear == self.row else kept[0](gear, size)
        launch_table.find = find
        if self.gear == "portable":
            sizes.runs_on_hopper = lambda *_: False
        try:
            out, last, kept_for = triton_scan.scan_forward(self.inputs, 1e-5, keep="scales")
            grads = triton_scan.scan_backward(self.inputs, 1e-5, self.d_out, last, kept_for)
        finally:
            launch_table.find, sizes.runs_on_hopper = kept
        return [out, *(grad for grad in grads if grad is not None)]

    def milliseconds(self, kernel: str, row: dict) -> float:
        """One kernel's time on the device in a pass, the mean of five; raises RuntimeError for other results."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        for actual, expected in zip(self.results(row), self.expected, strict=True):
            error = (actual.double() - expected.double()).norm() / expected.double().norm()
            if not error <= SAME:
                raise RuntimeError(f"gives other results ({error:.1e})")
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(5):
                self.results(row)
            torch.cuda.synchronize()
        name = NAMES[self.gear][kernel]
        return sum(e.device_time_total for e in profiled.key_averages() if e.key.startswith(name)) / 5e3


def tune(gear: str, arguments) -> dict:
    """The gear's row of the table with each kernel's fastest configuration; prints every time."""
    from mamba3_train.kernels import launch_table

    size = arguments.head_dim * arguments.d_state
    row = launch_table.find(row_of(gear, arguments), size)
    row = row | {"kernels": dict(row["kernels"])}  # the table's own stays as it is
    benches = [Bench(gear, rank, arguments) for rank in arguments.rank]
    for kernel in NAMES[gear]:
        current = row["kernels"].get(kernel, (4, None))
        times = {}
        for candidate in dict.fromkeys((current, *CANDIDATES)):
            tried = row | {"kernels": row["kernels"] | {kernel: candidate}}
            try:
                each = [bench.milliseconds(kernel, tried) for bench in benches]
            except Exception as reason:  # whatever a compiler or a launch may raise: this candidate is out
                print(f"{gear:9}{kernel:18}{candidate!s:12} left out: {str(reason)[:80]}")
                continue
            times[candidate] = sum(each)
            print(f"{gear:9}{kernel:18}{candidate!s:12}", *(f"{ms:8.3f}" for ms in each), "ms", flush=True)
        row["kernels"][kernel] = choose_fastest(times, current)
        print(f"{gear:9}{kernel:18}{row['kernels'][kernel]!s:12} taken")
    return row


def row_of(gear: str, arguments) -> str:
    """The table's name for the gear at this dtype."""
    return "hopper" if gear == "hopper" else "single" if arguments.dtype == "float32" else "half"


def write(table: dict, gear: str, size: int, kernels: dict) -> None:
    """Put a row's kernels into the table, those at the compiler's choice left out."""
    largest = next(largest for largest in table[gear] if size <= int(largest))
    table[gear][largest]["kernels"] = {k: list(v) for k, v in kernels.items() if v != (4, None)}


def main() -> int:
    arguments = parse()
    import torch

    from mamba3_train.kernels import launch_table

    if not torch.cuda.is_available():
        print("tune_kernels: needs a GPU, and this machine has none", file=sys.stderr)
        return 2
    table = json.loads(launch_table.TABLE.read_text())
    for gear in arguments.gear:
        if gear == "hopper" and torch.cuda.get_device_capability() != (9, 0):
            print("hopper: not on this GPU")
            continue
        row = tune(gear, arguments)
        write(table, row_of(gear, arguments), arguments.head_dim * arguments.d_state, row["kernels"])
    text = json.dumps(table, indent=1)
    print(text)
    if arguments.write:
        launch_table.TABLE.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
