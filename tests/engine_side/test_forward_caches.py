"""A load clears what a forward computed from the former weights, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from bridge.protocol.rank_jobs import BakeJob, LogprobsJob, RankScores
from engine_side.live.forward_caches import ForwardCaches, names_assigned_in_forward
from engine_side.load.loader import Loader
from engine_side.worker.rank import Rank
from tests.engine_side import toy_engine as toy


class Keeps(toy.Plain):
    """The first call makes a copy of the weight, and no other call looks at the weight again."""

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        if getattr(layer, "turned", None) is None:
            layer.turned = layer.weight.detach().t().clone()
        return x @ layer.turned + layer.bias


class KeepsBesidePacked(toy.Packed):
    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        if getattr(layer, "turned", None) is None:
            layer.turned = layer.kernel(torch.eye(16))
        return layer.turned[x.argmax(1)]


class Router(nn.Module):
    """Cannot be called alone; joins the weights of its children when it is first called."""

    def __init__(self, children: toy.Toy) -> None:
        super().__init__()
        self.joined: torch.Tensor | None = None
        self.beside = [children.layers[0].norm, children.layers[1].norm]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.joined is None:
            self.joined = torch.cat([norm.weight for norm in self.beside])
        return x * self.joined


class Routed(toy.Toy):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.router = Router(self)
        self.bound: torch.Tensor | None = None


class RoutedHost(toy.ToyHost):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        router = Routed(**options)
        router.load_state_dict(self.model.state_dict())
        self.model = router

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            return Routed(**self.options)


@pytest.mark.parametrize("method", [Keeps, KeepsBesidePacked])
def test_a_module_that_keeps_a_copy_answers_with_the_new_weights(method: Any) -> None:
    host = toy.ToyHost(method=method)
    x = torch.eye(16)[:5]
    for block in host.model.layers:
        host.apply(block.qkv, x)
    loader = Loader(host, host.infos)
    try:
        loader.map(*toy.arena(host.infos, 1, 2))
        for slot, seed in ((0, 1), (1, 2)):
            outcome = loader.apply(slot)
            assert set(outcome.dropped) == {"layers.0.qkv.turned", "layers.1.qkv.turned"}
            fresh = toy.ToyHost(method=method, seed=seed)
            for block, other in zip(host.model.layers, fresh.model.layers, strict=True):
                assert torch.equal(host.apply(block.qkv, x), fresh.apply(other.qkv, x))
    finally:
        loader.close()


def test_a_module_that_cannot_be_called_alone_makes_it_anew() -> None:
    host = RoutedHost()
    x = torch.ones(32)
    host.model.router(x)
    loader = Loader(host, host.infos)
    try:
        manifest, slots = toy.arena(host.infos, 1, 2)
        loader.map(manifest, slots)
        outcome = loader.apply(0)
        assert outcome.dropped == ("router.joined",)
        sent = [slots[0][loader.mapped.index[f"layers.{k}.norm.weight"]] for k in (0, 1)]
        assert torch.equal(host.model.router(x), torch.cat(sent))
    finally:
        loader.close()


@contextmanager
def routed() -> Iterator[tuple[RoutedHost, Loader]]:
    """A loader over two versions of a model to which somebody else has given a tensor, which no forward computes."""
    host = RoutedHost()
    host.model.bound = torch.ones(3)
    loader = Loader(host, host.infos)
    loader.map(*toy.arena(host.infos, 1, 2))
    try:
        yield host, loader
    finally:
        loader.close()


def test_a_load_without_a_canary_leaves_what_no_forward_computes() -> None:
    with routed() as (host, loader):
        bound = host.model.bound
        assert loader.apply(0).dropped == ()
        assert host.model.bound is bound
        host.model.router(torch.ones(32))
        assert loader.apply(1).dropped == ("router.joined",), "its own forward computes that one"


def test_after_an_aborted_load_every_attribute_is_valid() -> None:
    x = torch.ones(32)
    with routed() as (host, loader):
        bound = host.model.bound
        loader.apply(0)
        served = host.model.router(x).clone()
        loader.apply(1)  # does not pass, say: no forward runs, and the former version is put back
        loader.apply(0)
        assert host.model.bound is bound
        assert torch.equal(host.model.router(x), served)


class Scoring(RoutedHost):
    """Prompt log-probabilities that need what somebody else has set on the model."""

    needs_bound = True
    failure: type[BaseException] = RuntimeError

    def prompt_logprobs(self, prompts: Any, adapter: str | None = None) -> list[list[float]]:
        if self.needs_bound and self.model.bound is None:
            raise self.failure("nothing is bound")
        return [[0.0]]


@pytest.mark.parametrize("needs_bound", [True, False])
def test_a_canary_puts_back_what_its_forward_does_not_compute(needs_bound: bool) -> None:
    host = Scoring()
    host.needs_bound = needs_bound
    bound = host.model.bound = torch.ones(3)
    with planned(host) as rank:
        for _ in range(2):
            assert rank._answer(LogprobsJob(((1,),))) == RankScores(((0.0,),))
            assert host.model.bound is bound


def test_a_canary_that_is_interrupted_puts_back_what_it_cleared() -> None:
    host = Scoring()
    host.failure = KeyboardInterrupt
    bound = host.model.bound = torch.ones(3)
    with planned(host) as rank:
        with pytest.raises(KeyboardInterrupt):
            rank._answer(LogprobsJob(((1,),)))
        assert host.model.bound is bound


@contextmanager
def planned(host: RoutedHost) -> Iterator[Rank]:
    """A rank with one plan, whose first version is loaded."""
    rank = Rank(host)
    try:
        rank._answer(BakeJob(0, tuple(host.infos), False))
        loader: Any = rank._plans[0].loader
        loader.map(*toy.arena(host.infos, 1))
        loader.apply(0)
        yield rank
    finally:
        rank.close()


def test_what_a_forward_cannot_compute_is_put_back_and_left_alone() -> None:
    with routed() as (host, loader):
        bound = host.model.bound
        loader.apply(0)
        assert loader.caches.clear(unproven=True) == ("bound",)
        assert host.model.bound is None
        assert loader.caches.restore()
        assert host.model.bound is bound
        loader.apply(1)
        assert loader.caches.clear(unproven=True) == ()
        assert not loader.caches.restore(), "nothing was cleared: the forward failed for another reason"


class Base(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table_of(x)

    @torch.no_grad()
    def table_of(self, x: torch.Tensor) -> torch.Tensor:
        def fill() -> None:
            self.inner = x

        fill()
        self.table = x
        return x

    def bind(self, x: torch.Tensor) -> None:
        self.bound = x


class Sub(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.own = x
        return super().forward(x)


def test_names_that_a_forward_assigns_are_read_off_its_methods() -> None:
    assert names_assigned_in_forward(Sub()) == {"own", "table", "inner"}
    assert names_assigned_in_forward(nn.Linear(2, 2)) == frozenset()


def test_views_integers_and_what_was_set_from_the_start_stay() -> None:
    fresh, live = nn.Linear(2, 2), nn.Linear(2, 2)
    fresh.view = fresh.table = fresh.mask = None
    fresh.start = torch.ones(1)
    live.view, live.table, live.mask = live.weight.t(), [live.weight.t().clone()], torch.ones(2, dtype=torch.int64)
    live.start = torch.zeros(1)
    caches = ForwardCaches(live, [("", fresh, live)], {})
    assert caches.clear() == (), "no forward of a linear layer assigns any of these"
    assert caches.clear(unproven=True) == ("table",)
    assert live.table is None
    assert live.view is not None
    assert live.mask is not None
    assert live.start is not None
