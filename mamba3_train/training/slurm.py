"""What Slurm tells a process: which of a run's processes it is, where the first one is, and when the job ends."""

import datetime
import os
import re
import socket
import subprocess

from mamba3_train.errors import UserError

# Below the ports that Linux gives to connections of its own accord.
PORTS = range(12000, 32000)


def adopt_ranks() -> None:
    """Where srun started this process as one of several, set what torchrun would set: RANK, LOCAL_RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: nothing knows the first node's address.
    """
    ours = os.environ
    if "RANK" in ours or int(ours.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    for name, source in (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID"), ("GROUP_RANK", "SLURM_NODEID")):
        ours[name] = ours[source]
    ours["WORLD_SIZE"] = ours["SLURM_STEP_NUM_TASKS"]
    if "MASTER_ADDR" not in ours:
        ours["MASTER_ADDR"] = _first_address()
    # The same for all ranks, and another one for every job and step that may share a node.
    number = int(ours["SLURM_JOB_ID"]) * 10 + int(ours["SLURM_STEP_ID"])
    ours.setdefault("MASTER_PORT", str(PORTS[number % len(PORTS)]))


def job_end() -> float | None:
    """When the job's time is up, in seconds of the epoch; None outside a job, or if that cannot be told."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        return float(end)
    # In one task of an array the job's number is the array's and stands for all of them.
    tasks = _ask("squeue", "--noheader", "--array", f"--jobs={job}", "--format=%A %e").splitlines()
    try:
        return datetime.datetime.fromisoformat(dict(task.split() for task in tasks)[job]).timestamp()
    except (KeyError, ValueError):
        return None


def first_host(nodes: str) -> str:
    """The first name of a list as Slurm writes it: `gpu[007-009,12]-ib,login1` begins with `gpu007-ib`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes).group()
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _first_address() -> str:
    nodes = os.environ["SLURM_STEP_NODELIST"]
    if int(os.environ["SLURM_STEP_NUM_NODES"]) == 1:
        return "127.0.0.1"
    host = first_host(nodes)
    # Slurm may know the node by another address than its name's, which need not even resolve.
    known = re.search(r"\bNodeAddr=(\S+)", _ask("scontrol", "show", "node", host))
    for address in (host, known and known.group(1)):
        try:
            socket.getaddrinfo(address or "", None)
        except OSError:
            continue
        return address
    raise UserError(
        f"the first node of {nodes}, {host}, has no address that resolves here: set MASTER_ADDR to one that all nodes "
        "reach it by"
    )


def _ask(*command: str) -> str:
    """What one of Slurm's commands prints; nothing where there is none, as in many containers."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
