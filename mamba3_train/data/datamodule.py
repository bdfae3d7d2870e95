"""The data module: prepared token shards -> what each rank needs for each optimizer step."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mamba3_train.data.batches import TrainingBatches, ValidationBatches
from mamba3_train.data.best_fit import BestFitRows, write_plans
from mamba3_train.data.mixture import Mixture, read_stages
from mamba3_train.data.packing import CutRows, unpack
from mamba3_train.data.preparation import Preparation
from mamba3_train.data.sampler import StepSampler
from mamba3_train.data.token_shards import MANIFEST, Manifest, TokenSplit, read_manifest, verify
from mamba3_train.data.tokenizer import Tokenizer
from mamba3_train.errors import UserError

# A corpus up to this size is hashed whole at every start (about a second a GiB); a larger one is checked by file sizes,
# and in full by `python -m mamba3_train.prepare verify=DIR`.
HASH_AT_START_BYTES = 1 << 30

PACKINGS = ("cut", "best_fit")


class TokenDataModule(lightning.LightningDataModule):
    """Training and validation batches from a prepared folder.

    A batch of training holds everything this rank needs for one optimizer step: `input_ids`, `labels` (int64) and
    `document_ids` (int32), each (global_batch_size / world_size, sequence_length). Batches depend only on the corpus,
    the seed and `samples_consumed`. Loaders hand them out packed, and they are unpacked on the device.

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
        packing: how documents fill rows: "cut" lays them end to end and cuts, "best_fit" keeps them whole where it can.
        mixture: weights of the corpus's sources, `{name: weight}`, or a list of `{from_tokens: N, weights: {…}}` that
            changes them as the run goes; None reads all sources in the proportion of their sizes.
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
        packing: str = "cut",
        mixture: Mapping | Sequence | None = None,
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
        if packing not in PACKINGS:
            raise UserError(f"data.packing={packing} must be one of {', '.join(PACKINGS)}")
        self.path = Path(path)
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.validation_sequences = validation_sequences
        self.expected_vocab_size = vocab_size
        self.packing = packing
        self.mixture = mixture
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
        if self.packing == "best_fit":
            write_plans(self.path, manifest, self.sequence_length)

    def setup(self, stage: str | None = None) -> None:
        """Open the shards and check every size that batches depend on."""
        self.check_batch_size(self.world_size)
        expected = self.expected_vocab_size
        if expected is not None and expected != self.manifest.vocab_size:
            raise UserError(
                f"data.vocab_size={expected} but the corpus {self.path} has {self.manifest.vocab_size} entries; "
                f"set data.vocab_size={self.manifest.vocab_size} or prepare the corpus with the other tokenizer"
            )
        self.training = self._training()
        self.validation = self._rows(TokenSplit(self.path, self.manifest, "validation"))

    def _rows(self, split: TokenSplit) -> CutRows | BestFitRows:
        if self.packing == "best_fit":
            return BestFitRows(split, self.sequence_length, padding=self.manifest.end_of_document_id)
        return CutRows(split, self.sequence_length)

    def _training(self) -> TrainingBatches:
        if self.mixture is None:
            mixture, sources = None, {"all": TokenSplit(self.path, self.manifest, "train")}
        else:
            mixture = Mixture(read_stages(self.mixture, self.sequence_length), self.manifest.sources())
            sources = {name: TokenSplit(self.path, self.manifest, "train", name) for name in mixture.sources}
        rows = {name: self._rows(split) for name, split in sources.items()}
        for name in rows:
            if not rows[name].count and (mixture is None or mixture.uses(name)):
                which = self.path if mixture is None else f"{self.path}, source {name},"
                raise UserError(
                    f"the corpus {which} has {sources[name].tokens:,} training tokens, fewer than one row of "
                    f"data.sequence_length={self.sequence_length} and its target; give more text or a shorter row"
                )
        return TrainingBatches(rows, mixture, self.seed)

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
        return self._loader(self.training, sampler)

    def val_dataloader(self) -> DataLoader | list:
        """Loader over this rank's micro-batches of validation rows; none when there is nothing to validate on."""
        rows = min(self.validation_sequences, self.validation.count)
        if rows == 0:
            return []
        batches = ValidationBatches(self.validation, rows, self.micro_batch_size, self.rank, self.world_size)
        return self._loader(batches, sampler=None)

    def _loader(self, dataset: Dataset, sampler: StepSampler | None) -> DataLoader:
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,  # an item is a whole batch already
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            # Its own: a loader seeds its workers, and must not move the generator that training draws from.
            generator=torch.Generator(),
        )

    def on_after_batch_transfer(self, batch: dict[str, torch.Tensor], dataloader_idx: int) -> dict[str, torch.Tensor]:
        """Unpack a batch on the device that it has come to."""
        return unpack(batch)

    def epochs(self, samples_consumed: int) -> dict[str, float]:
        """How often each source has been read through, fractions included, after so many samples."""
        return self.training.epochs(samples_consumed)

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
