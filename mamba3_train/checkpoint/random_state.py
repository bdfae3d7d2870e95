"""The random number generators of a process as tensors by name, one set a rank, and back."""

import random

import numpy as np
import torch
from torch import Tensor


def random_tensors(rank: int) -> dict[str, Tensor]:
    """`random.<rank>.<generator>`: PyTorch's on the CPU and the current GPU, Python's, NumPy's; copies."""
    _, words, gauss = random.getstate()
    state = np.random.get_state(legacy=False)
    tensors = {
        "torch": torch.get_rng_state(),
        # Words of 32 bits and what is left over of a pair of normal numbers: float64 holds either exactly.
        "python": torch.tensor([*words, gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor(
            [*state["state"]["key"], state["state"]["pos"], state["has_gauss"], state["gauss"]], dtype=torch.float64
        ),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return {f"random.{rank:05d}.{name}": tensor for name, tensor in tensors.items()}


def set_random_tensors(tensors: dict[str, Tensor]) -> None:
    """Put the generators back into the state that `random_tensors` gave."""
    by_generator = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    torch.set_rng_state(by_generator["torch"])
    *words, has_gauss, gauss = by_generator["python"].tolist()
    random.setstate((3, tuple(int(word) for word in words), gauss if has_gauss else None))
    *key, position, has_gauss, gauss = by_generator["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), int(position), int(has_gauss), gauss))
    if "cuda" in by_generator:
        torch.cuda.set_rng_state(by_generator["cuda"])


def seed_generators(seed: int, step: int, rank: int) -> None:
    """Seed every generator anew, otherwise for each step that a run starts at and for each rank."""
    torch_seed, python_seed, numpy_seed = map(int, np.random.SeedSequence([seed, step, rank]).generate_state(3))
    torch.manual_seed(torch_seed)
    random.seed(python_seed)
    np.random.seed(numpy_seed)
