"""Writing a trained model for other programs: Hugging Face's layout, the public `mamba_ssm` layout, plain safetensors.

A folder is written under a hidden name and renamed when it is whole.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mamba3_train.checkpoint.model_card import model_card
from mamba3_train.checkpoint.official_mamba import save_official
from mamba3_train.checkpoint.pretrained import CONFIG, CONFIG_KEY, MODEL_TYPE, Pretrained
from mamba3_train.checkpoint.weights import SAFETENSORS
from mamba3_train.errors import UserError
from mamba3_train.model.initialization import keeps_float32

_HERE = Path(__file__).parent
_MODELING = _HERE / "templates" / "modeling_mamba3.py"
_SCAN = _HERE.parent / "kernels" / "reference.py"
"""The definition of the scan needs torch alone, so it is shipped as it is."""

# The public code rounds the widths of MLPs up to a multiple of this.
PUBLIC_MLP_MULTIPLE = 128


def refuse_used(output: Path) -> None:
    """Raise UserError if something is there already that is not an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output={output} is there already and not empty: choose another folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `output` when all went well and is gone otherwise.

    Raises:
        UserError: output is there and not empty, or cannot be written.
    """
    refuse_used(output)
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export_hugging_face(
    pretrained: Pretrained,
    folder: Path,
    documents: Mapping[str, str],
    end_of_document_id: int | None,
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Write what `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads, and a model card.

    Args:
        pretrained: the model; its weights are read and written one file at a time.
        folder: exists and is empty.
        documents: of the tokenizer, by file name; may be empty.
        end_of_document_id: where generation ends, if it is known.
        dtype: of the matrices; dynamics and norms are float32 or wider.
        shard_bytes: most that one file of weights holds, if that is more than one tensor.
    """
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}[dtype]
    config = {
        "architectures": ["Mamba3ForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_mamba3.Mamba3Config",
            "AutoModel": "modeling_mamba3.Mamba3Model",
            "AutoModelForCausalLM": "modeling_mamba3.Mamba3ForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "dtype": name,
        CONFIG_KEY: pretrained.config.to_dict(),
    }
    ids = {} if end_of_document_id is None else {"eos_token_id": end_of_document_id, "pad_token_id": end_of_document_id}
    _write_json(folder / CONFIG, config | ids)
    _write_json(folder / "generation_config.json", {"do_sample": True, **ids})
    _write_documents(folder, documents)
    shutil.copyfile(_MODELING, folder / _MODELING.name)
    shutil.copyfile(_SCAN, folder / "mamba3_scan.py")
    _write_weights(pretrained, folder, dtype, shard_bytes, _hugging_face_name)
    (folder / "README.md").write_text(model_card(pretrained, name))


def export_safetensors(
    pretrained: Pretrained, folder: Path, documents: Mapping[str, str], dtype: torch.dtype, shard_bytes: int
) -> None:
    """Write the weights by our own names and the model's config; arguments as above."""
    _write_json(folder / CONFIG, {"model_type": MODEL_TYPE, CONFIG_KEY: pretrained.config.to_dict()})
    _write_documents(folder, documents)
    _write_weights(pretrained, folder, dtype, shard_bytes, lambda name: name)


def export_official(pretrained: Pretrained, folder: Path, documents: Mapping[str, str]) -> None:
    """Write the public `mamba_ssm` layout in float32, MLPs widened by zeros to a width that the public code builds.

    Raises:
        UserError: the model has layers or settings that the public code does not know.
    """
    save_official(pretrained.build(kernels="reference"), folder, mlp_multiple=PUBLIC_MLP_MULTIPLE)
    _write_documents(folder, documents)


def _hugging_face_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _write_weights(
    pretrained: Pretrained, folder: Path, dtype: torch.dtype, shard_bytes: int, rename: Callable[[str], str]
) -> None:
    """One safetensors file, or several and their index; one at a time is in memory."""
    wide = torch.promote_types(dtype, torch.float32)
    dtypes = {name: wide if keeps_float32(name) else dtype for name in pretrained.weights}
    sizes = {name: shape.numel() * dtypes[name].itemsize for name, shape in pretrained.weights.shapes.items()}
    shards = _share_out(sizes, shard_bytes)
    places = {}
    for number, names in enumerate(shards, start=1):
        file = SAFETENSORS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {
            rename(name): pretrained.weights[name].to(dtypes[name]).contiguous() for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / CONFIG, folder / file)  # as for any file: the library keeps its own from others
        places |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        _write_json(folder / f"{SAFETENSORS}.index.json", index)


def _share_out(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, in groups that hold no more than `most` bytes where they hold more than one."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _write_documents(folder: Path, documents: Mapping[str, str]) -> None:
    for name, text in documents.items():
        (folder / name).write_text(text)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
