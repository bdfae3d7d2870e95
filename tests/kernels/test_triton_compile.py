"""Every kernel of real models compiles for Hopper, fits its shared memory and shows no known fault of the assembler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from mamba3_train.kernels.launch import wrong_descriptors

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("size", ["siso_documents_norm", "mimo4_documents_norm"])
def test_kernels_compile_for_hopper(size):
    """The other sizes of `tools/compile_kernels.py` take minutes: run it by hand after a change."""
    kernels = compiled(size)
    assert len(set(kernels)) == 17
    assert sum(kernel.startswith("hopper_") for kernel in set(kernels)) == 6
    # Along whole sequences, with and without what is kept of the spans, and along spans to the last state or, in the
    # backward, without it; back along either, and from all states kept.
    assert kernels.count("hopper_state_walk_kernel") == 4
    assert kernels.count("hopper_gradient_walk_kernel") == 3
    assert kernels.count("hopper_span_sums_kernel") == 2


def test_kernels_for_a_narrow_state_compile_for_hopper():
    """Sixteen pairs are too few for a thread to hold eight neighbours."""
    stages = ("outputs", "queries_backward", "keys_backward")
    assert set(compiled("mimo4_64", "--kernels", "hopper_chunk")) == {f"hopper_chunk_{s}_kernel" for s in stages}


def compiled(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, ROOT / "tools" / "compile_kernels.py", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line)["kernel"] for line in done.stdout.splitlines()]


def test_finds_a_wrong_descriptor():
    right = """
        USHF.R.U32.HI UR4, URZ, 0x4, UR4 ;
        UIADD3 UR10, UP0, UR4, 0x40, URZ ;
        UMOV UR4, URZ ;
        UIADD3.X UR11, UR4, -0x7fffffe0, URZ, UP0, !UPT ;
    """
    wrong = """
        UIADD3 UR4, UP0, UR28, 0x40, URZ ;
        UIADD3.X UR5, UR28, -0x7fffffe0, URZ, UP0, !UPT ;
    """
    assert wrong_descriptors(right) == []
    assert len(wrong_descriptors(wrong)) == 1
