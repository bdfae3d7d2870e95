"""The processes of a run: started, joined, and of one mind about what rank 0 decides."""

import datetime
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mamba3_train.errors import UserError
from mamba3_train.training.stop_signals import STOPPED, StopSignals, exit_code

# The shortest time after which a rank gives up waiting for the others: longer than a cold compilation takes.
TIMEOUT = _timeout = datetime.timedelta(minutes=20)
PATIENCE = 3
"""How many times `trainer.watchdog_seconds` a process may spend on what is done once, or waits for storage."""

# Seconds that processes have to end by themselves when one of them has ended with an error.
ENDING = 30.0


def started_by_launcher() -> bool:
    """Whether torchrun, srun, or anything that sets torchrun's variables, started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process among all that train; 0 when it is alone."""
    return int(os.environ["RANK"]) if started_by_launcher() else 0


def world_size() -> int:
    """Processes of the run, this one included."""
    return int(os.environ["WORLD_SIZE"]) if started_by_launcher() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a floating-point tensor over all processes, in its place.

    Queued on the device. Lightning's own reductions meet at a barrier first, where the host waits for the device: at
    every step the GPU then waits for the host to catch up.
    """
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def start_processes(devices: int, num_nodes: int, stop: StopSignals, module: str = "mamba3_train") -> None:
    """Where several devices of this machine are asked for, run this same command once for each, and end as they end.

    Args:
        devices: of each node.
        num_nodes: machines.
        stop: the signals to this process, which the others are to get.
        module: what `python -m` ran.

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
            f"--nproc-per-node={devices} --rdzv-endpoint=HOST:PORT -m mamba3_train …, or srun with a task a device"
        )
    if wanted > 1:
        sys.exit(_run_on_each(devices, stop, module))


def _run_on_each(devices: int, stop: StopSignals, module: str) -> int:
    """Start one process a device and pass signals on to them; when one ends, the others end; returns the exit code.

    Torch's elastic agent would take a signal to itself for an order to end them within thirty seconds.
    """
    # Here, so that its port is taken as soon as it is chosen; the first two variables let ranks use it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = os.environ | {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(devices),
        "LOCAL_WORLD_SIZE": str(devices),
    }
    common.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // devices, 1)))
    command = [sys.executable, "-m", module, *sys.argv[1:]]
    processes: list[subprocess.Popen] = []

    def pass_on(number: int) -> None:
        for process in processes:
            process.send_signal(number)

    stop.leave_after, stop.pass_on = None, pass_on
    for number in map(str, range(devices)):
        # In sessions of their own: what a terminal sends reaches them through this process, once.
        environment = common | {"RANK": number, "LOCAL_RANK": number}
        processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
    if stop.received:  # while they were started
        pass_on(stop.received)
    failed = _first_failures(processes)
    _end(processes)
    codes = [process.returncode for process in processes]
    if STOPPED in codes:
        return STOPPED  # and the others fell over its absence
    if stop.received and -stop.received in codes:
        return exit_code(stop.received)  # it came before they were ready for it
    return next((code for code in failed if code > 0), 128 - min(failed)) if failed else 0


def _first_failures(processes: list[subprocess.Popen]) -> list[int]:
    """Wait until all have ended, or one with an error; the exit codes that are errors."""
    while True:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return [code for code in codes if code]
        time.sleep(0.1)


def _end(processes: list[subprocess.Popen]) -> None:
    """Give processes that have lost one of them time to notice, and to finish what they log; then kill them."""
    deadline = time.monotonic() + ENDING
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


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
    global _timeout
    _timeout = max(TIMEOUT, datetime.timedelta(seconds=PATIENCE * watchdog_seconds + 60))
    # Gloo beside NCCL, for what lies in host memory: offloaded shards, checkpoints on their way to the disk.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_timeout)


def cpu_group() -> dist.ProcessGroup | None:
    """A new group of all processes that talks over the CPU, as patient as theirs; None where there is one alone."""
    return dist.new_group(backend="gloo", timeout=_timeout) if dist.is_initialized() else None


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
        self._group = cpu_group()

    def largest(self, value: int) -> int:
        """Largest value of any rank."""
        if self._group is None:
            return value
        flag = torch.tensor(value)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag)
