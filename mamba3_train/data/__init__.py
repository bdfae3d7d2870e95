"""From text to training batches: tokenizer, token shards, order, packing and the data module.

Names are resolved on first use, so that a tokenizing worker process does not pay for importing torch and lightning.
"""

from importlib import import_module

_HOME = {
    "TokenDataModule": "datamodule",
    "SyntheticDataModule": "synthetic",
    "Preparation": "preparation",
    "Tokenizer": "tokenizer",
    "TokenSplit": "token_shards",
    "verify": "verification",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
