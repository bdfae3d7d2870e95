"""What the device can do: its arithmetic, its peak, its memory."""

import torch

from mamba3_train.errors import UserError

# Dense bfloat16 peak of the SXM parts, FLOP/s (vendor data sheets, without sparsity).
PEAK_BF16_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 peak of a device by its name, or None when it is not known: then there is no MFU."""
    for known, peak in PEAK_BF16_FLOPS.items():
        if device_name.startswith(known):
            return peak
    return None


def on_gpu(accelerator: str) -> bool:
    """Whether training runs on a CUDA device: asked for, or `auto` and there is one.

    Raises:
        UserError: an unknown accelerator, or a GPU asked for where there is none.
    """
    if accelerator not in ("auto", "cpu", "gpu"):
        raise UserError(f"trainer.accelerator={accelerator} must be one of auto, cpu, gpu")
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu, but torch finds no CUDA device here: use cpu or auto")
    return accelerator != "cpu" and torch.cuda.is_available()


def choose_precision(precision: str, accelerator: str) -> str:
    """Lightning's name of a precision; `auto` is bf16-mixed where the device computes in bfloat16, else 32-true.

    Raises:
        UserError: any other one: parameters stay float32, and float16's range is too small for the scan's decays.
    """
    if precision not in ("auto", "32-true", "bf16-mixed"):
        raise UserError(f"trainer.precision={precision} must be one of auto, 32-true, bf16-mixed")
    if precision != "auto":
        return precision
    half = on_gpu(accelerator) and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if half else "32-true"


def choose_compile(choice: str, accelerator: str) -> bool:
    """Whether layers are compiled: `never`, on a `gpu`, or `always`.

    Raises:
        UserError: any other choice.
    """
    if choice not in ("never", "gpu", "always"):
        raise UserError(f"trainer.compile={choice} must be one of never, gpu, always")
    return choice == "always" or (choice == "gpu" and on_gpu(accelerator))


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far, GiB: by the allocator on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
