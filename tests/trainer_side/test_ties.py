"""A bound model's ties are held to: no tensor is dropped because its name was another tensor's once."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bridge.errors import DuplicateTensor, ShapeMismatch
from bridge.model.same_bits import same_bits
from trainer_side.names.tensor_layout import WeightSource

Pairs = list[tuple[str, torch.Tensor]]
Listed = Callable[[nn.Module], Pairs]


class Shared(nn.Module):
    """Three names of one matrix, and a module that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.mid = nn.Linear(4, 6, bias=False)
        self.head = nn.Linear(4, 6, bias=False)
        self.mid.weight = self.head.weight = self.embed.weight
        self.first = self.second = nn.Linear(4, 4)


def each_once(model: nn.Module) -> Pairs:
    return list(model.named_parameters())


def every_name(model: nn.Module) -> Pairs:
    return list(model.named_parameters(remove_duplicate=False))


def copies(model: nn.Module) -> Pairs:
    return [(name, value.detach().clone()) for name, value in every_name(model)]


def untied(model: Shared) -> None:
    model.head.weight = nn.Parameter(torch.full((6, 4), 7.0))


def exchanged(model: Shared) -> None:
    model.head = nn.Linear(4, 6, bias=False)


@pytest.mark.parametrize("change", [untied, exchanged])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("listed", [each_once, every_name, copies])
def test_two_tensors_that_were_one_are_refused(change: Callable[[Shared], None], warm: bool, listed: Listed) -> None:
    model = Shared()
    source = WeightSource(model)
    if warm:
        source.collect(listed(model))
    change(model)
    with pytest.raises(DuplicateTensor, match=r"embed.weight and head.weight;.*bind it again") as caught:
        source.collect(listed(model))
    assert caught.value.names == ("embed.weight", "head.weight")
    again = WeightSource(model)
    assert {i.name for i in again.collect(listed(model)).tensors} >= {"embed.weight", "head.weight"}


@pytest.mark.parametrize("order", itertools.permutations(["embed.weight", "mid.weight", "head.weight"]))
def test_any_of_several_names_may_be_the_odd_one(order: tuple[str, ...]) -> None:
    model = Shared()
    for odd in order:
        sent = [(n, torch.zeros(6, 4) if n == odd else model.embed.weight) for n in order]
        with pytest.raises(DuplicateTensor, match=odd if odd != "embed.weight" else "embed.weight and"):
            WeightSource(model).collect(sent, partial=True)


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_one_name_does_not_stand_for_another_tensor(name: str) -> None:
    model = Shared()
    source = WeightSource(model)
    source.collect([(name, model.embed.weight)], partial=True)
    untied(model)
    with pytest.raises(DuplicateTensor, match="no longer ties"):
        source.collect([(name, model.get_parameter(name))], partial=True)
    source.collect([("first.weight", model.first.weight)], partial=True)  # needs no tie


def test_copies_that_agree_stand_for_each_other_until_they_do_not() -> None:
    model = Shared()
    source = WeightSource(model)
    kept, alias = torch.ones(6, 4), torch.ones(6, 4)
    kept[0, 0] = alias[0, 0] = float("nan")  # whether that may travel is decided later, and by its own error
    sent = [("embed.weight", kept), ("head.weight", alias)]
    first = source.collect(sent, partial=True)
    alias[5, 3] = 1.5  # same names, shapes, dtypes, addresses: only the values tell
    with pytest.raises(DuplicateTensor):
        source.collect(sent, partial=True)
    kept[5, 3] = 1.5
    assert source.collect(sent, partial=True).layout is first.layout


def test_untied_with_equal_values_loses_nothing() -> None:
    model = Shared()
    source = WeightSource(model)
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    for listed in (each_once, every_name):
        assert "head.weight" not in {i.name for i in source.collect(listed(model)).tensors}


def test_a_buffer_that_was_reassigned() -> None:
    model = nn.Module()
    for name in ("a", "b"):
        model.register_buffer(name, torch.zeros(3) if name == "a" else model.a)
    model.weight = nn.Parameter(torch.ones(1))
    source = WeightSource(model)
    source.collect(model.named_parameters())
    model.b = torch.ones(3)  # named_parameters() never shows it
    with pytest.raises(DuplicateTensor, match="a and b"):
        source.collect(model.named_parameters())


def test_the_shape_of_a_tied_name_counts_too() -> None:
    model = Shared()
    with pytest.raises(ShapeMismatch, match=r"where: head\.weight"):
        WeightSource(model).collect([("embed.weight", model.embed.weight), ("head.weight", torch.zeros(3, 4))])


def test_weights_that_are_away_say_nothing_about_ties() -> None:
    model = Shared()
    source = WeightSource(model)
    sent = [(name, value.detach()) for name, value in each_once(model)]
    model.head.weight = nn.Parameter(torch.empty(0))
    source.collect(sent)
    model.head.weight = nn.Parameter(torch.empty(6, 4, device="meta"))
    source.collect(sent)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.complex128]
)
def test_same_bits(dtype: torch.dtype) -> None:
    a = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).to(dtype)
    assert all(same_bits(x, y) for x, y in ((a, a.clone()), (a, a.t()), (a[0, 0], a[1, 1])))
    assert not any(
        same_bits(x, y)
        for x, y in ((a, a[:1]), (a[0], a[1]), (a, a.to(torch.complex32 if dtype.is_complex else torch.float16)))
    )
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert same_bits(torch.tensor(float("nan")), torch.tensor(float("nan")))
