"""How the model is spread over devices."""

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from mamba3_train.errors import UserError


def single(*, accelerator: str, devices: int, num_nodes: int) -> str | Strategy:
    """One process on one device; refuses more."""
    if devices != 1 or num_nodes != 1:
        raise UserError(
            f"strategy=single runs one process, but trainer.devices={devices} and trainer.num_nodes={num_nodes}: "
            "set both to 1"
        )
    device = "cuda:0" if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"
    return SingleDeviceStrategy(device=device)
