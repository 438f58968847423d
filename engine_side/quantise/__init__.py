"""Quantising: weights that a trainer sends as values become the codes and scales of the engine's own checkpoint."""
