"""Data modules: what each rank needs for each optimizer step, and here from prepared token shards."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from mamba3_train.data.batches import TrainingBatches, ValidationBatches
from mamba3_train.data.best_fit import BestFitRows, plans_name, write_plans
from mamba3_train.data.corpus_files import MANIFEST, LocalFiles, RemoteFiles, is_remote
from mamba3_train.data.loader_workers import leave_signals_to_the_trainer
from mamba3_train.data.mixture import Mixture, read_stages
from mamba3_train.data.packing import CutRows, unpack
from mamba3_train.data.preparation import Preparation
from mamba3_train.data.sampler import StepSampler
from mamba3_train.data.shard_cache import ShardCache, default_folder
from mamba3_train.data.token_shards import Manifest, TokenSplit, read_manifest
from mamba3_train.data.tokenizer import FILE_NAME, Tokenizer
from mamba3_train.data.verification import verify_once
from mamba3_train.errors import UserError
from mamba3_train.lean_lightning import lightning

PACKINGS = ("cut", "best_fit")


class BatchDataModule(lightning.LightningDataModule):
    """What every source of batches shares: sizes, the resume cursor, ranks and loaders.

    `setup` of a subclass sets `training`, a data set whose index is a range of positions of the endless order and whose
    item is their batch; `_validation_batches` makes the one of validation.

    Set before the loader is built:
        samples_consumed: the resume cursor, samples consumed by all ranks so far.
        total_steps: optimizer steps of the whole run, those already taken included.

    Args:
        sequence_length: tokens in a row.
        global_batch_size: rows in an optimizer step, over all ranks.
        micro_batch_size: rows in one forward pass of one rank.
        num_workers: loader processes.
    """

    training: Dataset

    def __init__(self, *, sequence_length: int, global_batch_size: int, micro_batch_size: int, num_workers: int):
        super().__init__()
        for key, value in (
            ("sequence_length", sequence_length),
            ("global_batch_size", global_batch_size),
            ("micro_batch_size", micro_batch_size),
        ):
            if value < 1:
                raise UserError(f"data.{key}={value} must be at least 1")
        if num_workers < 0:
            raise UserError(f"data.num_workers={num_workers} must be at least 0")
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.num_workers = num_workers
        self.samples_consumed = 0
        self.total_steps = 0

    def _validation_batches(self) -> Dataset | None:
        """This rank's micro-batches of validation; None when there is nothing to validate on."""
        raise NotImplementedError

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
        batches = self._validation_batches()
        return [] if batches is None else self._loader(batches, sampler=None)

    @property
    def has_validation(self) -> bool:
        """Whether there is anything to validate on."""
        return self._validation_batches() is not None

    def _loader(self, dataset: Dataset, sampler: StepSampler | None) -> DataLoader:
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,  # an item is a whole batch already
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=leave_signals_to_the_trainer,
            # Its own: a loader seeds its workers, and must not move the generator that training draws from.
            generator=torch.Generator(),
        )

    @property
    def rank(self) -> int:
        """This process among all that train."""
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def world_size(self) -> int:
        """Number of processes that train."""
        return self.trainer.world_size if self.trainer is not None else 1

    def documents(self) -> dict[str, str]:
        """Contents by file name of what a run folder holds of the tokenizer, where there is one."""
        return {}

    @property
    def fingerprint(self) -> str | None:
        """What tells a corpus from any other; None where nothing is read."""
        return None

    def check_tokenizer(self, folder: Path) -> None:
        """Refuse to go on with a model whose folder holds a tokenizer that gives other ids; here there is none."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all ranks together consume in one optimizer step."""
        return self.global_batch_size * self.sequence_length


