"""The canary: fixed token sequences whose log-probabilities trainer and engine both compute, and their comparison.

It is coarse: a small step on one matrix drowns in an engine's own noise. It catches faults that no bit shows (a stale
cache, a wrong rotary embedding, a derived tensor that was not recomputed) and replaces neither read-back nor probe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from bridge.errors import CanaryMismatch
from bridge.model.receipt import CanaryResult

TOKENS = 80
"""Tokens of the canary; in one prompt where the engine takes that, to reach later positions than short ones do."""

FLOORS = {"fp64": 0.002, "fp32": 0.002, "fp8_e4m3": 0.1, "fp8_e5m2": 0.1}
"""Mean |difference| in nats that is never an error, by the coarsest dtype in the engine; measured on real engines."""
DEFAULT_FLOOR = 0.05
BASELINE_FACTOR = 3.0
"""Later syncs fail above this multiple of the first verified sync's mean, where that is above the floor."""


def prompts(vocab_size: int, max_tokens: int | None = None) -> list[list[int]]:
    """Make the fixed prompts for a vocabulary: the same in every process, spread over all ids by a linear congruence,
    and cut into pieces of `max_tokens` for engines that take no longer ones."""
    state = 0x2545F491
    ids = []
    for _ in range(TOKENS):
        state = (1103515245 * state + 12345) & 0x7FFFFFFF
        ids.append((state >> 8) % vocab_size)
    size = TOKENS if max_tokens is None else max(min(max_tokens, TOKENS), 1)
    return [ids[start : start + size] for start in range(0, TOKENS, size)]


def floor_for(dtypes: Iterable[str]) -> float:
    """Choose the floor of an engine whose tensors have these wire dtypes: that of the coarsest floating one."""
    floating = [FLOORS.get(name, DEFAULT_FLOOR) for name in dtypes if name.startswith(("fp", "bf"))]
    return max(floating, default=DEFAULT_FLOOR)


def compare(
    reference: Sequence[Sequence[float]], got: Sequence[Sequence[float]], *, floor: float, baseline: float | None
) -> CanaryResult:
    """Compare an engine's log-probabilities with the trainer's.

    Where both are NaN, or the same infinity, they agree (weights that are not finite were allowed); where only one is,
    the mean is infinite.

    Args:
        reference, got: the trainer's and the engine's, in nats, per prompt and token.
        floor: mean that is never an error.
        baseline: mean of the first verified sync, None before it: a first sync above the floor is a failure.

    Raises CanaryMismatch when the two have different numbers of tokens.
    """
    if [len(row) for row in reference] != [len(row) for row in got]:
        raise CanaryMismatch(
            "the engine scored other tokens than the trainer", expected=str([len(row) for row in reference]),
            got=str([len(row) for row in got]), remedy="start trainer and engine with the same tokenizer and model",
        )  # fmt: skip
    pairs = [(a, b) for left, right in zip(reference, got, strict=True) for a, b in zip(left, right, strict=True)]
    limit = floor if baseline is None else max(floor, BASELINE_FACTOR * baseline)
    undefined = [(math.isnan(a) and math.isnan(b)) or (math.isinf(a) and a == b) for a, b in pairs]
    deltas = [a - b for (a, b), skip in zip(pairs, undefined, strict=True) if not skip]
    if not all(map(math.isfinite, deltas)):
        return CanaryResult(math.inf, math.inf, math.inf, limit, len(pairs))
    count = max(len(deltas), 1)
    # k3 estimator on the canary's own tokens: a number to watch, not a divergence over samples of the policy
    kl = sum(math.exp(min(-d, 50.0)) - 1 + d for d in deltas) / count
    return CanaryResult(sum(map(abs, deltas)) / count, max(map(abs, deltas), default=0.0), kl, limit, len(deltas))
