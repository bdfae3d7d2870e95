"""Large-scale pretraining of Mamba-3 language models (arXiv 2603.15569)."""

__version__ = "0.1.0"
