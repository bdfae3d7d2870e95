"""Best-fit packing: which documents share a row, so that few are cut and little of a row stays empty.

A document longer than a row first gives whole rows; what remains of it, and every shorter document, goes entire into
the fullest row that still has room, longest first. Rows are planned shard by shard, once, and the plan is kept beside
the shards, so that a row is found by its number alone.
"""

import json
import os
from bisect import bisect_left, insort
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from mamba3_train.data.corpus_files import LocalFiles, StoredFile
from mamba3_train.data.folder_lock import locked
from mamba3_train.data.packing import Rows
from mamba3_train.data.shard_writer import publish
from mamba3_train.data.token_shards import Manifest, Shard, TokenSplit, groups
from mamba3_train.errors import UserError


def plan_shard(offsets: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Plan rows of `length` tokens for documents given by their offsets in a shard.

    Returns:
        pieces: (n, 2) int64, first token and number of tokens of each piece, row after row.
        firsts: (rows + 1,) int64, the first piece of each row, and the end.
    """
    begins, sizes = offsets[:-1], np.diff(offsets)
    whole = sizes // length
    # Whole rows of long documents: piece i of a document begins i rows after the document.
    number = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)
    whole_begins = np.repeat(begins, whole) + number * length
    rest_begins, rest_sizes = begins + whole * length, sizes - whole * length
    longest_first = np.argsort(-rest_sizes, kind="stable")
    longest_first = longest_first[rest_sizes[longest_first] > 0]
    row_of = _best_fit(rest_sizes[longest_first].tolist(), length)
    by_row = np.argsort(row_of, kind="stable")
    order = longest_first[by_row]
    pieces = np.concatenate(
        [
            np.stack([whole_begins, np.full(len(whole_begins), length)], axis=1),
            np.stack([rest_begins[order], rest_sizes[order]], axis=1),
        ]
    )
    pieces_in_row = np.concatenate([np.ones(len(whole_begins), dtype=np.int64), np.bincount(row_of)])
    return pieces.astype("<i8"), np.concatenate([[0], np.cumsum(pieces_in_row)]).astype("<i8")


def _best_fit(sizes: list[int], length: int) -> np.ndarray:
    """Row of each piece: the fullest one with room for it, or a new one."""
    rows_with: dict[int, list[int]] = {}  # free tokens -> rows with exactly so many
    free: list[int] = []  # the keys of rows_with, sorted
    row_of = np.empty(len(sizes), dtype=np.int64)
    count = 0
    for piece, size in enumerate(sizes):
        place = bisect_left(free, size)
        if place == len(free):
            row, room = count, length
            count += 1
        else:
            room = free[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room], free[place]
        row_of[piece] = row
        room -= size
        if room:
            if room not in rows_with:
                rows_with[room] = []
                insort(free, room)
            rows_with[room].append(row)
    return row_of


def plans_name(length: int) -> str:
    """The file that lists the plans for a length of rows, within a corpus."""
    return f"best_fit-{length}/plans.json"


def _plan_name(shard: Shard, length: int) -> str:
    return f"best_fit-{length}/{shard.name}.npy"


def write_plans(folder: Path, manifest: Manifest, length: int) -> None:
    """Plan every shard that has no plan yet, in parallel; a plan names the shard content it was made for.

    Runs that begin together wait for the first of them: what one has begun to read must not be written again.

    Raises:
        UserError: the folder cannot be written to.
    """
    index_path = folder / plans_name(length)
    if not _unplanned(index_path, manifest)[1]:
        return
    try:
        index_path.parent.mkdir(exist_ok=True)
        with locked(index_path.parent, f"plans rows of {folder}"):
            index, missing = _unplanned(index_path, manifest)
            if not missing:
                return
            with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("fork")) as executor:
                entries = list(executor.map(_write_plan, *zip(*((folder, s, length) for s in missing), strict=True)))
            index |= {shard.name: entry for shard, entry in zip(missing, entries, strict=True)}
            publish(index_path, json.dumps(index, indent=1).encode())
    except PermissionError as error:
        raise UserError(f"data.packing=best_fit keeps its plan in {index_path.parent}, which is read-only") from error


def _unplanned(index_path: Path, manifest: Manifest) -> tuple[dict, list[Shard]]:
    """The index of plans, and the shards that it has no plan for."""
    index = json.loads(index_path.read_text()) if index_path.is_file() else {}
    return index, [s for s in manifest.shards() if index.get(s.name, {}).get("offsets_sha256") != s.offsets_sha256]


def _write_plan(folder: Path, shard: Shard, length: int) -> dict:
    """Write the plan of one shard; returns its entry of the index."""
    offsets = np.load(folder / f"{shard.name}.offsets.npy", allow_pickle=False)
    pieces, firsts = plan_shard(offsets, length)
    name = _plan_name(shard, length)
    # One file, so that it is whole or absent: the number of rows, the first piece of each, the pieces.
    with open(folder / name, "wb") as file:
        np.save(file, np.concatenate([[len(firsts) - 1], firsts, pieces.ravel()]).astype("<i8"))
    return {
        "rows": len(firsts) - 1,
        "offsets_sha256": shard.offsets_sha256,
        "bytes": os.path.getsize(folder / name),
        "sha256": LocalFiles(folder).sha256(name),
    }


class BestFitRows:
    """Rows packed by a plan; see `CutRows` for the other way.

    Args:
        split: the documents.
        sequence_length: inputs in a row.
        padding: the token that fills what stays empty; no loss is taken there.
    """

    def __init__(self, split: TokenSplit, sequence_length: int, padding: int):
        self.split = split
        self.sequence_length = sequence_length
        self.padding = padding
        index = json.loads(split.files.read(plans_name(sequence_length))) if split.shards else {}
        entries = [index[shard.name] for shard in split.shards]
        split.attach(
            [
                StoredFile(_plan_name(shard, sequence_length), entry["bytes"], entry["sha256"])
                for shard, entry in zip(split.shards, entries, strict=True)
            ]
        )
        self.row_starts = np.cumsum([0, *(entry["rows"] for entry in entries)])
        self.count = int(self.row_starts[-1])

    def read(self, rows: np.ndarray) -> Rows:
        """Read rows by number, each in [0, count)."""
        length = self.sequence_length
        tokens = np.full((len(rows), length + 1), self.padding, dtype=self.split.dtype)
        filled = np.zeros(len(rows), dtype=np.int64)
        boundaries = []
        numbers = np.searchsorted(self.row_starts, rows, side="right") - 1
        places = rows - self.row_starts[numbers]
        for here in groups(numbers):
            stored, offsets, plan = self.split.shard(int(numbers[here[0]]))
            pieces = plan[int(plan[0]) + 2 :].reshape(-1, 2)
            firsts, lasts = plan[1 + places[here]], plan[2 + places[here]]
            for row, first, last in zip(here.tolist(), firsts.tolist(), lasts.tolist(), strict=True):
                column = 0
                for begin, size in pieces[first:last].tolist():
                    end = begin + size
                    tokens[row, column : column + size] = stored[begin:end]
                    column += size
                    if size == length and offsets[np.searchsorted(offsets, end)] != end:
                        tokens[row, length] = stored[end]  # the document goes on: its next token is the last target
                    else:
                        boundaries.append((row, column))
                filled[row] = column
        found = np.array(boundaries, dtype=np.int64).reshape(-1, 2)
        return Rows(tokens, found[:, 0], found[:, 1], filled)
