"""What decoding carries from token to token: a fixed-size state a Mamba-3 layer, keys and values an attention layer."""

from mamba3_train.kernels import ScanState
from mamba3_train.model.attention import AttentionState, KeyValueCache

LayerState = ScanState | AttentionState | KeyValueCache
RecurrentState = tuple[LayerState, ...]


def with_room(state: RecurrentState, tokens: int) -> RecurrentState:
    """The same state with room for so many tokens more in the layers of attention, which then take one at a time."""
    return tuple(layer.with_room(tokens) if isinstance(layer, AttentionState) else layer for layer in state)
