"""Modules that were replaced after the plan was made: no load writes to the former ones, no look passes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import ConfigError
from engine_side.live.bindings import BoundModules
from engine_side.load.loader import Loader
from engine_side.load.version_zero import read_back
from engine_side.verify.verify import Verifier
from tests.engine_side import toy_engine as toy


@contextmanager
def ready(**options: Any) -> Iterator[tuple[toy.ToyHost, Loader, Verifier]]:
    """Seed 1 applied and proven; slot 1 holds seed 2."""
    host = toy.ToyHost(**options)
    loader = Loader(host, host.infos)
    loader.map(*toy.arena(host.infos, 1, 2))
    verifier = Verifier(loader)
    outcome = loader.apply(0)
    assert all(r.ok for r in verifier.run(["attributes", "read-back", "probe"], 0, outcome=outcome))
    try:
        yield host, loader, verifier
    finally:
        loader.close()


def a_leaf(host: toy.ToyHost) -> str:
    host.model.layers[1].norm = copy.deepcopy(host.model.layers[1].norm)
    return "layers.1.norm"


def a_block(host: toy.ToyHost) -> str:
    host.model.layers[1] = copy.deepcopy(host.model.layers[1])
    return "layers.1"


def the_list(host: toy.ToyHost) -> str:
    host.model.layers = nn.ModuleList([copy.deepcopy(layer) for layer in host.model.layers])
    return "layers"


def two_that_changed_places(host: toy.ToyHost) -> str:
    host.model.layers[0], host.model.layers[1] = host.model.layers[1], host.model.layers[0]
    return "layers.0"


def one_taken_out(host: toy.ToyHost) -> str:
    del host.model.layers[1]
    return "layers.1"


def behind_a_wrapper(host: toy.ToyHost) -> str:
    host.model.layers[1].qkv.base_layer = copy.deepcopy(host.model.layers[1].qkv.base_layer)
    return "layers.1.qkv.base_layer"


Fault = Callable[[toy.ToyHost], str]
FAULTS = [a_leaf, a_block, the_list, two_that_changed_places, one_taken_out, behind_a_wrapper]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", [toy.Plain, toy.Packed])
def test_no_load_and_no_look_passes_a_replaced_module(fault: Fault, method: Any) -> None:
    with ready(method=method, wrapped=1) as (host, loader, verifier):
        path = fault(host)
        before = {n: t.clone() for n, t in host.model.state_dict().items()}
        with pytest.raises(ConfigError, match=r"replaced.*attach") as caught:
            loader.apply(1)
        assert path in caught.value.names
        assert " at 0x" in (caught.value.expected or "")
        assert caught.value.got is not None
        with pytest.raises(ConfigError, match="replaced"):
            verifier.coverage()
        with pytest.raises(ConfigError, match="replaced"):
            read_back(loader, [torch.zeros_like(t) for t in loader.mapped.slots[0]])
        assert all(torch.equal(t, before[n]) for n, t in host.model.state_dict().items())
        results = {r.level: r for r in verifier.run(["attributes", "read-back"], 0)}
        assert not results["attributes"].ok
        assert path in {f.name for f in results["attributes"].failures}
        assert any(f.name.startswith("layers.") for f in results["read-back"].failures)
        fresh = Loader(host, host.infos) if path != "layers.1" or fault is a_block else None
        if fresh is not None:  # what the remedy says
            fresh.map(*toy.arena(host.infos, 1, 2))
            fresh.apply(1)
            assert all(r.ok for r in Verifier(fresh).run(["coverage", "attributes", "read-back", "probe"], 1))
            fresh.close()


def test_a_replaced_packed_module_fails_its_probe() -> None:
    with ready(method=toy.Packed) as (host, _, verifier):
        host.model.layers[0].qkv = copy.deepcopy(host.model.layers[0].qkv)
        (result,) = verifier.run(["probe"], 0)
        assert [f.name for f in result.failures] == ["layers.0.qkv"]


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_a_module_that_was_wrapped_still_hangs() -> None:
    with ready() as (host, loader, verifier):
        inner = host.model.layers[0].norm
        host.model.layers[0].norm = Around(inner)
        loader.apply(1)
        assert all(r.ok for r in verifier.run(["read-back", "attributes"], 1))
        host.model.layers[0].norm.inner = copy.deepcopy(inner)
        with pytest.raises(ConfigError, match=r"layers\.0\.norm\.inner"):
            loader.apply(0)


def test_one_of_two_places_of_a_shared_module() -> None:
    shared = nn.Linear(2, 2)
    root = nn.Module()
    root.a, root.b, root.other = nn.Sequential(shared), nn.Sequential(shared), nn.ReLU()
    tree = BoundModules(root, [shared])
    assert tree.replaced(root) == []
    assert "" in [each.path for each in tree.replaced(copy.deepcopy(root))]
    root.other = nn.GELU()  # holds nothing that a plan writes
    assert tree.replaced(root) == []
    root.b[0] = copy.deepcopy(shared)
    (found,) = tree.replaced(root)
    assert found.path == "b.0"
    assert tree.below([found]) == {id(shared)}


def test_a_look_sees_the_parameter_that_hangs_there_now() -> None:
    with ready() as (host, loader, verifier):
        norm = host.model.layers[0].norm
        norm.weight = nn.Parameter(torch.full((16,), 9.0), requires_grad=False)
        (result,) = verifier.run(["read-back"], 0)
        assert [f.name for f in result.failures] == ["layers.0.norm.weight -> layers.0.norm.weight"]
        loader.apply(0)
        assert verifier.read_back(0).ok


def test_a_look_sees_that_a_parameter_is_gone_and_a_load_that_it_came_back() -> None:
    with ready() as (host, loader, verifier):
        norm = host.model.layers[0].norm
        weight = norm.weight
        del norm.weight
        for _ in range(2):
            (result,) = verifier.run(["read-back"], 0)
            assert [f.name for f in result.failures] == ["layers.0.norm.weight -> layers.0.norm.weight"]
        weight.data.zero_()
        norm.weight = weight
        assert not verifier.read_back(0).ok
        loader.apply(1)
        assert verifier.read_back(1).ok
        assert torch.equal(weight, loader.mapped.slots[1][loader.mapped.index["layers.0.norm.weight"]])


def test_a_look_takes_nothing_from_what_the_next_load_reports() -> None:
    with ready() as (host, loader, verifier):
        norm = host.model.layers[0].norm
        norm.weight.data = norm.weight.data.clone()
        assert verifier.read_back(0).ok
        outcome = loader.apply(1)
        assert outcome.rebound == ("layers.0.norm.weight",)
        (attributes,) = verifier.run(("attributes",), 1, outcome=outcome)
        assert attributes.ok


def test_a_load_that_nobody_verified_leaves_no_fault_for_the_next() -> None:
    with ready() as (host, loader, verifier):
        norm = host.model.layers[0].norm
        norm.weight.data = norm.weight.data.clone()
        verifier.run((), 1, outcome=loader.apply(1))
        (attributes,) = verifier.run(("attributes",), 0, outcome=loader.apply(0))
        assert attributes.ok
        norm.weight.data = norm.weight.data.clone()
        (attributes,) = verifier.run(("attributes",), 0)
        assert not attributes.ok, "nobody's load moved it this time"
