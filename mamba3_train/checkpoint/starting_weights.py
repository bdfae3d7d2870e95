"""Trained weights as the first values of a new run: fine-tuning and continued pretraining."""

from pathlib import Path

import torch
from torch import Tensor

from mamba3_train.checkpoint.pretrained import open_pretrained
from mamba3_train.errors import UserError
from mamba3_train.model import Mamba3Config
from mamba3_train.model.initialization import first_value

# Fields that shape the first values of parameters and nothing else.
_INITIAL_ONLY = ("mixer.dt_min", "mixer.dt_max", "mixer.dt_init_floor")
# Parameters with a row for every entry of the vocabulary.
_BY_VOCABULARY = ("embedding.weight", "lm_head.weight")


class StartingWeights:
    """The weights of a run, an export or a public checkpoint, read one at a time.

    Args:
        folder: see `pretrained.open_pretrained`.
        config: of the model that begins with them.

    Raises:
        UserError: there is no model in the folder, or one of another config.
    """

    def __init__(self, folder: str | Path, config: Mamba3Config):
        try:
            self._pretrained = open_pretrained(folder, verify=False)
        except UserError as error:
            raise UserError(f"init_from: {error}") from None
        self.folder, self.description = self._pretrained.folder, self._pretrained.description
        _refuse_another_model(folder, self._pretrained.config, config)

    def verify(self) -> None:
        """Raise UserError if the weights are not as they were written, where that is known."""
        self._pretrained.verify()

    def value(self, name: str, shape: torch.Size, config: Mamba3Config, seed: int) -> Tensor:
        """The value with which a parameter begins, in float32 or wider.

        Rows that pad the vocabulary differently are left out, or drawn as for a new model: no text has their tokens.
        """
        found = self._pretrained.weights[name]
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        if name in _BY_VOCABULARY and len(found) != shape[0]:
            missing = first_value(name, shape, config, seed)[len(found) :]
            found = torch.cat([found[: shape[0]], missing.to(found.dtype)])
        return found


def _refuse_another_model(folder: str | Path, there: Mamba3Config, here: Mamba3Config) -> None:
    """Compare all that the weights depend on; the vocabularies may differ by padding alone."""
    old, new = _functional(there), _functional(here)
    changed = [key for key in old | new if old.get(key) != new.get(key)]
    if changed:
        differences = ", ".join(f"model.{key} ({old.get(key)} there, {new.get(key)} here)" for key in changed)
        raise UserError(f"init_from={folder} is a model of another config: {differences}; set them as they are there")
    if here.vocab_size > there.padded_vocab_size or there.vocab_size > here.padded_vocab_size:
        raise UserError(
            f"init_from={folder} has a vocabulary of {there.vocab_size}, data.vocab_size={here.vocab_size}: prepare "
            "the corpus with the tokenizer of that model"
        )


def _functional(config: Mamba3Config) -> dict[str, object]:
    """Every field that a model's function or its parameters depend on, by dotted name, but the vocabulary's."""
    values = config.to_dict()
    mixer, attention = values.pop("mixer"), values.pop("attention")
    for key in ("vocab_size", "vocab_multiple", "n_layers"):
        del values[key]
    values["layer_pattern"] = config.layers
    if "M" in config.layers:
        values |= {f"mixer.{key}": value for key, value in mixer.items() if f"mixer.{key}" not in _INITIAL_ONLY}
    if "*" in config.layers:
        values |= {f"attention.{key}": value for key, value in attention.items()}
    return {"n_layers": config.n_layers, **values}
