"""How the model is spread over devices."""

from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from mamba3_train.errors import UserError
from mamba3_train.training.hardware import on_gpu


def single(*, accelerator: str, devices: int, num_nodes: int) -> Strategy:
    """One process on one device; refuses more."""
    if devices != 1 or num_nodes != 1:
        raise UserError(
            f"strategy=single runs one process, but trainer.devices={devices} and trainer.num_nodes={num_nodes}: "
            "set both to 1"
        )
    return SingleDeviceStrategy(device="cuda:0" if on_gpu(accelerator) else "cpu")
