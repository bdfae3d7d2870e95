"""The processes of a run: started, joined, and of one mind about what rank 0 decides."""

import datetime
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mamba3_train.errors import UserError

# The shortest time after which a rank gives up waiting for the others: longer than a cold compilation takes.
TIMEOUT = datetime.timedelta(minutes=20)
PATIENCE = 3
"""How many times `trainer.watchdog_seconds` a process may spend on what is done once, or waits for storage."""


def started_by_launcher() -> bool:
    """Whether torchrun, or anything that sets its variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process among all that train; 0 when it is alone."""
    return int(os.environ["RANK"]) if started_by_launcher() else 0


def start_processes(devices: int, num_nodes: int) -> None:
    """Where several devices of this machine are asked for, run this same command once for each, and end as they end.

    Raises:
        UserError: several nodes, which only a launcher on each of them can start; or a launcher that started another
            number of processes than the config asks for.
    """
    wanted = devices * num_nodes
    if started_by_launcher():
        if int(os.environ["WORLD_SIZE"]) != wanted:
            raise UserError(
                f"{os.environ['WORLD_SIZE']} processes were started, but trainer.devices={devices} times "
                f"trainer.num_nodes={num_nodes} is {wanted}: make them equal"
            )
        return
    if num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={num_nodes} needs a launcher on every node: torchrun --nnodes={num_nodes} "
            f"--nproc-per-node={devices} --rdzv-endpoint=HOST:PORT -m mamba3_train …"
        )
    if wanted > 1:
        sys.exit(_run_on_each(devices))


def _run_on_each(devices: int) -> int:
    """Start one process a device by torch's elastic agent, which ends all when one fails; returns the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The processes report for themselves; the agent would repeat it in forty lines.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // devices, 1)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "mamba3_train", *sys.argv[1:])
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return next((code for code in codes if code > 0), 128 - min(codes))
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


def join(on_gpu: bool, watchdog_seconds: float = 0.0) -> None:
    """Meet the other processes, if there are any.

    Args:
        on_gpu: talk through the GPUs.
        watchdog_seconds: the watchdog's time, so that no collective gives up before the watchdog tells where it hangs.
    """
    if not started_by_launcher() or dist.is_initialized():
        return
    if on_gpu:
        # NCCL talks through the current device, which would be the first one for every rank.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = max(TIMEOUT, datetime.timedelta(seconds=PATIENCE * watchdog_seconds + 60))
    # Gloo beside NCCL, for what lies in host memory: offloaded shards, checkpoints on their way to the disk.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)


def decided_by_rank_zero(decide: Callable[[], Any]) -> Any:
    """Call on rank 0 alone and give every rank its result, or its UserError."""
    if not dist.is_initialized():
        return decide()
    result: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = decide()
        except UserError as error:
            result[1] = str(error)
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise UserError(result[1])
    return result[0]


class SharedFlag:
    """A number that every rank may raise and all learn of at the same call, without waiting for a device."""

    def __init__(self):
        # Gloo exchanges it between hosts; the training group's all-reduce would queue behind the GPU's work.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def largest(self, value: int) -> int:
        """Largest value of any rank."""
        if self._group is None:
            return value
        flag = torch.tensor(value)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag)
