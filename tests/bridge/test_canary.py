"""The canary's comparison: which mean is still right, and what log-probabilities that are not finite count for."""

from __future__ import annotations

import math

import pytest

from bridge.errors import CanaryMismatch
from bridge.model import canary
from bridge.model.canary import LimitRule

REFERENCE = [[-1.0, -2.0], [-3.0]]
SPREAD = math.sqrt(2 / 3)
"""Standard deviation of these three."""
INF, NAN = math.inf, math.nan


def off_by(nats: float) -> list[list[float]]:
    return [[value + nats for value in row] for row in REFERENCE]


@pytest.mark.parametrize(
    ("rule", "limit"),
    [
        (LimitRule(0.05), 0.05),
        (LimitRule(0.05, noise=0.01), 0.05),
        (LimitRule(0.05, noise=0.1), 0.2 * SPREAD),
        (LimitRule(0.002, noise=0.25), 0.5 * SPREAD),
        (LimitRule(0.05, noise=0.1, given=0.3), 0.3),
        (LimitRule(0.05, noise=0.9, given=0.001), 0.001),
    ],
    ids=["no noise", "a quiet engine", "a noisy engine", "at the cap", "the user's is higher", "the user's is lower"],
)
def test_the_limit_is_the_users_or_the_floor_or_twice_the_noise(rule: LimitRule, limit: float) -> None:
    below = canary.compare(REFERENCE, off_by(limit * 0.99), rule)
    assert (below.ok, below.conclusive) == (True, True)
    assert (below.limit, below.spread) == (pytest.approx(limit), pytest.approx(SPREAD))
    assert not canary.compare(REFERENCE, off_by(-limit * 1.01), rule).ok


@pytest.mark.parametrize("times", [1.0, 10.0, 100.0])
def test_rounding_grows_with_the_logits_and_the_limit_with_it(times: float) -> None:
    """Ten times the logits are ten times the log-probabilities' differences, of an honest engine and of a broken one:
    what a limit of the same share of the spread finds does not depend on it."""
    wide = [[-10.0, -20.0], [-30.0]]  # a spread of 8.2 nats, above FLOOR_SPREAD
    scaled = [[value * times for value in row] for row in wide]
    for rule in (LimitRule(0.05), LimitRule(0.002, noise=0.1)):
        assert canary.compare(scaled, scaled, rule).limit == pytest.approx(rule.limit(10 * SPREAD) * times)


def test_noise_above_the_cap_shows_nothing() -> None:
    noisy = LimitRule(0.05, noise=0.26)
    found = canary.compare(REFERENCE, off_by(0.6), noisy)
    assert (found.conclusive, found.ok, found.noise) == (False, True, 0.26)
    assert not canary.compare([[NAN, -1.0]], [[-1.0, -1.0]], noisy).ok, "a NaN is no noise"
    assert canary.compare(REFERENCE, off_by(0.6), LimitRule(0.05, noise=0.26, given=0.5)).ok is False


def test_what_is_measured() -> None:
    found = canary.compare(REFERENCE, [[-1.5, -2.0], [-2.0]], LimitRule(0.1))
    assert (found.mean_abs, found.max_abs, found.tokens) == (pytest.approx(0.5), pytest.approx(1.0), 3)
    assert found.kl == pytest.approx((math.exp(-0.5) - 1 + 0.5 + math.exp(1) - 1 - 1) / 3)


@pytest.mark.parametrize(("reference", "got", "ok"), [
    (NAN, NAN, True), (-INF, -INF, True), (INF, -INF, False), (NAN, -1.0, False), (-1.0, NAN, False),
    (-1.0, -INF, False),
])  # fmt: skip
def test_values_that_are_not_finite_agree_only_with_themselves(reference: float, got: float, ok: bool) -> None:
    found = canary.compare([[reference, -1.0]], [[got, -1.0]], LimitRule())
    assert found.ok is ok
    assert (found.mean_abs == INF) is not ok


@pytest.mark.parametrize("got", [[[-1.0, -2.0]], [[-1.0], [-3.0]], [[-1.0, -2.0], [-3.0, -4.0]]])
def test_other_tokens_are_no_answer(got: list[list[float]]) -> None:
    with pytest.raises(CanaryMismatch, match="other tokens"):
        canary.compare(REFERENCE, got, LimitRule())


@pytest.mark.parametrize(
    ("dtypes", "floor"),
    [(["fp32"], 0.002), (["fp32", "bf16"], 0.05), (["fp8_e4m3", "bf16", "fp32"], 0.1), (["int8"], 0.05)],
)
def test_the_coarsest_floating_dtype_sets_the_floor(dtypes: list[str], floor: float) -> None:
    assert canary.floor_for(dtypes) == floor


@pytest.mark.parametrize("longest", [None, 1, 7, 80, 500])
def test_prompts_are_the_same_everywhere_and_spread(longest: int | None) -> None:
    found = canary.prompts(1000, longest)
    assert found == canary.prompts(1000, longest)
    flat = [token for prompt in found for token in prompt]
    assert len(flat) == canary.TOKENS
    assert len(set(flat)) > canary.TOKENS * 0.8
    assert max(map(len, found)) == min(longest or canary.TOKENS, canary.TOKENS)
    assert all(0 <= token < 1000 for token in flat)
