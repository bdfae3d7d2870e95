"""Batches of a synthetic task: rows made when they are asked for, each a pure function of seed and index."""

from collections.abc import Iterable, Sequence

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

    def batch(self, rows: Iterable[tuple[int, int]], purpose: int) -> Batch:
        """Batch of rows, each given by its index and the most that the length of its documents may be."""
        lengths, draws = [], []
        for index, longest in rows:
            rng = np.random.default_rng([self.seed, purpose, index])
            length = self._length(int(rng.integers(self.shortest, longest + 1)))
            lengths.append(length)
            draws.append(self._draw(rng, -(-self.sequence_length // length) * length))
        lengths, drawn = np.array(lengths), np.array([of_row.shape[1] for of_row in draws])
        tokens, labels = self.task.documents(np.concatenate(draws, axis=1), np.repeat(lengths, drawn // lengths))
        within = np.arange(self.sequence_length)
        kept = (drawn.cumsum() - drawn)[:, None] + within
        return {
            "input_ids": torch.from_numpy(tokens[kept]),
            "labels": torch.from_numpy(labels[kept]),
            "document_ids": torch.from_numpy(within // lengths[:, None]).int(),
        }

    def examples(self, length: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Documents of one length, none from training, and the answer at the last token of each.

        Returns:
            tokens: (count, length) int64, or one less where the task has no document of this length.
            answers: (count,) int64.

        Raises:
            UserError: a length that no document has.
        """
        if length < self.task.shortest:
            raise UserError(
                f"there is no document of {length} tokens: the shortest of the task has {self.task.shortest}"
            )
        rng = np.random.default_rng([self.seed, EXAMPLES, length])
        length = self._length(length)
        tokens, labels = self.task.documents(self._draw(rng, count * length), np.full(count, length))
        return torch.from_numpy(tokens.reshape(count, length)), torch.from_numpy(labels[length - 1 :: length])

    def _length(self, longest: int) -> int:
        """Most tokens that a document of at most so many can have."""
        return longest - (longest - self.task.shortest) % self.task.step

    def _draw(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        # 24 bits each: much finer than any choice, and half the generator's work.
        return rng.random((self.task.draws_per_token, tokens), dtype=np.float32)


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
        return self.rows.batch([(position, self.longest_at(position)) for position in positions], TRAINING)


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
        batch = self.rows.batch([(number, self.longest) for number in range(first, first + self.size)], VALIDATION)
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
