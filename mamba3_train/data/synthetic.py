"""Batches of a synthetic task: rows made when they are asked for, each a pure function of seed and index."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from mamba3_train.data.datamodule import BatchDataModule
from mamba3_train.data.packing import IGNORED_LABEL
from mamba3_train.data.synthetic_tasks import Task
from mamba3_train.errors import UserError

# What a row is for: each has a sequence of random numbers of its own.
TRAINING, VALIDATION, EXAMPLES = range(3)

Batch = dict[str, torch.Tensor]


class SyntheticRows:
    """Rows of a task: each holds documents of one length, the last one cut where the row ends.

    Args:
        task: makes the documents.
        seed: of everything that is drawn.
        sequence_length: tokens in a row.
        shortest: least length of a document.
    """

    def __init__(self, task: Task, seed: int, sequence_length: int, shortest: int):
        self.task, self.seed = task, seed
        self.sequence_length, self.shortest = sequence_length, shortest

    def row(self, index: int, longest: int, purpose: int) -> tuple[list[int], list[int], np.ndarray]:
        """Tokens, labels and document numbers of one row, whose length of document is at most `longest`."""
        rng = np.random.default_rng([self.seed, purpose, index])
        length = int(rng.integers(self.shortest, longest + 1))
        tokens, labels, lengths = [], [], []
        while len(tokens) < self.sequence_length:
            document, answers = self.task.document(rng, length)
            tokens += document
            labels += answers
            lengths.append(len(document))
        end = self.sequence_length
        return tokens[:end], labels[:end], np.repeat(np.arange(len(lengths)), lengths)[:end]

    def examples(self, length: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Documents of one length, none from training, and the answer at the last token of each.

        Returns:
            tokens: (count, length) int64, or one less where the task has no document of this length.
            answers: (count,) int64.
        """
        rng = np.random.default_rng([self.seed, EXAMPLES, length])
        tokens, labels = zip(*(self.task.document(rng, length) for _ in range(count)), strict=True)
        return torch.tensor(tokens), torch.tensor(labels)[:, -1]


class TrainingRows(Dataset):
    """The endless training order: the index is a range of positions, the item is their batch.

    The longest document grows evenly from `longest[0]` to `longest[1]` over the first `curriculum_steps` steps.
    """

    def __init__(self, rows: SyntheticRows, longest: tuple[int, int], rows_per_step: int, curriculum_steps: int):
        self.rows, self.longest = rows, longest
        self.rows_per_step, self.curriculum_steps = rows_per_step, curriculum_steps

    def longest_at(self, position: int) -> int:
        """Longest document of the row at a position: the same for all rows of a step."""
        first, last = self.longest
        step = position // self.rows_per_step
        return last if step >= self.curriculum_steps else first + (last - first) * step // self.curriculum_steps

    def __getitem__(self, positions: range) -> Batch:
        return _batch([self.rows.row(position, self.longest_at(position), TRAINING) for position in positions])


class ValidationRows(Dataset):
    """Micro-batches of one rank; the rows beyond `count`, which make ranks equal, have every label ignored."""

    def __init__(
        self, rows: SyntheticRows, longest: int, count: int, micro_batch_size: int, rank: int, world_size: int
    ):
        self.rows, self.longest, self.count, self.size = rows, longest, count, micro_batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-self.count // (self.size * self.world_size))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = (index * self.world_size + self.rank) * self.size
        batch = _batch([self.rows.row(number, self.longest, VALIDATION) for number in range(first, first + self.size)])
        batch["labels"][max(0, self.count - first) :] = IGNORED_LABEL
        return batch


class SyntheticDataModule(BatchDataModule):
    """Training and validation batches of a task whose documents grow longer as training goes on (a curriculum).

    Batches hold what those of `TokenDataModule` do, but labels are the task's answers: `input_ids`, `labels` (int64,
    −100 where nothing is asked) and `document_ids` (int32). They depend only on task, lengths, seed and position.

    Args:
        task: makes the documents.
        vocab_size: entries the model expects.
        sequence_length: tokens in a row.
        shortest: least length of a document.
        longest: most, at the first step and from the end of the curriculum on.
        curriculum_steps: optimizer steps in which the longest grows from the first to the last.
        global_batch_size, micro_batch_size, num_workers: as in `TokenDataModule`.
        seed: of everything that is drawn.
        validation_sequences: rows of a validation, with documents of every length up to the last longest.

    Raises:
        UserError: lengths out of order, or a vocabulary that is not the task's.
    """

    def __init__(
        self,
        *,
        task: Task,
        vocab_size: int,
        sequence_length: int,
        shortest: int,
        longest: Sequence[int],
        curriculum_steps: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int = 0,
        num_workers: int = 1,
        validation_sequences: int = 256,
    ):
        super().__init__(
            sequence_length=sequence_length,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            num_workers=num_workers,
        )
        if vocab_size != task.vocab_size:
            raise UserError(f"data.vocab_size={vocab_size}, but the task has {task.vocab_size} tokens: set it to that")
        if len(longest) != 2 or not task.shortest <= shortest <= longest[0] <= longest[1] <= sequence_length:
            raise UserError(
                f"data.shortest={shortest}, data.longest={list(longest)} (first and last) and data.sequence_length="
                f"{sequence_length} must rise in this order, from at least {task.shortest}"
            )
        for key, value in (("curriculum_steps", curriculum_steps), ("validation_sequences", validation_sequences)):
            if value < 0:
                raise UserError(f"data.{key}={value} must be 0 or more")
        self.rows = SyntheticRows(task, seed, sequence_length, shortest)
        self.vocab_size, self.longest = vocab_size, tuple(longest)
        self.curriculum_steps, self.validation_sequences = curriculum_steps, validation_sequences

    def setup(self, stage: str | None = None) -> None:
        """Check that ranks divide the batch; there is nothing to open."""
        self.check_batch_size(self.world_size)
        self.training = TrainingRows(self.rows, self.longest, self.global_batch_size, self.curriculum_steps)

    def _validation_batches(self) -> Dataset | None:
        count, size = self.validation_sequences, self.micro_batch_size
        return ValidationRows(self.rows, self.longest[1], count, size, self.rank, self.world_size) if count else None

    def epochs(self, samples_consumed: int) -> dict[str, float]:
        """Nothing to tell: no row comes twice."""
        return {}


def _batch(rows: list[tuple[list[int], list[int], np.ndarray]]) -> Batch:
    tokens, labels, documents = zip(*rows, strict=True)
    return {
        "input_ids": torch.tensor(tokens),
        "labels": torch.tensor(labels),
        "document_ids": torch.from_numpy(np.stack(documents)).int(),
    }
