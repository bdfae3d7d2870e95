"""Tensors by name, whole or sharded (DTensor), in and out of safetensors files, one a rank.

The files are those of torch.distributed.checkpoint's Hugging Face format: every rank writes its pieces, where a piece
lies in its tensor stands in the file's metadata, and a load on any number of ranks reads what each of them needs.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from mamba3_train.errors import UserError

_CHUNK_BYTES = 1 << 24
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A part of a tensor, on the CPU: the tensor's name, where in it the part begins, and the values."""

    name: str
    offsets: tuple[int, ...]
    values: Tensor


class Stager:
    """Copies this rank's share of a checkpoint into memory, so that training may go on while it is written.

    What several ranks hold alike is shared out among them. Who writes what is agreed at the first call, which also
    allocates the copies (pinned where there is a GPU) and so is slower; the next calls overwrite them.

    Args:
        exchange: gives rank 0 a list of every rank's value, calls the function on it, and returns to each rank its
            element of the result.
    """

    def __init__(self, exchange: Callable):
        self._exchange = exchange
        self._items: list[WriteItem] | None = None
        self._copies: dict[str, Tensor] = {}

    def begin(self, tensors: Mapping[str, Tensor]) -> Callable[[], list[Piece]]:
        """What copies the pieces that this rank has to write, by any thread, before the tensors change.

        Names, shapes and layouts of the tensors must be the same at every call.
        """
        if self._items is None:
            self._items = self._share_out(tensors)
        sources, pieces = [], []
        for item in self._items:
            tensor = tensors[item.index.fqn]
            values = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            if values.numel():
                sources.append(values)
                copy = self._copy_of(item.index.fqn, values)
                pieces.append(Piece(item.index.fqn, tuple(item.tensor_data.chunk.offsets), copy))
        stream, ready = _copy_stream(sources)

        def copy() -> list[Piece]:
            with torch.cuda.stream(stream):  # None, without a GPU, does nothing
                if stream is not None:
                    stream.wait_event(ready)
                for source, piece in zip(sources, pieces, strict=True):
                    piece.values.copy_(source, non_blocking=True)
            if stream is not None:
                stream.synchronize()
            sources.clear()
            return pieces

        return copy

    def _share_out(self, tensors: Mapping[str, Tensor]) -> list[WriteItem]:
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
        planner.set_up_planner(dict(tensors), is_coordinator=not dist.is_initialized() or dist.get_rank() == 0)
        mine = self._exchange(planner.create_local_plan(), lambda plans: planner.create_global_plan(plans)[0])
        return planner.finish_plan(mine).items

    def _copy_of(self, name: str, values: Tensor) -> Tensor:
        if name not in self._copies:
            pinned = values.device.type == "cuda"
            self._copies[name] = torch.zeros(values.shape, dtype=values.dtype, device="cpu", pin_memory=pinned)
        return self._copies[name]


def _copy_stream(sources: list[Tensor]) -> tuple[torch.cuda.Stream | None, torch.cuda.Event | None]:
    """A stream beside training's and the moment from which it may read, where there is a GPU."""
    device = next((source.device for source in sources if source.device.type == "cuda"), None)
    if device is None:
        return None, None
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(device))
    return torch.cuda.Stream(device), ready


def write_shard(path: Path, pieces: list[Piece]) -> dict:
    """Write pieces as one safetensors file, to the disk; returns its `bytes` and `sha256`.

    Not by the safetensors library, which copies the whole twice and holds Python's lock meanwhile: training would stand
    still. Here both writing and hashing release it.
    """
    # Wide types first keep every tensor aligned.
    pieces = sorted(pieces, key=lambda piece: (-piece.values.element_size(), piece.name))
    offsets = {piece.name: {"saved_offsets": piece.offsets} for piece in pieces}
    header: dict[str, dict] = {
        "__metadata__": {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    }
    position = 0
    for piece in pieces:
        end = position + piece.values.nbytes
        shape = list(piece.values.shape)
        header[piece.name] = {"dtype": _DTYPES[piece.values.dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for content in (len(text).to_bytes(8, "little"), text, *(_bytes(piece.values) for piece in pieces)):
            for start in range(0, len(content), _CHUNK_BYTES):
                chunk = content[start : start + _CHUNK_BYTES]
                file.write(chunk)
                digest.update(chunk)
            size += len(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def load(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place from a checkpoint; those it has besides are left alone.

    Raises:
        UserError: the checkpoint lacks a tensor, or has it in another shape.
    """
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (dcp.CheckpointException, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"the checkpoint {folder} does not fit this model: {reason}") from error


def shapes(folder: Path) -> dict[str, torch.Size]:
    """Shape of every tensor of a checkpoint by name."""
    metadata = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in metadata.items()}


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())
