"""Checkpoints: sharded and atomic while training, and the formats of other programs."""
