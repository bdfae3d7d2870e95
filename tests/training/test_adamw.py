"""Our AdamW is PyTorch's, in weights and state, whichever kernel steps a parameter."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mamba3_train.training import optimizer as module
from mamba3_train.training.optimizer import AdamW

pytest.importorskip("triton")
from mamba3_train.kernels import adamw as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SETTINGS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}


@pytest.fixture(autouse=True)
def numbers_as_a_gpu_gets_them(monkeypatch):
    """Numbers in float32: a GPU's kernel gets them so, the interpreter's gets Python's own."""
    kernel = kernels.adamw_kernel

    class Rounded:
        def __getitem__(self, grid):
            return lambda *given, **named: kernel[grid](*(_float32(value) for value in given), **named)

    monkeypatch.setattr(kernels, "adamw_kernel", Rounded())


def _float32(value):
    return torch.tensor(value).item() if isinstance(value, float) else value


def parameters():
    """A large one that fills no whole number of blocks, and a small one that PyTorch steps."""
    torch.manual_seed(0)
    return [torch.randn(shape, device=DEVICE).requires_grad_() for shape in ((67, 101), (5,))]


def groups(large, small):
    return [{"params": [large], "weight_decay": 0.1}, {"params": [small], "weight_decay": 0.0}]


def gradients(given, step):
    """Of one step, the same for ours and theirs."""
    generator = torch.Generator().manual_seed(step)
    return [(torch.randn(p.shape, generator=generator) * 10.0**-step).to(p) for p in given]


def take_steps(optimizer, given, skipped=(), scales=None):
    """Steps 0 to 4 with gradients of their own."""
    for step in range(5):
        for p, gradient in zip(given, gradients(given, step), strict=True):
            p.grad = gradient
        if scales:
            optimizer.grad_scale = torch.tensor(scales[step], device=DEVICE)
        if skipped:
            optimizer.found_inf = torch.tensor(float(step in skipped), device=DEVICE)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        optimizer.step()


def in_float64(skipped, scales):
    """PyTorch's plain AdamW on float64: the optimizer, and the parameters after its steps."""
    given = [p.detach().double().requires_grad_() for p in parameters()]
    optimizer = torch.optim.AdamW(groups(*given), foreach=False, **SETTINGS)
    for step in range(5):
        for p, gradient in zip(given, gradients(given, step), strict=True):
            p.grad = gradient.float().double() / (scales[step] if scales else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        if step not in skipped:
            optimizer.step()
    return optimizer, given


@pytest.mark.parametrize("scales", [None, [1.0, 2.5, 1.0, 40.0, 3.0]])
@pytest.mark.parametrize("skipped", [(), (0, 3)])
def test_weights_and_state_are_those_of_float64(skipped, scales, monkeypatch):
    monkeypatch.setattr(module, "LARGE", 1000)
    ours = parameters()
    mine = AdamW(groups(*ours), **SETTINGS)
    take_steps(mine, ours, skipped, scales)
    reference, theirs = in_float64(skipped, scales)
    # PyTorch steps the small one; its kernel for GPUs takes 1 − 0.999 in float32, 1.3e-5 of itself off.
    for found, expected, within in zip(ours, theirs, (1e-6, 2e-5), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=within, atol=1e-6)
        assert mine.state[found].keys() == reference.state[expected].keys()
        for name, value in reference.state[expected].items():
            # Moments are sums, some nearly zero.
            near_zero = 1e-6 * float(value.abs().max())
            torch.testing.assert_close(mine.state[found][name].to(value), value, rtol=within, atol=near_zero)
    assert mine.state[ours[0]]["step"] == 5 - len(skipped)


def test_the_kernel_steps_large_parameters_and_leaves_their_gradients(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 1000)
    large, small = given = parameters()
    optimizer = AdamW(groups(*given), **SETTINGS)
    stepped = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: stepped.extend(p for p in given if p.grad is not None))
    gradient = large.grad = torch.ones_like(large)
    small.grad = torch.ones_like(small)
    before = large.detach().clone()
    optimizer.grad_scale = torch.tensor(2.0, device=DEVICE)
    optimizer.step()
    assert len(stepped) == 1
    assert stepped[0] is small
    assert not torch.equal(large, before)
    assert large.grad is gradient
    assert (gradient == 1).all()


def test_state_goes_from_one_to_the_other(monkeypatch):
    """A state dict of PyTorch's AdamW goes on here with the same weights."""
    monkeypatch.setattr(module, "LARGE", 1000)
    ours, theirs = parameters(), parameters()
    mine, reference = AdamW(groups(*ours), **SETTINGS), torch.optim.AdamW(groups(*theirs), fused=True, **SETTINGS)
    take_steps(reference, theirs)
    mine.load_state_dict(copy.deepcopy(reference.state_dict()))
    for found, expected in zip(ours, theirs, strict=True):
        found.data.copy_(expected)
    take_steps(mine, ours)
    take_steps(reference, theirs)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.fixture
def mesh():
    """One process by itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(DEVICE, (1,))
    dist.destroy_process_group()


def test_shards_are_stepped_where_they_are(mesh, monkeypatch):
    monkeypatch.setattr(module, "LARGE", 1000)
    whole, _ = parameters()
    shard = torch.nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [Shard(0)], src_data_rank=None))
    gradient = torch.randn_like(whole)
    whole.grad, shard.grad = gradient.clone(), distribute_tensor(gradient, mesh, [Shard(0)], src_data_rank=None)
    for p in (whole, shard):
        AdamW([p], weight_decay=0.1, **SETTINGS).step()
    assert isinstance(shard, DTensor)
    assert torch.equal(shard.to_local(), whole)
