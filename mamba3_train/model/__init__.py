"""The model: single-device mathematics, nothing of sharding or training."""

from mamba3_train.model.config import AttentionConfig, Mamba3Config, MixerConfig
from mamba3_train.model.initialization import initialize
from mamba3_train.model.language_model import Mamba3LM
from mamba3_train.model.mixer import Mamba3Mixer

__all__ = ["AttentionConfig", "Mamba3Config", "Mamba3LM", "Mamba3Mixer", "MixerConfig", "initialize"]
