"""How the model is spread over devices."""

from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from mamba3_train.errors import UserError
from mamba3_train.training.hardware import on_gpu


def single(*, accelerator: str, devices: int, num_nodes: int) -> Strategy:
    """One process on one device; refuses more."""
    if devices != 1 or num_nodes != 1:
        raise UserError(
            f"strategy=single runs one process, but trainer.devices={devices} and trainer.num_nodes={num_nodes}: "
            "set both to 1, or choose strategy=ddp"
        )
    return SingleDeviceStrategy(device="cuda:0" if on_gpu(accelerator) else "cpu")


def ddp(*, accelerator: str, devices: int, num_nodes: int) -> Strategy:
    """A copy of the model a device; gradients are averaged while the last micro-batch's backward runs."""
    if devices * num_nodes == 1:
        return single(accelerator=accelerator, devices=1, num_nodes=1)
    return DDPStrategy(
        cluster_environment=TorchElasticEnvironment(),
        process_group_backend="nccl" if on_gpu(accelerator) else "gloo",
        gradient_as_bucket_view=True,
    )
