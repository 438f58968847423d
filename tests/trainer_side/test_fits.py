"""A cast from or to a dtype that is not floating keeps every value or is refused; a rounding passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bridge.errors import DtypeMismatch
from bridge.model.manifest import TensorInfo, lay_out
from bridge.model.torch_dtypes import DTYPES
from bridge.shm.arena import Arena
from trainer_side.names.tensor_layout import Collected, WeightSource
from trainer_side.snapshot.batches import SMALL
from trainer_side.snapshot.snapshotter import Snapshotter
from trainer_side.snapshot.value_checks import _same_values

WriteBlock = Callable[..., list[torch.Tensor]]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[WriteBlock]:
    """Snapshot what was collected into an arena of one wire dtype."""
    made: list[Arena] = []

    def run(collected: Collected, wire: str, **options: Any) -> list[torch.Tensor]:
        infos = [TensorInfo(i.name, wire, i.shape, i.aliases) for i in collected.tensors]
        made.append(Arena.create(lay_out(infos), name="test", directory=tmp_path))
        snapshotter = Snapshotter(made[-1])
        try:
            made[-1].begin(0)
            snapshotter.write(0, collected, **options)
        finally:
            snapshotter.close()
        return [t.clone() for t in made[-1].tensors(0)]

    yield run
    for arena in made:
        arena.close()
        arena.unlink()


CHANGED = [
    (torch.tensor([1.0, 0.7]), "int64"),
    (torch.tensor([1.0, 1e30]), "int64"),
    (torch.tensor([1.0, 2.0**63]), "int64"),
    (torch.tensor([1.0, float("nan")]), "int32"),
    (torch.tensor([1.0, float("-inf")]), "int64"),
    (torch.tensor([1.0, 0.2]), "bool"),
    (torch.tensor([1.0, 5.0], dtype=torch.bfloat16), "bool"),
    (torch.tensor([1.0, -1.0]), "uint8"),
    (torch.tensor([1, 300]), "uint8"),
    (torch.tensor([1, 200], dtype=torch.uint8), "int8"),
    (torch.tensor([1, -1], dtype=torch.int8), "uint8"),
    (torch.tensor([1, 2]), "bool"),
    (torch.tensor([1, 2**24 + 1]), "fp32"),
    (torch.tensor([1, 2**63 - 1]), "fp64"),
    (torch.tensor([1, 257], dtype=torch.int16), "bf16"),
    (torch.tensor([1, 70_000]), "fp16"),
    (torch.tensor([1, -(2**63)]), "fp16"),
]
KEPT = [
    (torch.tensor([1.0, -3.0]), "int64"),
    (torch.tensor([1.0, -(2.0**63)]), "int64"),
    (torch.tensor([1.0, -0.0]), "bool"),
    (torch.tensor([1, 255]), "uint8"),
    (torch.tensor([True, False]), "fp16"),
    (torch.tensor([1, 2**24]), "fp32"),
    (torch.tensor([1, 2**40]), "bf16"),
    (torch.tensor([1, -(2**63)]), "fp64"),
    (torch.tensor([1.0, 1 / 3]), "bf16"),
    (torch.tensor([1.0, 1 / 3], dtype=torch.float64), "fp8_e4m3"),
]


@pytest.mark.parametrize("nonfinite", [False, True])
@pytest.mark.parametrize(("tensor", "wire"), CHANGED)
def test_a_value_that_does_not_fit_is_refused(
    write: WriteBlock, tensor: torch.Tensor, wire: str, nonfinite: bool
) -> None:
    value = tensor[1].item()
    for sent, index in ((tensor, "[1]"), (tensor.expand(3, 2).t(), "[1, 0]"), (tensor[1], "[]")):
        collected = WeightSource().collect([("fine", torch.ones(2)), ("w", sent)])
        with pytest.raises(DtypeMismatch) as caught:
            write(collected, wire, allow_nonfinite=nonfinite)
        assert (caught.value.where, caught.value.names) == (f"w{index}", ("w",))
        assert repr(value) in str(caught.value.got)
        assert wire in str(caught.value.expected)


@pytest.mark.parametrize(("tensor", "wire"), KEPT)
def test_a_value_that_fits_or_rounds_passes(write: WriteBlock, tensor: torch.Tensor, wire: str) -> None:
    (written,) = write(WeightSource().collect([("w", tensor)]), wire)
    assert torch.equal(written.double(), tensor.to(DTYPES[wire]).double())


def test_the_first_bad_value_of_a_big_tensor(write: WriteBlock) -> None:
    big = torch.zeros(3, SMALL * 2)
    big[2, 7], big[2, 9] = 0.5, 0.25
    with pytest.raises(DtypeMismatch, match=r"where: w\[2, 7\];.*got: 0.5 of fp32, which int32 makes 0"):
        write(WeightSource().collect([("w", big)]), "int32")


def test_the_index_is_that_of_the_checkpoint_tensor(write: WriteBlock, converts: Callable[[Any], None]) -> None:
    def revert(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        gate, up = state["both"].chunk(2)
        return {"joined": torch.cat([gate.t(), up.t()], dim=1)}

    converts(revert)
    model = nn.Module()
    model.both = nn.Parameter(torch.arange(12.0).reshape(4, 3))
    with torch.no_grad():
        model.both[3, 2] = 0.5
    with pytest.raises(DtypeMismatch, match=r"where: joined\[2, 3\];.*got: 0.5"):
        write(WeightSource(model).collect(model.named_parameters()), "int16")


def test_later_pushes_of_the_same_layout_are_checked_too(tmp_path: Path) -> None:
    source, tensor = WeightSource(), torch.tensor([1.0, 2.0])
    arena = Arena.create(lay_out([TensorInfo("w", "int64", (2,), ())]), name="test", directory=tmp_path)
    snapshotter = Snapshotter(arena)
    try:
        arena.begin(0)
        snapshotter.write(0, source.collect([("w", tensor)]))
        tensor[0] = 1.5
        with pytest.raises(DtypeMismatch, match=r"w\[0\]"):
            snapshotter.write(0, source.collect([("w", tensor)]))
    finally:
        snapshotter.close()
        arena.close()
        arena.unlink()


def test_a_live_tensor_that_changes_its_dtype_makes_another_layout(converts: Callable[[Any], None]) -> None:
    def revert(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ab": torch.cat([state["a"], state["b"]])}

    converts(revert)
    source = WeightSource(nn.ParameterDict({"a": torch.ones(2), "b": torch.ones(2)}))
    wide, narrow = torch.ones(2, dtype=torch.float64), torch.ones(2)
    first = source.collect([("a", wide), ("b", narrow)])
    again = source.collect([("a", narrow), ("b", wide)])
    # what is announced is the same; which casts are made is not
    assert first.tensors == again.tensors
    assert first.layout is not again.layout


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(sorted(DTYPES)), st.sampled_from(sorted(DTYPES)))
def test_same_values_is_what_python_says(data: st.DataObject, left: str, right: str) -> None:
    edges = [0, 1, -1, 127, 128, 200, 255, 256, 2**24 + 1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63)]
    number = st.one_of(st.sampled_from(edges), st.floats(), st.integers(-(2**63), 2**63 - 1))
    source = torch.tensor(data.draw(number)).to(DTYPES[left])
    target = source.to(DTYPES[right])
    if source.is_floating_point() and target.is_floating_point():
        return
    assert bool(_same_values(target, source)) is (target.item() == source.item())
