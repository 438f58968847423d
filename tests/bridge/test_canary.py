"""The canary's comparison: which mean is still right, and what log-probabilities that are not finite count for."""

from __future__ import annotations

import math

import pytest

from bridge.errors import CanaryMismatch
from bridge.model import canary

REFERENCE = [[-1.0, -2.0], [-3.0]]
INF, NAN = math.inf, math.nan


def off_by(nats: float) -> list[list[float]]:
    return [[value + nats for value in row] for row in REFERENCE]


@pytest.mark.parametrize(
    ("floor", "baseline", "limit"),
    [(0.05, None, 0.05), (0.05, 0.001, 0.05), (0.05, 0.02, 0.06), (0.002, 0.5, 1.5)],
    ids=["first sync", "a quiet first sync", "a noisy first sync", "far above the floor"],
)
def test_the_limit_is_the_floor_or_thrice_the_first_sync(floor: float, baseline: float | None, limit: float) -> None:
    below = canary.compare(REFERENCE, off_by(limit * 0.99), floor=floor, baseline=baseline)
    assert below.ok
    assert below.limit == pytest.approx(limit)
    assert not canary.compare(REFERENCE, off_by(-limit * 1.01), floor=floor, baseline=baseline).ok


def test_what_is_measured() -> None:
    found = canary.compare(REFERENCE, [[-1.5, -2.0], [-2.0]], floor=0.1, baseline=None)
    assert (found.mean_abs, found.max_abs, found.tokens) == (pytest.approx(0.5), pytest.approx(1.0), 3)
    assert found.kl == pytest.approx((math.exp(-0.5) - 1 + 0.5 + math.exp(1) - 1 - 1) / 3)


@pytest.mark.parametrize(("reference", "got", "ok"), [
    (NAN, NAN, True), (-INF, -INF, True), (INF, -INF, False), (NAN, -1.0, False), (-1.0, NAN, False),
    (-1.0, -INF, False),
])  # fmt: skip
def test_values_that_are_not_finite_agree_only_with_themselves(reference: float, got: float, ok: bool) -> None:
    found = canary.compare([[reference, -1.0]], [[got, -1.0]], floor=0.05, baseline=None)
    assert found.ok is ok
    assert (found.mean_abs == INF) is not ok


@pytest.mark.parametrize("got", [[[-1.0, -2.0]], [[-1.0], [-3.0]], [[-1.0, -2.0], [-3.0, -4.0]]])
def test_other_tokens_are_no_answer(got: list[list[float]]) -> None:
    with pytest.raises(CanaryMismatch, match="other tokens"):
        canary.compare(REFERENCE, got, floor=0.05, baseline=None)


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
