"""What decoding carries from token to token: a fixed-size state a Mamba-3 layer, keys and values an attention layer."""

import torch

from mamba3_train.kernels import ScanState, StepState
from mamba3_train.model.attention import AttentionState, KeyValueCache

LayerState = ScanState | StepState | AttentionState | KeyValueCache
RecurrentState = tuple[LayerState, ...]


def with_room(state: RecurrentState, tokens: int, ssm_dtype: torch.dtype | None = None) -> RecurrentState:
    """A copy that takes one token at a time and changes in place, with room for so many in the layers of attention.

    ssm_dtype: what the Mamba-3 layers store their state in, see `StepState`; None keeps what the state has.
    """
    return tuple(
        layer.with_room(tokens) if isinstance(layer, AttentionState) else StepState.of(layer, ssm_dtype)
        for layer in state
    )
