"""Weights on the disk as a mapping from names to whole tensors, each read when it is asked for."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mamba3_train.errors import UserError

SAFETENSORS = "model.safetensors"


class Weights(Mapping[str, Tensor]):
    """Tensors by name; their shapes are known without reading them.

    Args:
        shapes: of every tensor, whole.
        read: gives a whole tensor by its name, on the CPU.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], read: Callable[[str], Tensor]):
        self.shapes, self._read = dict(shapes), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def renamed(self, rename: Callable[[str], str | None]) -> "Weights":
        """The same under other names; those that become None are left out."""
        old = {new: name for name in self.shapes if (new := rename(name)) is not None}
        return Weights({new: self.shapes[name] for new, name in old.items()}, lambda new: self[old[new]])


class Piece(NamedTuple):
    """A part of a tensor: the file it is in, where in the tensor it begins, and its size."""

    file: safe_open
    begin: tuple[int, ...]
    size: tuple[int, ...]


def read_safetensors(files: Iterable[Path]) -> Weights:
    """Tensors of safetensors files: whole ones, and those that ranks wrote in pieces (`checkpoint/sharded.py`).

    The files stay open, mapped into memory, as long as the weights are in use.

    Raises:
        UserError: a file is missing or is no safetensors file.
    """
    pieces: dict[str, list[Piece]] = {}
    for file in map(_open, files):
        placed = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
        for name in file.keys():  # noqa: SIM118 (no mapping)
            size = tuple(file.get_slice(name).get_shape())
            begin = tuple(placed.get(name, {}).get("saved_offsets", (0,) * len(size)))
            pieces.setdefault(name, []).append(Piece(file, begin, size))
    shapes = {name: _whole_shape(parts) for name, parts in pieces.items()}

    def read(name: str) -> Tensor:
        whole = None
        for piece in pieces[name]:
            values = piece.file.get_tensor(name)
            if values.shape == shapes[name]:
                return values
            whole = torch.empty(shapes[name], dtype=values.dtype) if whole is None else whole
            whole[tuple(slice(b, b + s) for b, s in zip(piece.begin, piece.size, strict=True))] = values
        return whole

    return Weights(shapes, read)


def safetensors_files(folder: Path) -> list[Path]:
    """Files of a folder in the Hugging Face way: model.safetensors, or those its index names; none where it has none.

    Raises:
        UserError: an index that cannot be read.
    """
    index = folder / f"{SAFETENSORS}.index.json"
    if not index.exists():
        return [folder / SAFETENSORS] if (folder / SAFETENSORS).exists() else []
    try:
        names = json.loads(index.read_text())["weight_map"].values()
        return [folder / Path(name).name for name in sorted(set(names))]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{index} is not an index of safetensors files: {error}") from error


def check_fits(shapes: Mapping[str, torch.Size], module: nn.Module) -> None:
    """Raise UserError unless the shapes are exactly those of the module's parameters, naming what is not."""
    expected = {name: parameter.shape for name, parameter in module.named_parameters()}
    missing, unexpected = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing or unexpected:
        raise UserError(
            f"the checkpoint does not fit its config: missing {missing or 'nothing'}, "
            f"unexpected {unexpected or 'nothing'}"
        )
    for name, shape in expected.items():
        check_shape(name, shapes[name], shape)


def check_shape(name: str, shape: torch.Size, expected: torch.Size) -> None:
    """Raise UserError unless a parameter has the shape that the config asks for."""
    if tuple(shape) != tuple(expected):
        raise UserError(f"parameter {name} has shape {tuple(shape)}, the config asks for {tuple(expected)}")


def _whole_shape(pieces: list[Piece]) -> torch.Size:
    ends = [[b + s for b, s in zip(piece.begin, piece.size, strict=True)] for piece in pieces]
    return torch.Size([max(dimension) for dimension in zip(*ends, strict=True)])


def _open(path: Path):
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the weights in {path.parent} cannot be read: {path.name}: {reason}") from None
