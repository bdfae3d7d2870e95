"""Training: the Lightning module and what stands around it."""
