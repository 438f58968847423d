"""Declared losses: what an engine's configuration stores more coarsely than the engine computes."""

from __future__ import annotations


def declared_losses(kv: str | None, quantisation: str | None) -> tuple[str, ...]:
    """Put the losses that an engine's configuration declares into words, for `DeclaresLosses`.

    Args:
        kv: the engine's word for the KV cache's dtype; None where that is the dtype it computes in.
        quantisation: the engine's word for how weights, and activations with them, are quantised; None: not at all.
    """
    cache = () if kv is None else (f"a KV cache in {kv}",)
    return cache if quantisation is None else (*cache, f"weights quantised as {quantisation}")
