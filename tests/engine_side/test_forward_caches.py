"""What a forward keeps of the former weights is dropped by a load, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from engine_side.live.forward_caches import ForwardCaches
from engine_side.load.loader import Loader
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


def test_what_a_forward_cannot_make_again_is_put_back_and_left_alone() -> None:
    host = RoutedHost()
    bound = host.model.bound = torch.ones(3)  # somebody else's: no forward makes it
    loader = Loader(host, host.infos)
    try:
        loader.map(*toy.arena(host.infos, 1, 2))
        assert loader.apply(0).dropped == ("bound",)
        assert loader.used(well=False)
        assert host.model.bound is bound
        assert loader.apply(1).dropped == ()
        assert not loader.used(well=False), "nothing was dropped: the forward failed for another reason"
    finally:
        loader.close()


def test_views_integers_and_what_was_set_from_the_start_stay() -> None:
    fresh, live = nn.Linear(2, 2), nn.Linear(2, 2)
    fresh.view = fresh.table = fresh.mask = None
    fresh.start = torch.ones(1)
    live.view, live.table, live.mask = live.weight.t(), [live.weight.t().clone()], torch.ones(2, dtype=torch.int64)
    live.start = torch.zeros(1)
    assert ForwardCaches(live, [("", fresh, live)], {}).drop() == ("table",)
    assert live.table is None
    assert live.view is not None
    assert live.mask is not None
    assert live.start is not None
