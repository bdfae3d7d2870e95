"""What decoding carries from token to token: a fixed-size state a Mamba-3 layer, keys and values an attention layer."""

from mamba3_train.kernels import ScanState
from mamba3_train.model.attention import AttentionState

LayerState = ScanState | AttentionState
RecurrentState = tuple[LayerState, ...]