class TokenDataModule(BatchDataModule):
    """Training and validation batches from a prepared folder.

    A batch of training holds everything this rank needs for one optimizer step: `input_ids`, `labels` (int64) and
    `document_ids` (int32), each (global_batch_size / world_size, sequence_length). Batches depend only on the corpus,
    the seed and `samples_consumed`. Loaders hand them out packed, and they are unpacked on the device.

    Args:
        path: the prepared folder, or its remote address (s3://, gs://, https://, …).
        sequence_length: tokens in a row.
        global_batch_size: rows in an optimizer step, over all ranks.
        micro_batch_size: rows in one forward pass of one rank.
        seed: of the order of the rows.
        num_workers: loader processes.
        validation_sequences: rows that a validation reads, at most.
        vocab_size: entries the model expects; None takes those of the corpus.
        packing: how documents fill rows: "cut" lays them end to end and cuts, "best_fit" keeps them whole where it can.
        segment_length: tokens of a row that the model takes at a time, carrying its state on, so that documents longer
            than that need not be cut; None gives it whole rows. Batches are the same.
        mixture: weights of the corpus's sources, `{name: weight}`, or a list of `{from_tokens: N, weights: {…}}` that
            changes them as the run goes; None reads all sources in the proportion of their sizes.
        shuffle_shards: shards of a source whose rows are shuffled together; None shuffles all of them. A remote corpus
            larger than the cache needs it. With cut rows, what a shard has beyond whole rows is then left out.
        cache_dir: folder on a disk of this machine for the shards of a remote corpus; None takes the user's cache.
        cache_gib: most that is kept there, by all runs of this machine together.
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
        segment_length: int | None = None,
        mixture: Mapping | Sequence | None = None,
        shuffle_shards: int | None = None,
        cache_dir: str | None = None,
        cache_gib: float = 64.0,
        prepare: Preparation | None = None,
    ):
        super().__init__(
            sequence_length=sequence_length,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            num_workers=num_workers,
        )
        if shuffle_shards is not None and shuffle_shards < 1:
            raise UserError(f"data.shuffle_shards={shuffle_shards} must be at least 1")
        if segment_length is not None and (segment_length < 1 or sequence_length % segment_length):
            raise UserError(
                f"data.segment_length={segment_length} does not divide data.sequence_length={sequence_length}: choose "
                "a divisor, or null"
            )
        if packing not in PACKINGS:
            raise UserError(f"data.packing={packing} must be one of {', '.join(PACKINGS)}")
        if is_remote(path):
            self.files = RemoteFiles(path, ShardCache(cache_dir or default_folder(), int(cache_gib * 2**30)))
        else:
            self.files = LocalFiles(Path(path))
        self.seed = seed
        self.validation_sequences = validation_sequences
        self.expected_vocab_size = vocab_size
        self.packing = packing
        self.mixture = mixture
        self.shuffle_shards = shuffle_shards
        self.prepare = prepare

    def prepare_data(self) -> None:
        """Make the corpus if it is missing and may be made; compare it with its manifest; a remote one by sizes."""
        if isinstance(self.files, RemoteFiles):
            self.files.expect(self.manifest.files())
            self.files.check_sizes()
            return
        folder = self.files.folder
        if self.prepare is not None and self.prepare.automatic:
            self.prepare.run(folder)
        manifest = self.manifest  # where there is none, the error names the command that makes it
        verify_once(folder)
        if self.packing == "best_fit":
            write_plans(folder, manifest, self.sequence_length)

    def setup(self, stage: str | None = None) -> None:
        """Open the shards and check every size that batches depend on."""
        self.check_batch_size(self.world_size)
        expected = self.expected_vocab_size
        if expected is not None and expected != self.manifest.vocab_size:
            raise UserError(
                f"data.vocab_size={expected} but the corpus {self.files} has {self.manifest.vocab_size} entries; "
                f"set data.vocab_size={self.manifest.vocab_size} or prepare the corpus with the other tokenizer"
            )
        self.training = self._training()
        self.validation = self._rows(self._split("validation"))
        if isinstance(self.files, RemoteFiles):
            self._check_cache()

    def _split(self, split: str, source: str | None = None) -> TokenSplit:
        most_open = self.shuffle_shards if isinstance(self.files, RemoteFiles) else None
        return TokenSplit(self.files, self.manifest, split, source, most_open)

    def _rows(self, split: TokenSplit) -> CutRows | BestFitRows:
        if self.packing == "cut":
            return CutRows(split, self.sequence_length, by_shard=self.shuffle_shards is not None)
        if isinstance(self.files, RemoteFiles) and not self.files.exists(plans_name(self.sequence_length)):
            raise UserError(
                f"data.packing=best_fit needs {plans_name(self.sequence_length)} at the remote corpus {self.files}: "
                f"make it by python -m mamba3_train.prepare plan=DIR sequence_length={self.sequence_length} where the "
                "corpus was made, and upload that folder too"
            )
        return BestFitRows(split, self.sequence_length, padding=self.manifest.end_of_document_id)

    def _training(self) -> TrainingBatches:
        if self.mixture is None:
            mixture, sources = None, {"all": self._split("train")}
        else:
            mixture = Mixture(read_stages(self.mixture, self.sequence_length), self.manifest.sources())
            sources = {name: self._split("train", name) for name in mixture.sources}
        rows = {name: self._rows(split) for name, split in sources.items()}
        for name in rows:
            if not rows[name].count and (mixture is None or mixture.uses(name)):
                which = self.files if mixture is None else f"{self.files}, source {name},"
                raise UserError(
                    f"the corpus {which} has {sources[name].tokens:,} training tokens, fewer than one row of "
                    f"data.sequence_length={self.sequence_length} and its target; give more text or a shorter row"
                )
        return TrainingBatches(rows, mixture, self.seed, self.shuffle_shards)

    def _check_cache(self) -> None:
        """Refuse a cache too small for the shards that are read at once, which would be fetched again for every row."""
        needed = sum(map(self.validation.split.bytes, range(len(self.validation.split.shards))))
        for rows in self.training.sources.values():
            sizes = sorted(map(rows.split.bytes, range(len(rows.split.shards))), reverse=True)
            # Workers pass from one set of shards to the next at different times.
            needed += sum(sizes if self.shuffle_shards is None else sizes[: 2 * self.shuffle_shards])
        limit = self.files.cache.limit_bytes
        if needed > limit:
            raise UserError(
                f"data.cache_gib={limit / 2**30:.4g} is less than the {needed / 2**30:.4g} GiB of shards that are read "
                f"at once with data.shuffle_shards={self.shuffle_shards}: set data.cache_gib={needed / 2**30:.4g}, or "
                "shuffle fewer shards at a time"
            )

    def check_tokenizer(self, folder: Path) -> None:
        """See `BatchDataModule`."""
        other = Tokenizer.from_folder(folder)
        if other is not None and other.backend.get_vocab() != self.tokenizer.backend.get_vocab():
            raise UserError(
                f"the tokenizer in {folder} gives other ids than that of the corpus {self.files}: prepare the corpus "
                f"with tokenizer.file={folder / FILE_NAME}"
            )

    def _validation_batches(self) -> Dataset | None:
        rows = min(self.validation_sequences, self.validation.count)
        if rows == 0:
            return None
        return ValidationBatches(self.validation, rows, self.micro_batch_size, self.rank, self.world_size)

    def on_after_batch_transfer(self, batch: dict[str, torch.Tensor], dataloader_idx: int) -> dict[str, torch.Tensor]:
        """Unpack a batch on the device that it has come to."""
        return unpack(batch)

    def documents(self) -> dict[str, str]:
        """See `Tokenizer.documents`."""
        return self.tokenizer.documents()

    @property
    def fingerprint(self) -> str:
        """See `Manifest.fingerprint`."""
        return self.manifest.fingerprint

    def epochs(self, samples_consumed: int) -> dict[str, float]:
        """How often each source has been read through, fractions included, after so many samples."""
        return self.training.epochs(samples_consumed)

    @cached_property
    def manifest(self) -> Manifest:
        """What the prepared folder holds; when there is none, the error names the command that makes it."""
        if isinstance(self.files, LocalFiles) and not self.files.exists(MANIFEST):
            command = (
                self.prepare.command(self.files.folder)
                if self.prepare
                else (
                    f"python -m mamba3_train.prepare output={self.files} source.path=TEXT tokenizer.train.vocab_size=N"
                )
            )
            raise UserError(f"no prepared corpus at data.path={self.files}; make it by: {command}")
        return read_manifest(self.files)

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return self.manifest.vocab_size if self.expected_vocab_size is None else self.expected_vocab_size

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the corpus was made with."""
        return Tokenizer.of_corpus(self.files, self.manifest.end_of_document_id)
