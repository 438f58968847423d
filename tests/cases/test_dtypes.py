"""A tensor lands only in what it means: every pair of dtypes, decided by one table and pushed for real."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import bridge
from bridge.coordinator.manifest_agreement import agree
from bridge.errors import DtypeMismatch, MissingTensor, UnexpectedTensor
from bridge.model.dtypes import Landing, landing
from bridge.model.manifest import TensorInfo
from bridge.model.torch_dtypes import DTYPES
from bridge.protocol.coordinator_messages import PlanRequest
from bridge.protocol.rank_jobs import RankBake
from engine_side.plan.bake import bake
from tests.engine_side.toy_engine import ToyHost

FLOATS = ("bf16", "fp16", "fp32", "fp64")
# Rows are what is sent, columns what the engine holds: c(arried), v (converted), d(equantised), q(uantised), - refused.
COLUMNS = [*FLOATS, "fp8_e4m3", "fp8_e5m2", "fp8_e8m0", "int8", "int16", "int32", "int64", "uint8", "bool"]
PARAMETERS = {
    "bf16": "cvvvqq-qqq-q-",
    "fp16": "vcvvqq-qqq-q-",
    "fp32": "vvcvqq-qqq-q-",
    "fp64": "vvvcqq-qqq-q-",
    "fp8_e4m3": "ddddc--------",
    "fp8_e5m2": "dddd-c-------",
    "fp8_e8m0": "v-vv--c------",
    "int8": "dddd---c-----",
    "int16": "dddd----c----",
    "int32": "dddd-----c---",
    "int64": "----------c--",
    "uint8": "dddd-------c-",
    "bool": "------------c",
}
WORDS = {"c": Landing.CARRIED, "v": Landing.CONVERTED, "d": Landing.DEQUANTISED, "q": Landing.QUANTISED}
INTEGERS = ("int8", "int16", "int32", "int64", "uint8")


def wanted(sent: str, into: str, buffer: bool) -> Landing:
    if buffer and sent != into and {sent, into} <= set(INTEGERS):
        return Landing.CONVERTED
    return WORDS.get(PARAMETERS[sent][COLUMNS.index(into)], Landing.REFUSED)


def test_the_table_is_walked_whole() -> None:
    assert sorted(COLUMNS) == sorted(DTYPES) == sorted(PARAMETERS)
    for sent, into, buffer in itertools.product(COLUMNS, COLUMNS, (False, True)):
        assert landing(sent, into, buffer=buffer) is wanted(sent, into, buffer), (sent, into, buffer)
    for sent in COLUMNS:  # a dtype of this engine alone
        assert landing(sent, "torch.float8_e4m3fnuz") is Landing.REFUSED


class Holder(nn.Module):
    """One tensor of a dtype, and one that is pushed beside it."""

    def __init__(self, dtype: torch.dtype, buffer: bool) -> None:
        super().__init__()
        held = torch.zeros(8, 8).to(dtype)
        if buffer:
            self.register_buffer("weight", held)
        else:
            self.weight = nn.Parameter(held, requires_grad=False)
        self.other = nn.Linear(2, 2, bias=False)


def sendable(dtype: str) -> torch.Tensor:
    """Ones, twos and fours: every dtype holds them, so that only the dtype can be wrong."""
    return (2.0 ** (torch.arange(64) % 3)).reshape(8, 8).to(DTYPES[dtype])


def bits(module: nn.Module) -> list[list[int]]:
    return [t.detach().contiguous().view(torch.uint8).flatten().tolist() for t in module.state_dict().values()]


SETTINGS = list(itertools.product((False, True), (False, True), ("off", "transfer", "weights")))
"""(bound, partial, verify)"""


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("into", COLUMNS)
def test_every_pair_pushed(into: str, buffer: bool) -> None:
    """What is accepted is there by value, what is refused names both dtypes and changes nothing. Each row and column
    meets each (bound, partial, verify)."""
    for k, sent in enumerate(COLUMNS):
        bound, partial, verify = SETTINGS[(k + COLUMNS.index(into)) % len(SETTINGS)]
        live = Holder(DTYPES[into], buffer)
        before, values = bits(live), sendable(sent)
        named = {"weight": values} if partial else {"weight": values, "other.weight": torch.ones(2, 2)}
        trainer = Holder(DTYPES[sent], buffer) if bound else None
        with bridge.attach(live, model=trainer) as b:
            if wanted(sent, into, buffer) in (Landing.CARRIED, Landing.CONVERTED):
                receipt = b.push(named.items(), partial=partial, verify=verify)
                assert receipt.verified is (verify == "weights")
                assert torch.equal(live.weight.double(), values.double())
            else:
                with pytest.raises(DtypeMismatch) as caught:
                    b.push(named.items(), partial=partial, verify=verify)
                assert (caught.value.got, caught.value.expected) == (sent, into)
                assert caught.value.names == ("weight",)
                assert bits(live) == before


@pytest.fixture
def linear() -> Iterator[tuple[nn.Linear, bridge.Bridge]]:
    live = nn.Linear(8, 8, bias=False).bfloat16()
    with bridge.attach(live) as b:
        yield live, b


@pytest.mark.parametrize("partial", [False, True])
def test_fp8_without_a_place_for_its_scales_ends_as_values(
    linear: tuple[nn.Linear, bridge.Bridge], partial: bool
) -> None:
    """Whatever is left out on the way, nothing but the values gets in."""
    live, b = linear
    values = torch.randn(8, 8)
    scale = values.abs().max() / 448
    codes = (values / scale).to(torch.float8_e4m3fn)
    before = bits(live)
    with pytest.raises(DtypeMismatch, match="push the values \\(codes times scales\\) as bf16 without the scales"):
        b.push([("weight", codes), ("weight_scale", scale)], partial=partial)
    with pytest.raises(DtypeMismatch):
        b.push([("weight", codes)], partial=partial)
    with pytest.raises(UnexpectedTensor):
        b.push([("weight_scale", scale)], partial=True)
    assert bits(live) == before
    meant = codes.float() * scale
    assert b.push([("weight", meant)], partial=partial).verified is True
    assert torch.equal(live.weight, meant.bfloat16())


@pytest.mark.parametrize("sent", ["fp8_e4m3", "fp8_e5m2", "int8", "uint8", "int64", "bool"])
def test_a_subset_after_the_whole_model_is_decided_by_its_own_dtypes(sent: str) -> None:
    """The plan of the whole model knows the names: it must not carry what it was not made for."""
    live = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).bfloat16()
    whole = {name: torch.randn(8, 8) for name in live.state_dict()}
    with bridge.attach(live) as b:
        b.push(whole.items())
        before = bits(live)
        with pytest.raises(DtypeMismatch) as caught:
            b.push([("0.weight", sendable(sent))], partial=True)
        assert (caught.value.got, caught.value.expected) == (sent, "bf16")
        assert bits(live) == before
        for dtype in (torch.float64, torch.bfloat16):
            half = torch.full((8, 8), 0.5, dtype=dtype)
            assert b.push([("0.weight", half)], partial=True).verified is True
            assert torch.equal(live[0].weight.double(), half.double())
        assert b.push(whole.items()).verified is True


class ScaledLinear(nn.Module):
    """Weights in fp8 with one scale for the tensor, as engines hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 8).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.float() * self.weight_scale)


