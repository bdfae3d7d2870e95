"""How the model is spread over devices: one function a `strategy=`, and what training asks of whichever it is."""

from contextlib import AbstractContextManager, nullcontext

from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mamba3_train.errors import UserError
from mamba3_train.training.hardware import on_gpu


def single(*, accelerator: str, devices: int, num_nodes: int) -> Strategy:
    """One process on one device; refuses more."""
    if devices != 1 or num_nodes != 1:
        raise UserError(
            f"strategy=single runs one process, but trainer.devices={devices} and trainer.num_nodes={num_nodes}: "
            "set both to 1, or choose strategy=ddp or strategy=fsdp"
        )
    return SingleDeviceStrategy(device="cuda:0" if on_gpu(accelerator) else "cpu")


def ddp(*, accelerator: str, devices: int, num_nodes: int) -> Strategy:
    """A copy of the model a device; gradients are averaged while the last micro-batch's backward runs."""
    if devices * num_nodes == 1:
        return single(accelerator=accelerator, devices=1, num_nodes=1)
    return DDPStrategy(
        cluster_environment=TorchElasticEnvironment(),
        process_group_backend=_backend(accelerator),
        gradient_as_bucket_view=True,
    )


def fsdp(*, accelerator: str, devices: int, num_nodes: int, replicas: int, reshard_after_forward: bool) -> Strategy:
    """Parameters, gradients and optimizer state in shards, gathered layer by layer (FSDP2).

    Args:
        replicas: groups of devices that each hold a whole model; 1 shards over all, more is hybrid sharding (HSDP).
        reshard_after_forward: free gathered parameters between forward and backward.
    """
    world_size = devices * num_nodes
    if replicas < 1 or world_size % replicas:
        raise UserError(
            f"strategy.replicas={replicas} does not divide the {world_size} devices "
            "(trainer.devices · trainer.num_nodes): choose a divisor"
        )
    if world_size == 1:
        return single(accelerator=accelerator, devices=1, num_nodes=1)
    return FullySharded(_backend(accelerator), world_size, replicas, reshard_after_forward)


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for sharded modules, over our own mesh of replicas × shards."""

    def __init__(self, backend: str, world_size: int, replicas: int, reshard_after_forward: bool):
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1, process_group_backend=backend)
        self.cluster_environment = TorchElasticEnvironment()
        self.mesh_shape = (replicas, world_size // replicas)
        self.reshard_after_forward = reshard_after_forward

    def shard(self, model: nn.Module) -> None:
        """Shard a model on meta: every layer by itself, and what is left together at the root."""
        mesh = init_device_mesh(self.root_device.type, self.mesh_shape, mesh_dim_names=("replicate", "shard"))
        mesh = mesh if self.mesh_shape[0] > 1 else mesh["shard"]
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=self.reshard_after_forward)


def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy a whole value, the same on every rank, into a parameter or into this rank's shard of it."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device)
        # No source rank: every rank cuts its own shard from its own copy.
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def gradient_exchange(strategy: Strategy, model: nn.Module, wanted: bool) -> AbstractContextManager:
    """Let ranks exchange gradients in the backward pass within, or keep them apart until a later one."""
    if isinstance(strategy, FullySharded):
        model.set_requires_gradient_sync(wanted)
    elif isinstance(strategy, DDPStrategy) and not wanted:
        return strategy.block_backward_sync()
    return nullcontext()


def _backend(accelerator: str) -> str:
    return "nccl" if on_gpu(accelerator) else "gloo"
