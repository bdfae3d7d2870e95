"""A Slurm cluster of simulated nodes on this machine: slurmctld, slurmd and munge, started by root, ended again."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its old credentials to expire.
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=1,sched_min_interval=200000
JobRequeue=1
KillWait=5
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=4 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class NoCluster(Exception):
    """Why Slurm cannot run here."""


class Cluster:
    """Two nodes of four CPUs, n1 and n2, whose names do not resolve."""

    def __init__(self, folder: Path):
        missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
        if missing:
            raise NoCluster(f"not installed: {', '.join(missing)} (slurmctld slurmd slurm-client munge)")
        if os.getuid() != 0:
            raise NoCluster("only root can start slurmctld, slurmd and munged")
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self._munged: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it and wait until both nodes are idle."""
        (self.folder / "state").mkdir(parents=True)
        host, ports = socket.gethostname().partition(".")[0], _free_ports(3)
        (self.folder / "slurm.conf").write_text(CONFIG.format(host=host, ports=ports, folder=self.folder))
        if subprocess.run(["munge", "-n"], env=self.environment, capture_output=True, check=False).returncode:
            subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "-m", "755", "/run/munge"], check=True)
            command = ["runuser", "-u", "munge", "--", shutil.which("munged", path=_path()), "--foreground"]
            self._munged = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self._wait_for(lambda: self._succeeds("munge", "-n"), "munged does not answer")
        self.run("slurmctld", "-i")
        for node in ("n1", "n2"):
            (self.folder / f"spool.{node}").mkdir()
            self.run("slurmd", "-N", node)
        self._wait_for(lambda: self.run("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], "nodes are not idle")

    def stop(self) -> None:
        """End its jobs, then its daemons: one that still waited for a job would report to the next cluster's."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, check=False)
        try:
            self._wait_for(lambda: self.run("squeue", "--noheader") == "", "jobs do not end")
        finally:
            subprocess.run(["scontrol", "shutdown"], env=self.environment, capture_output=True, check=False)
            if self._munged is not None:
                self._munged.terminate()
                self._munged.wait()

    def run(self, *command: str) -> str:
        """What a command prints; raises NoCluster with its complaint."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            raise NoCluster(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(field.partition("=")[::2] for field in shown.split() if "=" in field)

    def wait(self, number: str, condition: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """What is said of a job when it fulfils a condition, or is over."""
        while not condition(job := self.job(number)):
            if job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
                break
            time.sleep(0.2)
        return job

    def _succeeds(self, *command: str) -> bool:
        return subprocess.run(command, env=self.environment, capture_output=True, check=False).returncode == 0

    def _wait_for(self, condition, complaint: str) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            if time.monotonic() > deadline:
                raise NoCluster(f"{complaint} for 60 seconds: see {self.folder}")
            time.sleep(0.1)


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    """A row of ports of this machine that nobody listens on."""
    for first in range(17000, 18000, count):
        listeners = []
        try:
            for port in range(first, first + count):
                listeners.append(socket.create_server(("", port)))
        except OSError:
            continue
        else:
            return list(range(first, first + count))
        finally:
            for listener in listeners:
                listener.close()
    raise NoCluster("no free ports from 17000 to 18000")
