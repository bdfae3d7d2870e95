"""What is read from Slurm's variables and commands: ranks, the first node, the end of the job."""

import datetime
import os
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from mamba3_train.errors import UserError
from mamba3_train.training import assembly, slurm

OURS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TASK = {
    "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "nowhere[07-08]",
}  # fmt: skip


@pytest.fixture
def job(monkeypatch, tmp_path):
    """Be a task of a job, with these answers of Slurm's commands."""

    def be(variables, **answers):
        for name in [*OURS, *(name for name in os.environ if name.startswith("SLURM_"))]:
            # Set first, so that what the code under test sets goes again.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for name, answer in answers.items():
            (tmp_path / name).write_text(f"#!/bin/bash\necho '{answer}'\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if answers else str(tmp_path))
        slurm.adopt_ranks()
        return {name: os.environ[name] for name in OURS if name in os.environ}

    return be


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"), ("n[1-2]", "n1"), ("gpu[007-009,12]-ib,login1", "gpu007-ib"), ("a,b[1-2]", "a"),
        ("r1n[3,5]", "r1n3"), ("r[1-2]n[3-4]", "r1n3"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_list(nodes, first):
    assert slurm.first_host(nodes) == first


def test_a_task_of_several_is_a_rank_and_finds_the_first_node_by_slurms_address(job):
    expected = {
        "RANK": "11", "LOCAL_RANK": "3", "GROUP_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(12000 + 1234562 % 20000),
    }  # fmt: skip
    assert job(TASK, scontrol="NodeName=nowhere07 NodeAddr=127.0.0.1 NodeHostName=nowhere07") == expected
    assert job(TASK | {"SLURM_STEP_NODELIST": "localhost,n[1-2]"})["MASTER_ADDR"] == "localhost"
    assert job(TASK | {"SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert job(TASK | given).items() >= given.items()


def test_a_node_without_an_address_is_named(job):
    with pytest.raises(UserError, match=r"nowhere07, has no address that resolves here: set MASTER_ADDR"):
        job(TASK, scontrol="NodeName=nowhere07 NodeAddr=nowhere07.invalid")


def test_what_srun_did_not_start_as_one_of_several_is_left_alone(job):
    assert job({}) == {}
    assert job(TASK | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert job({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == {}, "the job's script, not a task"
    assert job(TASK | {"RANK": "5"}) == {"RANK": "5"}, "torchrun's, started by srun"


def test_the_end_of_the_job(job):
    job({})
    assert slurm.job_end() is None
    job(TASK | {"RANK": "0", "SLURM_JOB_END_TIME": "1800000000"})
    assert slurm.job_end() == 1.8e9
    job(TASK | {"RANK": "0"}, squeue="123456 2027-01-15T08:00:00")
    assert slurm.job_end() == datetime.datetime(2027, 1, 15, 8).timestamp()
    job(TASK | {"RANK": "0"}, squeue="123457 N/A\n123456 2027-01-15T08:00:00\n123458 2027-01-15T09:00:00")
    assert slurm.job_end() == datetime.datetime(2027, 1, 15, 8).timestamp(), "of this task of an array"
    job(TASK | {"RANK": "0", "SLURM_JOB_END_TIME": ""}, squeue="123456 N/A")
    assert slurm.job_end() is None
    job(TASK | {"RANK": "0"})
    assert slurm.job_end() is None


def test_time_is_up_before_the_first_of_two_limits(job):
    def stop_at(max_hours=None):
        config = OmegaConf.create({"trainer": {"max_hours": max_hours, "stop_before_seconds": 100.0}})
        return assembly.build_preemption(config, None, SimpleNamespace(started=1.8e9)).stop_at

    job({})
    assert stop_at() is None
    assert stop_at(max_hours=1.5) == 1.8e9 + 5400
    job({"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": "1800003600"})
    assert stop_at() == 1.8e9 + 3500
    assert stop_at(max_hours=0.5) == 1.8e9 + 1800
    with pytest.raises(UserError, match=r"trainer\.max_hours=-1 must be at least 0"):
        stop_at(max_hours=-1)
