"""One optimizer step and one validation step, as Lightning calls them."""

from collections.abc import Callable, Iterator

import lightning
import torch
from torch import Tensor

from mamba3_train.checkpoint.starting_weights import StartingWeights
from mamba3_train.errors import UserError
from mamba3_train.model import Mamba3Config, Mamba3LM, initialize
from mamba3_train.model.recurrent_state import RecurrentState
from mamba3_train.training.activation_checkpointing import check_choice, recompute_activations
from mamba3_train.training.compilation import compile_layers
from mamba3_train.training.loss import count_targets
from mamba3_train.training.processes import mean_over_ranks
from mamba3_train.training.segments import Segment, carried, check_segments, segments
from mamba3_train.training.step_guard import StepGuard
from mamba3_train.training.strategies import (
    assign,
    clip_and_step,
    construction,
    forward_of,
    gradient_exchange,
    materialise,
)
from mamba3_train.training.zero import whole_shape


class PretrainingModule(lightning.LightningModule):
    """A language model in training.

    A batch holds everything this rank needs for one optimizer step; it is cut into micro-batches here. So the loss is
    divided by the number of targets in the whole global batch, and accumulation has no state that could be saved half.

    Args:
        config: the model's dimensions.
        kernels, keep: backend of the scan and what it keeps for its backward, see `mamba3_scan`.
        optimizer: makes the optimizer of a model.
        schedule: learning rate of a step, counted from 0.
        seed: of the initial weights.
        micro_batch_size: rows in one forward pass.
        segment_length: tokens of each row in one forward pass; the state goes on to the next. None takes whole rows.
        gradient_clip_norm: largest norm of the whole gradient.
        activation_checkpointing: `none`, `selective` or `full`.
        compile: compile the layers.
        start: trained weights to begin with instead of drawn ones.
        guard: decides which steps are skipped besides those whose loss or gradient is not finite; None: none.

    Raises:
        UserError: gradient_clip_norm is not above 0, or segments that the model or the rows do not have.
    """

    def __init__(
        self,
        config: Mamba3Config,
        *,
        kernels: str,
        optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer],
        schedule: Callable[[int], float],
        seed: int,
        micro_batch_size: int,
        gradient_clip_norm: float,
        keep: str = "scales",
        activation_checkpointing: str = "none",
        segment_length: int | None = None,
        compile: bool = False,
        start: StartingWeights | None = None,
        guard: StepGuard | None = None,
    ):
        super().__init__()
        if not gradient_clip_norm > 0:
            raise UserError(f"trainer.gradient_clip_norm={gradient_clip_norm:g} must be above 0; inf clips nothing")
        check_segments(segment_length, config)
        self.automatic_optimization = False
        self.config, self.kernels, self.keep, self.seed = config, kernels, keep, seed
        self.make_optimizer, self.schedule = optimizer, schedule
        self.micro_batch_size, self.gradient_clip_norm = micro_batch_size, gradient_clip_norm
        self.segment_length = segment_length
        self.activation_checkpointing = check_choice(activation_checkpointing)
        self.compile_wanted, self.start = compile, start
        self.guard = guard or StepGuard()
        self.model: Mamba3LM | None = None

    @property
    def device(self) -> torch.device:
        """Where batches are and losses arise: not always where parameters are kept, which is Lightning's meaning."""
        return super().device if self._trainer is None else self.trainer.strategy.root_device

    def configure_model(self) -> None:
        """Build, choose what is kept, compile, shard, initialise; Lightning calls this more than once."""
        if self.model is not None:
            return
        with construction(self.trainer.strategy):
            model = Mamba3LM(self.config, kernels=self.kernels, keep=self.keep)
        recompute_activations(model, self.activation_checkpointing)
        if self.compile_wanted:
            compile_layers(model)
        materialise(self.trainer.strategy, model)
        value = None if self.start is None else self.start.value
        initialize(model, self.config, self.seed, assign=assign, shape=whole_shape, value=value)
        self.model = model

    def on_fit_start(self) -> None:
        """Keep what the guard remembers on the device."""
        self.guard.to(self.trainer.strategy.root_device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer; its learning rate is set at each step."""
        return self.make_optimizer(self.model)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """One optimizer step: loss and gradient norm as tensors on the device, without waiting for it."""
        optimizer = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = self.schedule(self.global_step)
        # The mean of the ranks' counts, because gradients too are averaged over ranks; of one target it is a fraction.
        targets = mean_over_ranks(count_targets(batch["labels"]).float()).clamp(min=1 / self.trainer.world_size)
        loss = torch.zeros_like(targets)
        passes, state = list(self._passes(batch)), None
        for number, segment in enumerate(passes, start=1):
            with gradient_exchange(self.trainer.strategy, self.model, wanted=number == len(passes)):
                part, state = self._loss_sum(segment, state)
                part = part / targets
                self.manual_backward(part)
            loss += part.detach()
        loss = mean_over_ranks(loss)
        spike = self.guard.is_spike(loss)
        skip = spike | ~loss.isfinite()
        norm = clip_and_step(self.trainer.strategy, self.model, optimizer, self.gradient_clip_norm, skip)
        self.guard.record(loss, norm, spike)
        return {"train/loss": loss, "train/grad_norm": norm, "train/skipped_steps": self.guard.skipped}

    def on_validation_epoch_start(self) -> None:
        """Start the sums of a validation."""
        self._validation_loss = torch.zeros((), device=self.device, dtype=torch.float64)
        self._validation_targets = torch.zeros_like(self._validation_loss)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add one micro-batch to the sums."""
        state = None
        for segment in segments(batch, self.segment_length):
            part, state = self._loss_sum(segment, state)
            self._validation_loss += part
        self._validation_targets += count_targets(batch["labels"])

    def on_validation_epoch_end(self) -> None:
        """Mean loss of a target over all ranks, in nats, as `val/loss`."""
        sums = torch.stack([self._validation_loss, self._validation_targets])
        loss, targets = self.trainer.strategy.reduce(sums, reduce_op="sum")
        self.log("val/loss", loss / targets, logger=False)

    def _loss_sum(self, segment: Segment, state: RecurrentState | None) -> tuple[Tensor, RecurrentState | None]:
        """Loss of a segment that begins with what `state` carries, and the state it leaves to the next one."""
        begin = carried(state, segment)
        forward = forward_of(self.trainer.strategy, self.model)
        loss = forward(segment.input_ids, segment.document_ids, begin, not segment.last, segment.labels)
        return (loss, None) if segment.last else loss

    def _passes(self, batch: dict[str, Tensor]) -> Iterator[Segment]:
        """What is computed at a time: some rows of the batch, segment after segment."""
        parts = {key: value.split(self.micro_batch_size) for key, value in batch.items()}
        for values in zip(*parts.values(), strict=True):
            yield from segments(dict(zip(parts, values, strict=True)), self.segment_length)
