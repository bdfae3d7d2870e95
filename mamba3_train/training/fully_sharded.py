"""FSDP2: which parameters are gathered together, in which dtype they travel, and where they rest."""

import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for sharded modules, over our own mesh of replicas × shards."""

    def __init__(
        self, backend: str, world_size: int, replicas: int, reshard_after_forward: bool, cpu_offload: bool = False
    ):
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1, process_group_backend=backend)
        self.cluster_environment = TorchElasticEnvironment()
        self.mesh_shape = (replicas, world_size // replicas)
        self.reshard_after_forward, self.cpu_offload = reshard_after_forward, cpu_offload

    @property
    def storage_device(self) -> torch.device:
        """Where shards rest between their uses."""
        return torch.device("cpu") if self.cpu_offload else self.root_device

    def shard(self, model: nn.Module) -> None:
        """Shard a model on meta: every layer by itself, and what is left together at the root.

        With bf16-mixed precision a layer's matrices are one group that travels in bfloat16, as autocast would cast them
        anyway; the rest of the layer, dynamics and norms, is another that travels in float32. All rest in float32, and
        gradients are summed in it.
        """
        mesh = init_device_mesh(self.root_device.type, self.mesh_shape, mesh_dim_names=("replicate", "shard"))
        settings = {
            "mesh": mesh if self.mesh_shape[0] > 1 else mesh["shard"],
            "reshard_after_forward": self.reshard_after_forward,
            "offload_policy": CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
            if self.cpu_offload
            else OffloadPolicy(),
        }
        lower = None
        if self.precision_plugin.precision == "bf16-mixed":
            lower = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in (*model.layers, model):
            if lower and (matrices := _own_matrices(module, model)):
                fully_shard(matrices, mp_policy=lower, **settings)
            fully_shard(module, **settings)


def _own_matrices(module: nn.Module, model: nn.Module) -> list[nn.Module]:
    """The linear maps of a layer, or for the whole model those outside its layers."""
    inside = set() if module is not model else {part for layer in model.layers for part in layer.modules()}
    return [part for part in module.modules() if isinstance(part, nn.Linear) and part not in inside]
