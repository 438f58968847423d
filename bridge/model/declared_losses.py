"""Declared losses: what an engine's configuration stores or computes more coarsely than its weights' dtype."""

from __future__ import annotations

import msgspec

ROUNDS_TO = frozenset({"int8", "fp8_e4m3", "fp8_e5m2"})
"""Dtypes of codes to which a trainer can round: each holds one value. Wider integers hold several, of unknown width."""


class Rounding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names the dtypes to which a trainer rounds keys and values, and operands of matrix products; None: not at all."""

    kv: str | None = None
    codes: str | None = None


class Noise(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The measured noise of an engine that declares losses.

    Attributes:
        fraction: mean |trainer - engine| over the standard deviation of the trainer's log-probabilities.
        of_rounding: the same over what rounding changed in the trainer then. It hardly depends on the weights, while
            `fraction` grew fivefold over a few steps of some. None where the trainer could not round.
    """

    fraction: float
    of_rounding: float | None = None

    def expected(self, rounding: float | None) -> float:
        """Tell what fraction to expect of weights with which rounding changes this fraction in the trainer."""
        if self.of_rounding is None or rounding is None:
            return self.fraction
        return self.of_rounding * rounding


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

    def rounding(self, codes: str | None) -> Rounding | None:
        """Tell what rounding in the trainer changes as much as these losses at least; None where nobody knows.

        Args:
            codes: dtype of the codes in which the engine's quantised weights come; None where it is not known.
        """
        kv_unknown = self.kv is not None and self.kv_dtype is None
        if not self or kv_unknown or (self.weights is not None and codes is None):
            return None
        return Rounding(self.kv_dtype, None if self.weights is None else codes)

    def __bool__(self) -> bool:
        return self.kv is not None or self.weights is not None

    def __str__(self) -> str:
        cache = "" if self.kv is None else f"a KV cache in {self.kv}"
        weights = "" if self.weights is None else f"weights quantised as {self.weights}"
        return " and ".join(filter(None, (cache, weights)))