def test_values_for_an_engine_of_codes_are_refused_until_the_codes_come_with_their_scales() -> None:
    live = ScaledLinear()
    values = torch.randn(8, 8)
    codes, scale = (values / 2).to(torch.float8_e4m3fn), torch.tensor([2.0])
    with bridge.attach(live) as b:
        with pytest.raises(DtypeMismatch, match="push the weight as fp8_e4m3 together with its scales"):
            b.push([("weight", values), ("weight_scale", scale)])
        for partial in (False, True):
            with pytest.raises(MissingTensor, match="weight_scale"):
                b.push([("weight", codes)], partial=partial)
            with pytest.raises(MissingTensor, match="weight"):
                b.push([("weight_scale", scale)], partial=partial)
        assert b.push([("weight", codes), ("weight_scale", scale)]).verified is True
    assert torch.equal(live(torch.eye(8)).T, codes.float() * scale)


def test_power_of_two_scales_become_floats_exactly() -> None:
    live = ScaledLinear()
    live.weight_scale = nn.Parameter(torch.ones(4), requires_grad=False)
    scales = torch.tensor([2.0**-120, 0.5, 1.0, 2.0**100]).to(torch.float8_e8m0fnu)
    codes = torch.ones(8, 8).to(torch.float8_e4m3fn)
    with bridge.attach(live) as b:
        assert b.push([("weight", codes), ("weight_scale", scales)]).verified is True
        assert live.weight_scale.tolist() == [2.0**-120, 0.5, 1.0, 2.0**100]
        broken = scales.view(torch.uint8).clone()
        broken[2] = 0xFF  # the format's only pattern that is no number
        with pytest.raises(bridge.errors.NonFinite, match=r"weight_scale\[2\]"):
            b.push([("weight", codes), ("weight_scale", broken.view(torch.float8_e8m0fnu))])


