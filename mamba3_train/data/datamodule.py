"""The data module: prepared token shards -> what each rank needs for each optimizer step."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mamba3_train.data.packing import IGNORED_LABEL, pack
from mamba3_train.data.preparation import Preparation
from mamba3_train.data.sampler import StepSampler, samples_at
from mamba3_train.data.token_shards import MANIFEST, Manifest, TokenSplit, read_manifest, verify
from mamba3_train.data.tokenizer import Tokenizer
from mamba3_train.errors import UserError

# A corpus up to this size is hashed whole at every start (about a second a GiB); a larger one is checked by file sizes,
# and in full by `python -m mamba3_train.prepare verify=DIR`.
HASH_AT_START_BYTES = 1 << 30


class TrainingSteps(Dataset):
    """Map-style data set whose index is a range of positions of the global order and whose item is their batch.

    Args:
        split: the tokens to cut rows from, one row after another, so that every token is a target exactly once.
        sequence_length: tokens in a row.
        seed: of the shuffling; None keeps the rows in the order of the corpus.
    """

    def __init__(self, split: TokenSplit, sequence_length: int, seed: int | None):
        self.split = split
        self.sequence_length = sequence_length
        self.seed = seed
        self.rows = max(0, (split.tokens - 1) // sequence_length)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        if not isinstance(positions, (range, np.ndarray)):
            raise TypeError(
                "an item is a range of positions, not one: something replaced the sampler; "
                "set use_distributed_sampler=False in the Trainer"
            )
        rows = np.asarray(positions, dtype=np.int64)
        if self.seed is not None:
            rows = samples_at(rows, self.rows, self.seed)
        return pack(*self.split.read(rows * self.sequence_length, self.sequence_length + 1))


class ValidationSteps(Dataset):
    """The first `rows` rows of a split in fixed order, as micro-batches of one rank.

    Every rank gets the same number of full micro-batches, whatever `rows` is: rows beyond the end repeat the last one
    with every label ignored, so that the set of targets does not depend on the number of ranks.
    """

    def __init__(self, data: TrainingSteps, rows: int, micro_batch_size: int, rank: int, world_size: int):
        self.data = data
        self.rows = rows
        self.micro_batch_size = micro_batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-self.rows // (self.micro_batch_size * self.world_size))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = (index * self.world_size + self.rank) * self.micro_batch_size
        positions = np.arange(first, first + self.micro_batch_size)
        batch = self.data[np.minimum(positions, self.rows - 1)]
        batch["labels"][torch.from_numpy(positions >= self.rows)] = IGNORED_LABEL
        return batch


class TokenDataModule(lightning.LightningDataModule):
    """Training and validation batches from a prepared folder.

    An item of the training loader holds everything this rank needs for one optimizer step: `input_ids`, `labels`
    (int64) and `document_ids` (int32), each (global_batch_size / world_size, sequence_length). Items depend only on
    the corpus, the seed and `samples_consumed`.

    Set before the loader is built:
        samples_consumed: the resume cursor, samples consumed by all ranks so far.
        total_steps: optimizer steps of the whole run, those already taken included.

    Args:
        path: the prepared folder.
        sequence_length: tokens in a row.
        global_batch_size: rows in an optimizer step, over all ranks.
        micro_batch_size: rows in one forward pass of one rank.
        seed: of the order of the rows.
        num_workers: loader processes.
        validation_sequences: rows that a validation reads, at most.
        vocab_size: entries the model expects; None takes those of the corpus.
        prepare: how the corpus is made when it is missing.

    Raises:
        UserError: sizes that do not divide, or a corpus that is missing, empty, too short, corrupt, or of another
            vocabulary.
    """

    def __init__(
        self,
        *,
        path: str,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int = 0,
        num_workers: int = 2,
        validation_sequences: int = 256,
        vocab_size: int | None = None,
        prepare: Preparation | None = None,
    ):
        super().__init__()
        for key, value in (
            ("sequence_length", sequence_length),
            ("global_batch_size", global_batch_size),
            ("micro_batch_size", micro_batch_size),
        ):
            if value < 1:
                raise UserError(f"data.{key}={value} must be at least 1")
        self.path = Path(path)
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.validation_sequences = validation_sequences
        self.expected_vocab_size = vocab_size
        self.prepare = prepare
        self.samples_consumed = 0
        self.total_steps = 0

    def prepare_data(self) -> None:
        """Make the corpus if it is missing and may be made, and check the whole of a small one."""
        if self.prepare is not None and self.prepare.automatic:
            self.prepare.run(self.path)
        manifest = self.manifest
        item_size = np.dtype(manifest.dtype).itemsize
        if sum(shard.tokens for shard in manifest.shards()) * item_size <= HASH_AT_START_BYTES:
            verify(self.path)

    def setup(self, stage: str | None = None) -> None:
        """Open the shards and check every size that batches depend on."""
        self.check_batch_size(self.world_size)
        expected = self.expected_vocab_size
        if expected is not None and expected != self.manifest.vocab_size:
            raise UserError(
                f"data.vocab_size={expected} but the corpus {self.path} has {self.manifest.vocab_size} entries; "
                f"set data.vocab_size={self.manifest.vocab_size} or prepare the corpus with the other tokenizer"
            )
        self.train_data = TrainingSteps(TokenSplit(self.path, self.manifest, "train"), self.sequence_length, self.seed)
        if not len(self.train_data):
            raise UserError(
                f"the corpus {self.path} has {self.train_data.split.tokens:,} training tokens, fewer than one row of "
                f"data.sequence_length={self.sequence_length} and its target; give more text or a shorter row"
            )
        validation = TokenSplit(self.path, self.manifest, "validation")
        self.validation_data = TrainingSteps(validation, self.sequence_length, seed=None)

    def check_batch_size(self, world_size: int) -> None:
        """Refuse a global batch that ranks and micro-batches do not divide."""
        per_pass = world_size * self.micro_batch_size
        if self.global_batch_size % per_pass:
            nearest = max(1, round(self.global_batch_size / per_pass)) * per_pass
            raise UserError(
                f"data.global_batch_size={self.global_batch_size} is not a multiple of {per_pass} = {world_size} ranks "
                f"× data.micro_batch_size={self.micro_batch_size}; set data.global_batch_size={nearest} "
                "or another data.micro_batch_size"
            )

    def train_dataloader(self) -> DataLoader:
        """Loader over the optimizer steps that remain; its length is `total_steps`, which is how Lightning counts."""
        if self.total_steps < 1:
            raise ValueError("set total_steps before building the training loader")
        sampler = StepSampler(
            samples_consumed=self.samples_consumed,
            steps=max(0, self.total_steps - self.samples_consumed // self.global_batch_size),
            length=self.total_steps,
            global_batch_size=self.global_batch_size,
            rank=self.rank,
            world_size=self.world_size,
        )
        return self._loader(self.train_data, sampler)

    def val_dataloader(self) -> DataLoader | list:
        """Loader over this rank's micro-batches of validation rows; none when there is nothing to validate on."""
        rows = min(self.validation_sequences, len(self.validation_data))
        if rows == 0:
            return []
        steps = ValidationSteps(self.validation_data, rows, self.micro_batch_size, self.rank, self.world_size)
        return self._loader(steps, sampler=None)

    def _loader(self, dataset: Dataset, sampler: StepSampler | None) -> DataLoader:
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,  # an item is a whole batch already
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    @property
    def rank(self) -> int:
        """This process among all that train."""
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def world_size(self) -> int:
        """Number of processes that train."""
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all ranks together consume in one optimizer step."""
        return self.global_batch_size * self.sequence_length

    @cached_property
    def manifest(self) -> Manifest:
        """What the prepared folder holds; when there is none, the error names the command that makes it."""
        if not (self.path / MANIFEST).is_file():
            command = (
                self.prepare.command(self.path)
                if self.prepare
                else (
                    f"python -m mamba3_train.prepare output={self.path} source.path=TEXT tokenizer.train.vocab_size=N"
                )
            )
            raise UserError(f"no prepared corpus at data.path={self.path}; make it by: {command}")
        return read_manifest(self.path)

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return self.manifest.vocab_size if self.expected_vocab_size is None else self.expected_vocab_size

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the corpus was made with."""
        return Tokenizer.of_corpus(self.path, self.manifest.end_of_document_id)
