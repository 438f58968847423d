"""Lent memory: post-load packs straight from the arena where it only reads, and never serves from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from bridge.manifest import Manifest, lay_out
from engine_side.loader import Loader
from engine_side.loan import Loan
from tests.engine_side import toy_engine as toy
from tests.engine_side.test_loader import outputs, same


class Watched(toy.Packed):
    """Notes where the weight lay that it packed."""

    seen: list[int] = []

    def post(self, layer: Any) -> None:
        Watched.seen.append(layer.weight.data_ptr())
        super().post(layer)


class Keeping(toy.Packed):
    """Serves from a view of the weight that was loaded, not from a copy."""

    def post(self, layer: Any) -> None:
        seen, bias = layer.weight.detach().t()[:, :], layer.bias.detach()
        layer.kernel = lambda x: x @ seen + bias
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Scribbling(toy.Packed):
    """Packs, and leaves other values in the memory that it packed from."""

    def post(self, layer: Any) -> None:
        weight = layer.weight.detach()
        super().post(layer)
        weight.mul_(2)


class KeepingLater(Keeping, toy.Packed):
    """On its twins it packs; on what serves it keeps a view."""

    armed = False

    def post(self, layer: Any) -> None:
        (Keeping if KeepingLater.armed else toy.Packed).post(self, layer)


def one_piece(host: toy.ToyHost, *seeds: int) -> tuple[Manifest, list[list[torch.Tensor]]]:
    """An arena in which the parts of each fused weight are neighbours, as they are in a model without biases."""
    infos = sorted(host.infos, key=lambda info: info.name.rpartition(".")[2])
    manifest = lay_out(infos)
    slots = []
    for seed in seeds:
        memory = torch.zeros(manifest.nbytes, dtype=torch.uint8)
        values = toy.weights_of(host.infos, seed)
        slot = [memory[s.offset : s.offset + s.nbytes].view(torch.float32).view(s.shape) for s in manifest.tensors]
        for spec, view in zip(manifest.tensors, slot, strict=True):
            view.copy_(values[spec.name])
        slots.append(slot)
    return manifest, slots


@contextmanager
def loaded(method: Any) -> Iterator[tuple[toy.ToyHost, Loader, list[list[torch.Tensor]]]]:
    host = toy.ToyHost(method=method)
    loader = Loader(host, host.infos)
    manifest, slots = one_piece(host, 1, 2)
    loader.map(manifest, slots)
    try:
        yield host, loader, slots
    finally:
        loader.close()


def borrowed(loader: Loader) -> set[frozenset[str]]:
    return {choice.borrows for path, choice in loader.decided.choices.items() if path.endswith("qkv")}


def test_what_is_packed_is_read_where_the_trainer_put_it() -> None:
    with loaded(Watched) as (host, loader, slots):
        assert borrowed(loader) == {frozenset({"weight"})}
        Watched.seen.clear()
        loader.apply(1)
        names = [spec.name for spec in loader.mapped.manifest.tensors]
        assert Watched.seen == [slots[1][names.index(f"layers.{k}.q.weight")].data_ptr() for k in (0, 1)]
        assert same(outputs(host), outputs(toy.ToyHost(method=toy.Packed, seed=2)))


@pytest.mark.parametrize("method", [Keeping, Scribbling])
def test_who_keeps_or_writes_what_it_packs_is_lent_nothing(method: Any) -> None:
    with loaded(method) as (host, loader, slots):
        assert borrowed(loader) == {frozenset()}
        before = [tensor.clone() for tensor in slots[0]]
        loader.apply(0)
        assert all(map(torch.equal, before, slots[0]))
        want = outputs(toy.ToyHost(method=toy.Packed, seed=1))
        assert same(outputs(host), want)
        for tensor in slots[0]:
            tensor.fill_(float("nan"))  # the next version is on its way
        assert same(outputs(host), want)


def test_what_serves_may_not_keep_what_its_twin_gave_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(KeepingLater) as (host, loader, slots):
        assert borrowed(loader) == {frozenset({"weight"})}
        monkeypatch.setattr(KeepingLater, "armed", True)
        for slot, seed in ((0, 1), (1, 2), (0, 1)):
            loader.apply(slot)
            kept = [tensor.clone() for tensor in slots[slot]]
            for tensor in slots[slot]:
                tensor.fill_(float("nan"))
            assert same(outputs(host), outputs(toy.ToyHost(method=toy.Packed, seed=seed)))
            for tensor, value in zip(slots[slot], kept, strict=True):
                tensor.copy_(value)


def test_a_loan_is_returned_with_the_last_view_of_it() -> None:
    owned = torch.arange(6.0).view(2, 3)
    loan = Loan(owned)
    assert loan.returned()
    taken = loan.take()
    view = taken.t()[1:]
    assert torch.equal(taken, owned)
    assert taken.data_ptr() == owned.data_ptr()
    del taken, owned
    assert not loan.returned()
    assert view.tolist() == [[1.0, 4.0], [2.0, 5.0]]
    del view
    assert loan.returned()
