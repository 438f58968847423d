"""The canary: fixed token sequences whose log-probabilities trainer and engine both compute, and their comparison.

It is coarse: a small step on one matrix drowns in an engine's own noise. It catches faults that no bit shows (a stale
cache, a wrong rotary embedding, a derived tensor that was not recomputed) and replaces neither read-back nor probe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bridge.errors import CanaryMismatch
from bridge.model.receipt import CanaryResult

TOKENS = 80
"""Tokens of the canary; in one prompt where the engine takes that, to reach later positions than short ones do."""

FLOORS = {"fp64": 0.002, "fp32": 0.002, "fp8_e4m3": 0.1, "fp8_e5m2": 0.1}
"""Mean |difference| in nats that is never an error, by the coarsest dtype in the engine; measured on real engines, with
log-probabilities whose standard deviation was below FLOOR_SPREAD."""
DEFAULT_FLOOR = 0.05
FLOOR_SPREAD = 1.0
"""Nats. Rounding in the compute dtype grows with the logits, and the floor with it above this spread: bf16 was seen to
make 0.005 to 0.015 of the spread, 0.04 with fp32 in the trainer and logits that spread over 13 nats."""
NOISE_MARGIN = 2.0
"""The limit over the expected noise. That of other weights was seen to be 1.2 times as large where it was expected by
rounding in the trainer, else 1.6 times after small steps."""
NOISE_CAP = 0.5
"""Of the spread. An engine whose noise needs a higher limit answers too unlike the trainer for a canary."""


@dataclass(frozen=True)
class LimitRule:
    """Rule for the limit of one engine's canary.

    Attributes:
        floor: mean |difference| in nats that is never an error, up to FLOOR_SPREAD.
        noise: the noise to expect of an engine that declares losses, as a fraction of the spread: like every rounding
            in the engine it grows with the logits. None where it was not measured, or nothing is declared.
        given: the user's `canary_limit` in nats, which takes the place of all else.
    """

    floor: float = DEFAULT_FLOOR
    noise: float | None = None
    given: float | None = None

    def limit(self, spread: float) -> float:
        """Compute the limit of the mean |difference| in nats, for log-probabilities of this spread."""
        if self.given is not None:
            return self.given
        floor = self.floor * max(1.0, spread / FLOOR_SPREAD)
        return max(floor, min(NOISE_MARGIN * (self.noise or 0.0), NOISE_CAP) * spread)

    @property
    def conclusive(self) -> bool:
        """False when the noise needs a limit above the cap: then the canary shows nothing."""
        return self.given is not None or NOISE_MARGIN * (self.noise or 0.0) <= NOISE_CAP


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


def compare(reference: Sequence[Sequence[float]], got: Sequence[Sequence[float]], rule: LimitRule) -> CanaryResult:
    """Compare an engine's log-probabilities with the trainer's.

    Where both are NaN, or the same infinity, they agree (weights that are not finite were allowed); where only one is,
    the mean is infinite.

    Args:
        reference, got: the trainer's and the engine's, in nats, per prompt and token.
        rule: decides the limit, by the spread of the trainer's.

    Raises CanaryMismatch when the two have different numbers of tokens.
    """
    if [len(row) for row in reference] != [len(row) for row in got]:
        raise CanaryMismatch(
            "the engine scored other tokens than the trainer",
            where="the canary",
            expected=str([len(row) for row in reference]),
            got=str([len(row) for row in got]),
            remedy="start trainer and engine with the same tokenizer and model",
        )
    pairs = [(a, b) for left, right in zip(reference, got, strict=True) for a, b in zip(left, right, strict=True)]
    spread = spread_of(reference)
    undefined = [(math.isnan(a) and math.isnan(b)) or (math.isinf(a) and a == b) for a, b in pairs]
    deltas = [a - b for (a, b), skip in zip(pairs, undefined, strict=True) if not skip]
    if not all(map(math.isfinite, deltas)):
        return CanaryResult(math.inf, math.inf, math.inf, rule.limit(spread), len(pairs), spread, rule.noise)
    count = max(len(deltas), 1)
    # k3 estimator on the canary's own tokens: a number to watch, not a divergence over samples of the policy
    kl = sum(math.exp(min(-d, 50.0)) - 1 + d for d in deltas) / count
    return CanaryResult(
        mean_abs=sum(map(abs, deltas)) / count,
        max_abs=max(map(abs, deltas), default=0.0),
        kl=kl,
        limit=rule.limit(spread),
        tokens=len(deltas),
        spread=spread,
        noise=rule.noise,
        conclusive=rule.conclusive,
    )


def fraction_of(reference: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float | None:
    """Compute the mean |difference| as a fraction of the reference's spread; None without a spread."""
    found = compare(reference, other, LimitRule())
    return found.mean_abs / found.spread if found.spread > 0 else None


def spread_of(reference: Sequence[Sequence[float]]) -> float:
    """Compute the standard deviation of the trainer's finite log-probabilities, in nats; 0 where there are none."""
    finite = [value for row in reference for value in row if math.isfinite(value)]
    mean = sum(finite) / max(len(finite), 1)
    return math.sqrt(sum((value - mean) ** 2 for value in finite) / max(len(finite), 1))