def test_power_of_two_scales_that_stay_so_are_finite() -> None:
    live = nn.Module()
    live.scale = nn.Parameter(torch.zeros(4).to(torch.float8_e8m0fnu), requires_grad=False)
    every = torch.arange(255, dtype=torch.uint8)
    with bridge.attach(live) as b:
        for start in range(0, 252, 4):
            assert b.push([("scale", every[start : start + 4].view(torch.float8_e8m0fnu))]).verified is True
        with pytest.raises(bridge.errors.NonFinite, match=r"scale\[1\]"):
            b.push([("scale", torch.tensor([1, 255, 2, 3], dtype=torch.uint8).view(torch.float8_e8m0fnu))])


def test_counters_change_width_where_every_value_survives() -> None:
    live = nn.BatchNorm1d(4)
    live.num_batches_tracked = torch.tensor(0, dtype=torch.int16)
    trainer = nn.BatchNorm1d(4)
    with bridge.attach(live) as b:
        trainer.num_batches_tracked.fill_(32_767)
        assert b.push(trainer.state_dict().items()).verified is True
        assert live.num_batches_tracked.item() == 32_767
        trainer.num_batches_tracked.fill_(32_768)
        with pytest.raises(DtypeMismatch, match=r"got: 32768 of int64, which int16 makes -32768"):
            b.push(trainer.state_dict().items())
        assert live.num_batches_tracked.item() == 32_767


def test_engines_that_hold_counters_in_different_widths_are_refused_together() -> None:
    """One snapshot serves them all, and only one of the casts from it would be checked."""
    request = PlanRequest((TensorInfo("steps", "int64", ()), TensorInfo("w", "fp32", (2,))), False, False)

    def baked(steps: str, w: str) -> list[RankBake]:
        return [RankBake(b"", {"steps": steps, "w": w})]

    manifest = agree(request, {"a": baked("int32", "bf16"), "b": baked("int32", "fp16")})
    assert [spec.dtype for spec in manifest.tensors] == ["int32", "fp32"]
    with pytest.raises(DtypeMismatch, match="steps; expected: one dtype in all engines; got: int16, int32"):
        agree(request, {"a": baked("int32", "bf16"), "b": baked("int16", "bf16")})


@pytest.mark.parametrize("sent", ["int8", "fp8_e4m3", "int64", "bool"])
def test_codes_alone_that_a_loader_computes_with_are_refused(sent: str) -> None:
    """Where values cannot be followed into the engine's tensor, its dtype still says what they have to be."""
    host = ToyHost(decay=True)
    infos = [TensorInfo(i.name, sent, i.shape) if i.name == "decay.A" else i for i in host.infos]
    problems = bake(host, infos).problems
    assert [(type(p), p.where, p.got) for p in problems] == [(DtypeMismatch, "decay.A -> decay.A", sent)]
