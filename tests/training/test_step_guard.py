"""What a guard takes for a spike, what it counts, and that neither it nor a skipped update waits for the device."""

import statistics
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from mamba3_train.errors import UserError
from mamba3_train.training.data_cursor import DataCursor
from mamba3_train.training.optimizer import adamw
from mamba3_train.training.step_guard import StepGuard
from mamba3_train.training.strategies import clip_and_step


def see(guard, *losses, norm=1.0):
    """Let a guard see steps; which of them it took for spikes."""
    spikes = []
    for loss in map(torch.tensor, losses):
        spikes.append(guard.is_spike(loss))
        guard.record(loss, torch.tensor(norm), spikes[-1])
    return [bool(spike) for spike in spikes]


@pytest.mark.parametrize("window", [7, 8])
def test_the_threshold_is_robust_deviations_above_the_median_of_the_last_losses(window):
    guard = StepGuard(spike_threshold=0.0, spike_window=window)
    generator = torch.Generator().manual_seed(3)
    losses = (3 + 0.3 * torch.randn(20, generator=generator)).tolist()
    see(guard, *losses)
    guard.spike_threshold = 5.0
    known = sorted(losses[-window:])
    # The lower of the two in the middle, as torch's.
    median = known[(window - 1) // 2]
    deviation = sorted(abs(loss - median) for loss in known)[(window - 1) // 2]
    assert abs(statistics.median(known) - median) < 0.3
    limit = median + 5.0 * 1.4826 * deviation
    assert not guard.is_spike(torch.tensor(limit - 1e-3))
    assert guard.is_spike(torch.tensor(limit + 1e-3))
    assert not guard.is_spike(torch.tensor(0.0)), "a fall is none"


def test_what_was_skipped_is_not_remembered_and_half_a_window_is_needed():
    guard = StepGuard(spike_threshold=5.0, spike_window=8)
    assert see(guard, 2.0, 2.1, 1.9, 20.0) == [False] * 4
    guard = StepGuard(spike_threshold=5.0, spike_window=8)
    assert see(guard, 2.0, 2.1, 1.9, 2.0, *[20.0] * 6, 2.1, 20.0) == [False] * 4 + [True] * 6 + [False, True]
    assert guard.counts() == (0, 7, 0, 1, 5)


def test_a_flat_curve_makes_no_spike_of_a_little_more():
    guard = StepGuard(spike_threshold=5.0, spike_window=4)
    assert see(guard, 0.0, 0.0, 0.0, 0.0, 0.24, 0.26) == [False] * 5 + [True]


def test_only_a_step_that_is_taken_ends_a_row():
    guard = StepGuard(spike_threshold=5.0, spike_window=4, max_rollbacks=1)
    see(guard, 2.0, 2.0)
    see(guard, float("nan"), float("inf"))
    see(guard, 2.0, norm=float("inf"))
    see(guard, 30.0, 30.0)
    assert guard.counts() == (3, 2, 3, 2, 2)
    assert (guard.counts().skipped, guard.counts().skipped_in_a_row, int(guard.skipped)) == (5, 5, 5)
    see(guard, 2.0)
    assert guard.counts() == (3, 2, 0, 0, 3)


@pytest.mark.parametrize(("rollbacks", "later"), [(0, [False, False]), (1, [True, True])])
def test_spikes_that_last_are_the_new_level_unless_the_run_is_to_be_rolled_back(rollbacks, later):
    guard = StepGuard(spike_threshold=5.0, spike_window=4, max_spikes_in_a_row=3, max_rollbacks=rollbacks)
    assert see(guard, 2.0, 2.0, 2.0, 5.0, 5.0, 5.0) == [False] * 3 + [True] * 3
    assert see(guard, 5.0, 5.1) == later


def test_no_threshold_no_spike():
    assert not any(see(StepGuard(spike_window=4), 1.0, 1.0, 1.0, 1.0, 1000.0))


def test_loaded_state_judges_as_before():
    guard, other = (StepGuard(spike_threshold=5.0, spike_window=4) for _ in range(2))
    see(guard, 2.0, 2.1, 1.9, 40.0)
    for name, tensor in other.tensors().items():
        tensor.copy_(guard.tensors()[name])
    assert other.counts() == guard.counts() == (0, 1, 0, 1, 3)
    assert see(other, 30.0, 2.0) == [True, False]


@pytest.mark.parametrize(
    "setting",
    [{"spike_threshold": -1.0}, {"spike_window": 3}, {"max_nonfinite_in_a_row": 0}, {"max_spikes_in_a_row": 0},
     {"max_rollbacks": -1}],
)  # fmt: skip
def test_settings_out_of_range_are_named(setting):
    (key,) = setting
    with pytest.raises(UserError, match=f"guards.{key}={setting[key]:g} must be at least"):
        StepGuard(**setting)


def test_a_step_with_its_guard_reads_nothing_off_the_device():
    """Tensors without values stand for those of a device that is not waited for: reading one is an error."""
    with FakeTensorMode():
        model, guard = torch.nn.Sequential(torch.nn.Linear(4, 4)), StepGuard(spike_threshold=5.0)
        guard._losses, guard._counts = torch.zeros(128), torch.zeros(5, dtype=torch.int64)
        optimizer = SimpleNamespace(optimizer=adamw(model, lr=1e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1))
        optimizer.step, optimizer.zero_grad = optimizer.optimizer.step, optimizer.optimizer.zero_grad
        for _ in range(2):
            loss = model(torch.ones(2, 4)).square().mean()
            loss.backward()
            loss = loss.detach()
            spike = guard.is_spike(loss)
            norm = clip_and_step(None, model, optimizer, 1.0, spike | ~loss.isfinite())
            guard.record(loss, norm, spike)
        with pytest.raises(DataDependentOutputException):
            norm.item()


def test_the_cursor_goes_on_while_the_step_goes_back():
    cursor = DataCursor(samples_per_step=8)
    assert cursor.samples(10) == 80
    cursor.roll_back(from_step=10, to_step=6)
    # The next step, the seventh, reads what the eleventh would have read.
    assert cursor.samples(6) == 80
    cursor.roll_back(from_step=9, to_step=6)
    assert cursor.samples(6) == 104
    resumed = DataCursor(samples_per_step=8)
    resumed.restore({"step": 12} | cursor.state(12))
    assert resumed == cursor
    resumed.restore({"step": 12, "samples": 96})
    assert resumed == DataCursor(samples_per_step=8)
