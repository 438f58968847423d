"""Declared losses: what an engine's configuration stores or computes more coarsely than its weights' dtype."""

from __future__ import annotations

import msgspec


class DeclaredLosses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The losses of one engine, from its configuration, never measured. False when there are none.

    Attributes:
        kv: the engine's word for the dtype of its KV cache; None where that is the dtype it computes in.
        kv_dtype: the wire's name of that dtype; None where it has none there, so that nobody else can round to it.
        weights: the engine's word for how weights, and activations with them, are quantised; None: not at all.
    """

    kv: str | None = None
    kv_dtype: str | None = None
    weights: str | None = None

    def __bool__(self) -> bool:
        return self.kv is not None or self.weights is not None

    def __str__(self) -> str:
        cache = "" if self.kv is None else f"a KV cache in {self.kv}"
        weights = "" if self.weights is None else f"weights quantised as {self.weights}"
        return " and ".join(filter(None, (cache, weights)))
