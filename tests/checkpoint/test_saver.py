"""One save at a time, beside training; storage that fails leaves what was there, and nothing half written."""

import ctypes
import errno
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mamba3_train.checkpoint import folders, saver, sharded
from mamba3_train.checkpoint.saver import SaveFailed, Saver
from tests.checkpoint.small_training import DOCUMENTS, save


def full(*arguments, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(checkpoints):
    return sorted(path.name for path in checkpoints.iterdir())


def test_training_may_overwrite_what_is_being_saved(tmp_path, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def slowly(path, pieces):
        begun.set()
        assert go.wait(timeout=60)
        return sharded.write_shard(path, pieces)

    monkeypatch.setattr(saver, "write_shard", slowly)
    weight = torch.arange(1000.0)
    saving = Saver(tmp_path, asynchronous=True, keep_last=1)
    saving.start(3, {"weight": weight}, DOCUMENTS)
    saving.wait_until_copied()
    weight.zero_()
    assert begun.wait(timeout=60)
    assert not saving.finished
    assert folders.newest_whole(tmp_path) is None
    go.set()
    saving.wait()
    loaded = {"weight": weight}
    sharded.load(folders.newest_whole(tmp_path), loaded)
    assert torch.equal(weight, torch.arange(1000.0))


@pytest.mark.gpu
def test_a_gpu_may_overwrite_what_is_copied_and_not_before(tmp_path):
    """The copy waits for what the GPU has still to do, and training for the copy."""
    weights = {f"weight.{i}": torch.zeros(2**22, device="cuda") for i in range(8)}
    saving = Saver(tmp_path, asynchronous=True, keep_last=1)
    saving.prepare(weights)
    for step in (1, 2, 3):
        for weight in weights.values():
            weight.add_(1.0)
        saving.start(step, weights, DOCUMENTS)
        saving.wait_until_copied()
        for weight in weights.values():
            weight.add_(100.0)
        saving.wait()
        loaded = {name: torch.empty(2**22) for name in weights}
        sharded.load(folders.newest_whole(tmp_path), loaded)
        expected = 101.0 * (step - 1) + 1.0
        found = {name: (tensor.min().item(), tensor.max().item()) for name, tensor in loaded.items()}
        assert found == dict.fromkeys(weights, (expected, expected)), f"step {step}"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("module", "name"), [(folders, "begin"), (saver, "write_shard"), (folders, "publish"), (folders, "_to_disk")]
)
def test_failing_storage_is_told_and_leaves_what_was_there(module, name, asynchronous, tmp_path, monkeypatch):
    saving = save(tmp_path, 3, asynchronous=asynchronous, keep_last=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        saving.start(6, {"weight": torch.ones(1000)}, DOCUMENTS)
        with pytest.raises(SaveFailed, match="No space left on device"):
            saving.wait()
    assert names(tmp_path) == ["step-00000003"]
    assert folders.newest_whole(tmp_path).name == "step-00000003"
    saving.start(7, {"weight": torch.ones(1000)}, DOCUMENTS)
    saving.wait()
    assert names(tmp_path) == ["step-00000007"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch, caplog):
    saving = save(tmp_path, 3, keep_last=1)
    monkeypatch.setattr(folders, "prune", full)
    saving.start(6, {"weight": torch.ones(1000)}, DOCUMENTS)
    saving.wait()
    assert "could not be deleted" in caplog.text
    assert folders.newest_whole(tmp_path).name == "step-00000006"


def test_a_mistake_in_the_program_is_no_failure_of_storage(tmp_path):
    with pytest.raises(RuntimeError, match="KeyError"):
        save(tmp_path, 3, tensors={"weight": torch.ones(3, dtype=torch.complex64)})
    assert names(tmp_path) == []


def on_a_disk_of(size: str, folder, report):
    """Mount a disk of memory in name spaces that end with this process, and report what saving there leaves."""
    libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
    new_mounts, new_user = 0x00020000, 0x10000000
    if libc.unshare(new_mounts | new_user) == 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()):
        report.put(None)
        return
    checkpoints, large = folder / "checkpoints", torch.randn(2**19)
    save(checkpoints, 1, tensors={"weight": large})
    (folder / "other").write_bytes(bytes(2**20))
    try:
        save(checkpoints, 2, tensors={"weight": large})
    except SaveFailed as failed:
        report.put(str(failed))
    report.put((names(checkpoints), folders.complaint(checkpoints / "step-00000001")))
    (folder / "other").unlink()
    save(checkpoints, 3, tensors={"weight": large[: 2**18]}, keep_last=1)
    report.put((names(checkpoints), folders.complaint(checkpoints / "step-00000003")))


def test_a_disk_that_is_really_full(tmp_path):
    forked = multiprocessing.get_context("fork")
    report = forked.Queue()
    process = forked.Process(target=on_a_disk_of, args=("4m", tmp_path, report))
    process.start()
    process.join(timeout=60)
    first = report.get(timeout=1)
    if first is None:
        pytest.skip("this machine lets nobody mount a disk of memory")
    assert first == "rank 0: No space left on device"
    assert report.get(timeout=1) == (["step-00000001"], None)
    assert report.get(timeout=1) == (["step-00000003"], None)


RANK = """
import errno, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from mamba3_train.checkpoint import saver, sharded
from mamba3_train.checkpoint.saver import SaveFailed, Saver
from tests.checkpoint.small_training import DOCUMENTS

checkpoints, port, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
whole = torch.arange(35.0).view(5, 7)
mesh = init_device_mesh("cpu", (2,))
tensors = {
    "sharded": distribute_tensor(whole, mesh, [Shard(0)]),
    "thin": distribute_tensor(whole[:1], mesh, [Shard(0)]),  # rank 1 holds nothing of it
    "replicated": torch.ones(6), "also replicated": torch.zeros(6), f"random.{rank}": torch.full((2,), rank),
}
saving = Saver(checkpoints, asynchronous=True, keep_last=1, group=dist.new_group(backend="gloo"))
saving.start(1, tensors, DOCUMENTS)
saving.wait()

if rank == 1:
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    saver.write_shard = full
saving.start(2, tensors, DOCUMENTS)
try:
    saving.wait()
    print("saved")
except SaveFailed as failed:
    print(failed)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_share_the_work_and_the_outcome(tmp_path, free_port):
    commands = [[sys.executable, "-c", RANK, tmp_path / "all", str(free_port), str(rank)] for rank in range(2)]
    ranks = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert out == "rank 1: No space left on device\n", err
        assert process.returncode == 0, err
    assert names(tmp_path / "all") == ["step-00000001"]
    folder = folders.newest_whole(tmp_path / "all")
    assert len(list(folder.glob("shard-*-of-00002.safetensors"))) == 2
    loaded = {
        "sharded": torch.zeros(5, 7), "thin": torch.zeros(1, 7), "replicated": torch.zeros(6),
        "also replicated": torch.ones(6), "random.0": torch.ones(2).long(), "random.1": torch.zeros(2).long(),
    }  # fmt: skip
    sharded.load(folder, loaded)
    assert torch.equal(loaded["sharded"], torch.arange(35.0).view(5, 7))
    assert torch.equal(loaded["thin"], torch.arange(7.0).view(1, 7))
    assert loaded["replicated"].sum() == 6
    assert loaded["also replicated"].sum() == 0
    assert loaded["random.0"].tolist() == [0, 0]
    assert loaded["random.1"].tolist() == [1, 1]
    sizes = [path.stat().st_size for path in folder.glob("shard-*")]
    assert max(sizes) < 2 * min(sizes), "one rank wrote nearly everything"
