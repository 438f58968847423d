"""Probes on awkward values: subnormals that a kernel flushes, NaN and infinity that trainer and engine share."""

from __future__ import annotations

import math

import pytest
import torch

from engine_side.plan import probes
from engine_side.plan.probes import Probe

CPU = torch.device("cpu")
LINEAR = Probe("rows", 96, 8, torch.bfloat16, form="linear", weight="weight", bias="bias")


def values(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 96, generator=generator).mul_(0.02).to(dtype)
    return {"weight": weight, "bias": torch.randn(40, generator=generator).mul_(0.01).to(dtype)}


def output(held: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.linear(LINEAR.inputs(CPU), held["weight"], held["bias"])


def flushed(tensor: torch.Tensor) -> torch.Tensor:
    return torch.where(tensor.abs() < torch.finfo(tensor.dtype).tiny, torch.zeros_like(tensor), tensor)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_kernel_may_flush_subnormals(name: str) -> None:
    held = values()
    held[name].view(-1)[:300] = 9.18e-40
    kernel = {key: flushed(value) for key, value in held.items()}
    assert probes.mismatch(LINEAR, LINEAR.inputs(CPU), flushed(output(kernel)), held) is None
    everything = {"weight": torch.full((40, 96), 9.18e-40, dtype=torch.bfloat16), "bias": held["bias"] * 0}
    assert probes.mismatch(LINEAR, LINEAR.inputs(CPU), torch.zeros(8, 40, dtype=torch.bfloat16), everything) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_flushing_makes_nobody_blind(dtype: torch.dtype) -> None:
    held, x = values(dtype), LINEAR.inputs(CPU).to(dtype)
    y = torch.nn.functional.linear(x, held["weight"], held["bias"])
    assert probes.mismatch(LINEAR, x, y, held) is None
    assert probes.mismatch(LINEAR, x, torch.nn.functional.linear(x, held["weight"]), held) is not None
    swapped = held["weight"].clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert probes.mismatch(LINEAR, x, torch.nn.functional.linear(x, swapped, held["bias"]), held) is not None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_values_that_are_not_finite_agree_with_themselves_alone(name: str, value: float) -> None:
    held = values()
    held[name].view(-1)[7] = value
    assert probes.mismatch(LINEAR, LINEAR.inputs(CPU), output(held), held) is None
    other = {**held, "bias": held["bias"].roll(1)}
    assert probes.mismatch(LINEAR, LINEAR.inputs(CPU), output(other), held) is not None
    assert probes.mismatch(LINEAR, LINEAR.inputs(CPU), output(values()), held) is not None


def test_a_twin_with_nan_judges_the_other_outputs() -> None:
    want = torch.tensor([1.0, math.nan, -2.0, 0.0])
    limit = probes.twin_tolerance(want)
    assert probes.deviation(torch.tensor([1.0, math.nan, -2.0 * (1 + 1e-7), -0.0]), want, limit) is None
    assert probes.deviation(torch.tensor([1.0, math.nan, -2.1, 0.0]), want, limit) is not None
    assert probes.deviation(torch.tensor([1.0, 3.0, -2.0, 0.0]), want, limit) is not None


def test_tiles_look_like_no_rearrangement_of_themselves() -> None:
    like = torch.empty(3 * probes.PERIOD // 1000, 1000, dtype=torch.bfloat16)
    (value,) = probes.random_values([like], 1)
    tile = probes.random_tile(like, (1, 0))
    assert probes.is_tiled(value, tile)
    assert not probes.is_tiled(value.roll(1, 0).contiguous(), tile)
    assert not probes.is_tiled(value.t().contiguous(), tile)
    value[-1, -1] += 1
    assert not probes.is_tiled(value, tile)


@pytest.mark.parametrize("scale", [2e5, 1e-6])
def test_what_an_output_cannot_hold_is_rounded_as_the_reference_is(scale: float) -> None:
    """Above the largest number and among the subnormals of fp16; each element for itself."""
    held = {"weight": (values(torch.float32)["weight"] * scale).half(), "bias": torch.zeros(40).half()}
    want, limit = LINEAR.reference(LINEAR.inputs(CPU).half(), held)
    y = want.half()
    assert bool(y.isinf().any()) is (scale > 1)
    y[0, 0] = torch.nextafter(y[0, 0], y[0, 0] * 0) if scale > 1 else y[0, 0]
    assert probes.deviation(y, want, limit) is None
    assert probes.deviation(y.roll(1, dims=1), want, limit) is not None


def test_complex_numbers_are_weighed_in_both_parts() -> None:
    want = torch.randn(4, 6, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    limit = probes.twin_tolerance(want)
    assert probes.deviation(want.clone(), want, limit) is None
    assert probes.deviation(want.conj(), want, limit) is not None
    assert probes.deviation(want.real.clone(), want, limit) is not None
    assert probes.state_deviation({"freqs": want.conj()}, {"freqs": want}) is not None
    assert probes.state_deviation({"freqs": want}, {"freqs": want}) is None
