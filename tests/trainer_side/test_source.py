"""WeightSource: what is accepted, what is refused and how, and that the steady state stays cheap."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import (
    ConfigError,
    DtypeMismatch,
    DuplicateTensor,
    IntegrityError,
    MissingTensor,
    ShapeMismatch,
    UnexpectedTensor,
)
from bridge.model.regions import dense
from bridge.model.torch_dtypes import dtype_name
from trainer_side.names.tensor_layout import Collected, TensorPart, WeightSource


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("derived", torch.ones(2), persistent=False)


class Fused(nn.Module):
    """A model whose checkpoint holds the two halves of what it keeps as one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.arange(12.0).reshape(4, 3))
        self.plain = nn.Parameter(torch.ones(2))


@pytest.fixture
def fused(converts: Callable[[Any], None]) -> Fused:
    def revert(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        gate, up = state["both"].chunk(2)
        return {"gate": gate, "up": up.t().contiguous(), "plain": state["plain"]}

    converts(revert)
    return Fused()


def names(collected: Collected) -> list[str]:
    return [info.name for info in collected.tensors]


def test_unbound_takes_any_iterable_and_every_form_of_tensor() -> None:
    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        yield "module._orig_mod.a", nn.Parameter(torch.randn(2, 3))
        yield "b", torch.randn(4, 3, dtype=torch.bfloat16).t()
        yield "empty", torch.empty(0, 5)
        yield "scalar", torch.tensor(True)
        yield "wide", torch.randn(3).expand(2, 3)

    collected = WeightSource().collect(stream())
    assert [(i.name, i.dtype, i.shape) for i in collected.tensors] == [
        ("a", "fp32", (2, 3)),
        ("b", "bf16", (3, 4)),
        ("empty", "fp32", (0, 5)),
        ("scalar", "bool", ()),
        ("wide", "fp32", (2, 3)),
    ]
    assert collected.layout.parts == tuple((TensorPart(k),) for k in range(5))


def test_bound_adds_persistent_buffers_and_knows_ties() -> None:
    model = Tied()
    source = WeightSource(model)
    collected = source.collect(model.named_parameters())
    assert names(collected) == [
        "embed.weight",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]
    assert collected.tensors[0].aliases == ("head.weight",)
    assert source.expected == collected.tensors
    model.norm.running_mean = torch.full((4,), 5.0)
    again = source.collect(model.named_parameters())
    assert again.sources[again.layout.parts[3][0].index] is model.norm.running_mean


def test_a_buffer_that_was_sent_is_not_added_again() -> None:
    model = Tied()
    sent = torch.zeros(4)
    collected = WeightSource(model).collect([*model.named_parameters(), ("norm.running_mean", sent)])
    part = collected.layout.parts[names(collected).index("norm.running_mean")][0]
    assert collected.sources[part.index] is sent


def test_partial_adds_nothing() -> None:
    model = Tied()
    source = WeightSource(model)
    assert names(source.collect([("norm.bias", model.norm.bias)], partial=True)) == ["norm.bias"]
    assert len(source.collect([("norm.bias", model.norm.bias)]).tensors) == 4


def test_a_tied_name_alone_stands_for_the_kept_one() -> None:
    model = Tied()
    collected = WeightSource(model).collect([("head.weight", model.head.weight)], partial=True)
    assert names(collected) == ["embed.weight"]


def test_both_names_of_a_tie_travel_once_also_as_copies() -> None:
    model = Tied()
    for value in (model.head.weight, model.head.weight.detach().clone()):
        pairs = [("head.weight", value), ("embed.weight", model.embed.weight)]
        collected = WeightSource(model).collect(pairs, partial=True)
        assert [(i.name, i.aliases) for i in collected.tensors] == [("embed.weight", ("head.weight",))]
        assert collected.sources[collected.layout.parts[0][0].index] is model.embed.weight


def test_unbound_ties_go_by_storage_and_view() -> None:
    square = torch.randn(3, 3)
    pairs = {"a": square, "t": square.t(), "b": square.detach(), "bits": square.view(torch.int32), "row": square[0]}
    collected = WeightSource().collect(pairs.items())
    assert [(i.name, i.aliases) for i in collected.tensors] == [("a", ("b",)), ("t", ()), ("bits", ()), ("row", ())]


def test_tensors_without_elements_are_not_ties() -> None:
    collected = WeightSource().collect([("a", torch.empty(0)), ("b", torch.empty(0))])
    assert names(collected) == ["a", "b"]


def test_converted_tensors_are_regions_of_live_ones(fused: Fused) -> None:
    collected = WeightSource(fused).collect(fused.named_parameters())
    assert [(i.name, i.shape) for i in collected.tensors] == [("gate", (2, 3)), ("up", (3, 2)), ("plain", (2,))]
    gate, up, plain = collected.layout.parts
    assert gate == (TensorPart(0, dense((2, 3)), dense((2, 3))),)
    assert (up[0].source.offset, up[0].source.strides) == (6, (1, 3))  # type: ignore[union-attr]
    assert plain == (TensorPart(1),)


def test_checkpoint_names_are_taken_too_but_not_beside_live_ones(fused: Fused) -> None:
    source = WeightSource(fused)
    assert names(source.collect([("up", torch.ones(3, 2))], partial=True)) == ["up"]
    with pytest.raises(DuplicateTensor, match=r"up.*both"):
        source.collect([*fused.named_parameters(), ("up", torch.ones(3, 2))])


def test_the_same_layout_object_while_nothing_changed() -> None:
    model = Tied()
    source = WeightSource(model)
    first = source.collect(model.named_parameters())
    assert source.collect(model.named_parameters()).layout is first.layout
    copies = [(name, value.detach().clone()) for name, value in model.named_parameters()]
    again = source.collect(copies)
    assert again.tensors is first.tensors
    assert again.sources[0] is copies[0][1]


@pytest.mark.parametrize("change", [lambda t: t.bfloat16(), lambda t: t.reshape(4, 3)])
def test_a_changed_tensor_is_noticed(change: Any) -> None:
    source = WeightSource()
    tensor, other = torch.randn(3, 4), torch.randn(2)
    first = source.collect([("a", tensor), ("b", other)]).tensors[0]
    again = source.collect([("a", change(tensor)), ("b", other)]).tensors[0]
    assert (again.dtype, again.shape) != (first.dtype, first.shape)


@pytest.mark.parametrize("change", [lambda t: t.to("meta"), lambda t: t.to_sparse()])
def test_a_tensor_that_lost_its_values_is_noticed(change: Any) -> None:
    source = WeightSource()
    tensor, other = torch.randn(3, 4), torch.randn(2)
    source.collect([("a", tensor), ("b", other)])
    with pytest.raises(IntegrityError, match="where: a"):
        source.collect([("a", change(tensor)), ("b", other)])


def test_a_new_tie_is_noticed() -> None:
    source = WeightSource()
    a, b = torch.randn(3), torch.randn(3)
    assert names(source.collect([("a", a), ("b", b)])) == ["a", "b"]
    assert names(source.collect([("a", a), ("b", a)])) == ["a"]
    assert names(source.collect([("a", a), ("b", b)])) == ["a", "b"]


def test_no_tensor_is_kept_alive() -> None:
    source = WeightSource()
    tensor = torch.randn(8)
    gone = weakref.ref(tensor)
    source.collect([("a", tensor)])
    del tensor
    gc.collect()
    assert gone() is None


def test_an_empty_iterable_says_why() -> None:
    model = Tied()
    spent = model.named_parameters()
    list(spent)
    for source in (WeightSource(), WeightSource(model)):
        with pytest.raises(MissingTensor, match=r"empty.*generator can be used only once"):
            source.collect(spent)


def test_meta_tensors_are_refused_by_name() -> None:
    with pytest.raises(IntegrityError, match=r"meta device.*where: w;") as caught:
        WeightSource().collect([("w", torch.empty(2, device="meta"))])
    assert caught.value.names == ("w",)


def test_duplicates_are_refused_by_name() -> None:
    a, b = torch.ones(1), torch.ones(1)
    with pytest.raises(DuplicateTensor, match=r"where: w;.*'w' and 'module.w'"):
        WeightSource().collect([("w", a), ("module.w", b)])


def test_names_of_another_model_are_refused() -> None:
    model = Tied()
    with pytest.raises(UnexpectedTensor, match=r"where: lm_head.weight;.*bind the model that these belong to"):
        WeightSource(model).collect([*model.named_parameters(), ("lm_head.weight", torch.ones(1))])


def test_shapes_of_another_model_are_refused() -> None:
    model = Tied()
    with pytest.raises(ShapeMismatch, match=r"where: embed.weight; expected: \[6, 4\]; got: \[4, 6\]"):
        WeightSource(model).collect([("embed.weight", torch.ones(4, 6))])


def test_half_of_what_a_checkpoint_tensor_is_made_of(converts: Callable[[Any], None]) -> None:
    def revert(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ab": torch.cat([state["a"], state["b"]])}

    converts(revert)
    model = nn.ParameterDict({"a": torch.ones(2), "b": torch.ones(3)})
    source = WeightSource(model)
    assert names(source.collect(model.named_parameters())) == ["ab"]
    with pytest.raises(MissingTensor, match=r"where: ab; expected: a, b; got: without b"):
        source.collect([("a", model["a"])], partial=True)


def test_values_and_codes_do_not_make_one_checkpoint_tensor(converts: Callable[[Any], None]) -> None:
    def revert(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ab": torch.cat([state["a"], state["b"]])}

    converts(revert)
    model = nn.ParameterDict({"a": torch.ones(2), "b": torch.ones(3)})
    source = WeightSource(model)
    for codes in (torch.int8, torch.float8_e4m3fn, torch.bool):
        with pytest.raises(DtypeMismatch, match=r"where: ab; expected: parts of one dtype"):
            source.collect([("a", model["a"]), ("b", torch.ones(3).to(codes))])
        both = source.collect([("a", torch.ones(2).to(codes)), ("b", torch.ones(3).to(codes))])
        assert both.tensors[0].dtype == dtype_name(codes)
    assert source.collect([("a", torch.ones(2).half()), ("b", torch.ones(3).bfloat16())]).tensors[0].dtype == "fp32"


@pytest.mark.parametrize("bad", [[("a", 3)], [(3, torch.ones(1))], [torch.ones(3)], [torch.ones(1)], 7, [("a",)]])
def test_other_things_than_pairs_are_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match="pairs"):
        WeightSource().collect(bad)


@pytest.mark.parametrize("bad", [torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.complex64)])
def test_what_cannot_travel_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(DtypeMismatch, match="where: a"):
        WeightSource().collect([("a", bad)])


def test_a_sharded_tensor_is_refused_and_a_replicated_one_is_taken() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        value = torch.randn(4, 2)
        whole = distribute_tensor(value, mesh, [Replicate()])
        collected = WeightSource().collect([("w", whole)])
        assert torch.equal(collected.sources[0], value)
        with pytest.raises(ConfigError, match=r"sharded.*where: w;.*full_tensor"):
            WeightSource().collect([("w", distribute_tensor(value, mesh, [Shard(0)]))])
    finally:
        dist.destroy_process_group()


def test_steady_state_is_cheap() -> None:
    tensors = [(f"layers.{k}.weight", torch.ones(2, 2)) for k in range(18_000)]
    source = WeightSource()
    source.collect(tensors)
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        source.collect(tensors)
        best = min(best, time.process_time() - start)
    # about 0.6 us per tensor when quiet; resolving every name again costs ten times that
    assert best / len(tensors) < 4e-6
