"""How the model is spread over devices: one function a `strategy=`, and what training asks of whichever it is."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mamba3_train.checkpoint import sharded
from mamba3_train.checkpoint.training_state import restore, training_tensors
from mamba3_train.errors import UserError
from mamba3_train.training.fully_sharded import FullySharded
from mamba3_train.training.hardware import choose_compile, on_gpu
from mamba3_train.training.zero import ZeRO, assign_partitioned


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


def fsdp(
    *,
    accelerator: str,
    devices: int,
    num_nodes: int,
    replicas: int,
    reshard_after_forward: bool,
    cpu_offload: bool = False,
    layers_together: int = 1,
) -> Strategy:
    """Parameters, gradients and optimizer state in shards, gathered layer by layer (FSDP2).

    Args:
        replicas: groups of devices that each hold a whole model; 1 shards over all, more is hybrid sharding (HSDP).
        reshard_after_forward: free gathered parameters between forward and backward.
        cpu_offload: keep the shards of parameters, gradients and optimizer state in host memory, and step there.
        layers_together: layers that are gathered at once: fewer and larger messages, more memory.
    """
    if layers_together < 1:
        raise UserError(f"strategy.layers_together={layers_together} must be at least 1")
    world_size = devices * num_nodes
    if replicas < 1 or world_size % replicas:
        raise UserError(
            f"strategy.replicas={replicas} does not divide the {world_size} devices "
            "(trainer.devices · trainer.num_nodes): choose a divisor"
        )
    if world_size == 1:
        return single(accelerator=accelerator, devices=1, num_nodes=1)
    return FullySharded(
        _backend(accelerator), world_size, replicas, reshard_after_forward, cpu_offload, layers_together
    )


def deepspeed_zero(
    *, accelerator: str, devices: int, num_nodes: int, stage: int, gradient_clip_norm: float, compile: str = "never"
) -> Strategy:
    """DeepSpeed's ZeRO: optimizer state (1), gradients (2) and parameters (3) in shards.

    Raises:
        UserError: stage 3 with compiled layers, inside which its hooks would have to run.
    """
    if stage == 3 and choose_compile(compile, accelerator):
        raise UserError(
            f"trainer.compile={compile} does not work with strategy=deepspeed_zero3: set it to never, or choose "
            "strategy=fsdp"
        )
    if devices * num_nodes == 1:
        return single(accelerator=accelerator, devices=1, num_nodes=1)
    return ZeRO(_backend(accelerator), stage, gradient_clip_norm)


def construction(strategy: Strategy) -> AbstractContextManager:
    """Where a model is built: on meta, without memory, or by the strategy's own way."""
    return strategy.construction() if isinstance(strategy, ZeRO) else torch.device("meta")


def materialise(strategy: Strategy, model: nn.Module) -> None:
    """Give a model built under `construction` its memory on the device, in shards where the strategy has any."""
    device = strategy.root_device
    if isinstance(strategy, FullySharded):
        strategy.shard(model)
        device = strategy.storage_device
    if not (isinstance(strategy, ZeRO) and strategy.stage == 3):
        model.to_empty(device=device)


def bring_back(strategy: Strategy, model: nn.Module) -> None:
    """Move a model to where it computes: after training Lightning leaves it in host memory, unless FSDP shards it."""
    if not isinstance(strategy, FullySharded):
        model.to(strategy.root_device)


def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy a whole value, the same on every rank, into a parameter or into this rank's shard of it."""
    if hasattr(parameter, "ds_id"):
        assign_partitioned(parameter, value)
        return
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device_mesh.device_type)
        # No source rank: every rank cuts its own shard from its own copy.
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(value.to_local())
        return
    parameter.copy_(value)


def forward_of(strategy: Strategy, model: nn.Module) -> Callable:
    """What to call for a forward pass of training or validation."""
    return strategy.engine if isinstance(strategy, ZeRO) else model


def gradient_exchange(strategy: Strategy, model: nn.Module, wanted: bool) -> AbstractContextManager:
    """Let ranks exchange gradients in the backward pass within, or keep them apart until a later one."""
    if isinstance(strategy, FullySharded):
        model.set_requires_gradient_sync(wanted)
    elif isinstance(strategy, ZeRO):
        strategy.engine.set_gradient_accumulation_boundary(wanted)
    elif isinstance(strategy, DDPStrategy) and not wanted:
        return strategy.block_backward_sync()
    return nullcontext()


def clip_and_step(strategy: Strategy, model: nn.Module, optimizer, max_norm: float, skip: Tensor) -> Tensor:
    """Clip the whole gradient to a norm, update, forget the gradient; returns the norm before clipping.

    Where the norm is not finite, or `skip` says so, the update is left out, on the device: parameters, moments and step
    counts stay as they are, bit for bit. `found_inf` and `grad_scale` are how PyTorch's fused optimizers are told.

    Args:
        skip: bool on the device, the same on every rank.
    """
    if isinstance(strategy, ZeRO):
        # The engine knows the norm as it steps; it returns before its optimizer where that is not finite.
        strategy.inner_optimizer.found_inf = skip.float()
        optimizer.step()
        return strategy.gradient_norm()
    norm = total_norm([p.grad for p in model.parameters() if p.grad is not None]).detach()
    # The fused optimizer divides gradients as it reads them; clipping beforehand would read and write them once more.
    optimizer.optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1)
    # Offloaded shards step on the CPU: the optimizer itself would copy the flag there without waiting for it.
    optimizer.optimizer.found_inf = (skip.to(norm.device) | ~norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad()
    return norm


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, the same on every rank; every rank must call it for shards."""
    norm = nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def parameter_parts(strategy: Strategy, model: nn.Module) -> list[Tensor]:
    """All parameters, whole, or as DTensors in whatever shards they rest in."""
    if isinstance(strategy, ZeRO):
        return strategy.parts()
    return [parameter.detach() for parameter in model.parameters()]


def tensors_to_save(strategy: Strategy, model: nn.Module, optimizer) -> dict[str, Tensor]:
    """Weights and optimizer state by the names they have in a checkpoint, whole or in shards."""
    return strategy.tensors() if isinstance(strategy, ZeRO) else training_tensors(model, optimizer)


def load_checkpoint(strategy: Strategy, folder: Path, model: nn.Module, optimizer) -> None:
    """Fill model and optimizer from a checkpoint of any strategy.

    Raises:
        UserError: the checkpoint lacks a tensor, or has it in another shape.
    """
    if isinstance(strategy, ZeRO):
        tensors = strategy.tensors()
        sharded.load(folder, tensors)
        strategy.restore(tensors)
    else:
        restore(folder, model, optimizer)


def _backend(accelerator: str) -> str:
    return "nccl" if on_gpu(accelerator) else "gloo"
