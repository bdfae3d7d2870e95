"""Opening what was trained: the model ready for use, its tokenizer, and a phrase that says what it is."""

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from mamba3_train.checkpoint.pretrained import Pretrained, open_pretrained
from mamba3_train.data.token_shards import read_manifest
from mamba3_train.data.tokenizer import Tokenizer
from mamba3_train.errors import UserError
from mamba3_train.model import Mamba3LM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, without gradients, and what belongs to it.

    tokenizer: None only where `open_trained_model` was told that none is needed.
    description: one phrase, e.g. `runs/quickstart, step 280`.
    step: of the checkpoint of a run, else None.
    run_config: the resolved config of a run, else None.
    """

    model: Mamba3LM
    tokenizer: Tokenizer | None
    description: str
    step: int | None
    run_config: DictConfig | None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embedding.weight.device


def open_trained_model(
    folder: str | Path,
    *,
    step: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    tokenizer: str | None = None,
    tokenizer_needed: bool = True,
) -> TrainedModel:
    """Open a run, one of its checkpoints, an exported folder or a public `mamba_ssm` checkpoint.

    Args:
        folder: see `checkpoint.pretrained.open_pretrained`.
        step: which checkpoint of a run; None takes the newest whole one.
        device: where to put the model; `auto` is the GPU where there is one.
        dtype: of the matrices: float32, bfloat16, float64; `auto` is bfloat16 on a GPU that has it, else float32.
            Dynamics, norms and the residual stream are float32 or wider.
        kernels: backend of the scan.
        tokenizer: a tokenizer.json, a folder with one, or a name on the hub, in place of the folder's own.
        tokenizer_needed: False gives None where there is no tokenizer instead of refusing.

    Raises:
        UserError: the folder holds no model, or a broken one; no tokenizer, or one of another vocabulary; no such
            device or dtype.
    """
    place = choose_device(device)
    number = choose_dtype(dtype, place)
    pretrained = open_pretrained(folder, step)
    found = find_tokenizer(pretrained, tokenizer)
    if found is None and tokenizer_needed:
        raise UserError(f"{folder} holds no tokenizer: name one by tokenizer=PATH/tokenizer.json, or a name on the hub")
    if found is not None and found.vocab_size > pretrained.config.padded_vocab_size:
        raise UserError(
            f"the tokenizer has {found.vocab_size} entries, the model of {folder} {pretrained.config.vocab_size}: "
            "it is not the tokenizer this model was trained with"
        )
    model = pretrained.build(device=place, dtype=number, kernels=kernels)
    return TrainedModel(model, found, pretrained.description, pretrained.step, pretrained.run_config)


def find_tokenizer(pretrained: Pretrained, chosen: str | None = None) -> Tokenizer | None:
    """The chosen tokenizer, or that beside a model, or that of the corpus a run was trained on; None where none is.

    Raises:
        UserError: the chosen one, or that beside the model, cannot be read.
    """
    if chosen is not None:
        is_path = Path(chosen).exists() or chosen.endswith(".json") or chosen.startswith((".", "/"))
        return Tokenizer.from_file(chosen) if is_path else Tokenizer.from_hub(chosen)
    beside = Tokenizer.from_folder(pretrained.folder)
    corpus = pretrained.run_config.data.get("path") if pretrained.run_config is not None else None
    if beside is not None or corpus is None:
        return beside
    # A run of before run folders held their tokenizer.
    try:
        return Tokenizer.of_corpus(corpus, read_manifest(corpus).end_of_document_id)
    except UserError:
        return None


def choose_device(name: str) -> torch.device:
    """The device of a name; `auto` is the GPU where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; `auto` is bfloat16 on a GPU that computes in it, else float32.

    Raises:
        UserError: any other name.
    """
    if name == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if half else torch.float32
    if name not in DTYPES:
        raise UserError(f"dtype={name} must be auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]
