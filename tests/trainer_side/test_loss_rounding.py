"""Rounding in a trainer's forward, as engines that declare losses do it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from bridge.model import canary
from bridge.model.declared_losses import DeclaredLosses, Noise, Rounding
from tests.families import make_model
from tests.rigs import bits_of, difference
from trainer_side.loss_rounding import ProductRounding, rounded_as
from trainer_side.reference import reference_logprobs, rounded_logprobs

PROMPTS = canary.prompts(411)
KV = Rounding(kv="fp8_e5m2")
CODES = Rounding(codes="int8")


def changed(model: Any, rounding: Rounding) -> float | None:
    found = rounded_logprobs(model, PROMPTS, rounding)
    return None if found is None else difference(found, reference_logprobs(model, PROMPTS))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "qwen3-moe", "deepseek"])
def test_rounding_changes_a_little_and_nothing_of_the_model(family: str) -> None:
    """Of every family: keys and values that latent attention computes, products of experts."""
    model = make_model(family)
    before = bits_of(model)
    found = [changed(model, how) for how in (KV, CODES, Rounding("fp8_e5m2", "int8"))]
    assert all(value is not None and 0.005 < value < 0.2 for value in found), found
    assert bits_of(model) == before


def test_coarser_dtypes_change_more() -> None:
    model = make_model("llama")
    fine, coarse = (changed(model, Rounding(kv=name)) for name in ("fp8_e4m3", "fp8_e5m2"))
    assert fine is not None
    assert coarse is not None
    assert fine * 1.2 < coarse


def test_an_attention_that_cannot_be_reached_is_no_answer() -> None:
    model = make_model("llama")
    model.set_attn_implementation("eager")
    assert changed(model, KV) is None
    assert changed(model, Rounding("fp8_e5m2", "int8")) is None, "half of the rounding is none"
    assert changed(model, CODES) is not None


def test_operands_of_a_product_are_codes_with_one_scale() -> None:
    x, weight = torch.randn(5, 8), torch.randn(7, 8)

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        scale = tensor.abs().max() / 127
        return (tensor / scale).round() * scale

    with rounded_as(CODES):
        found = functional.linear(x, weight)
    torch.testing.assert_close(found, rounded(x) @ rounded(weight).t())
    assert not torch.equal(found, functional.linear(x, weight))


def test_values_beyond_a_kv_caches_range_become_its_largest() -> None:
    value = torch.full((1, 1, 3, 4), 1e6)
    with rounded_as(Rounding(kv="fp8_e4m3")):
        found = functional.scaled_dot_product_attention(value, value, value=value)
    assert found.unique().tolist() == [448.0]


@pytest.mark.parametrize(("losses", "codes", "expected"), [
    (DeclaredLosses(), "int8", None),
    (DeclaredLosses("fp8", "fp8_e4m3"), None, Rounding("fp8_e4m3")),
    (DeclaredLosses("turbo", None), None, None),
    (DeclaredLosses(weights="w8a8"), "int8", Rounding(codes="int8")),
    (DeclaredLosses(weights="w8a8"), None, None),
    (DeclaredLosses("fp8", "fp8_e4m3", "w8a8"), "int8", Rounding("fp8_e4m3", "int8")),
    (DeclaredLosses("turbo", None, "w8a8"), "int8", None),
])  # fmt: skip
def test_what_nobody_knows_is_not_rounded(losses: DeclaredLosses, codes: str | None, expected: Rounding | None) -> None:
    assert losses.rounding(codes) == expected


def test_noise_follows_what_rounding_changes() -> None:
    """Measured at 0.02 where rounding changed 0.01: where rounding changes 0.05, 0.1 is to be expected."""
    noise = Noise(0.02, of_rounding=2.0)
    assert noise.expected(0.05) == pytest.approx(0.1)
    assert noise.expected(None) == 0.02
    assert Noise(0.02).expected(0.05) == 0.02


def test_a_forward_that_does_not_bear_rounding_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, value: Any) -> Any:
        raise RuntimeError("no kernel for this")

    model = make_model("llama")
    monkeypatch.setattr(ProductRounding, "_rounded", refuse)
    assert changed(model, CODES) is None
