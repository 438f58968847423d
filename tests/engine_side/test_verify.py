"""Each level fires on its own fault, with the others not asked; and none fires on a sound load."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import ConfigError
from bridge.model.levels import RANK_LEVELS
from bridge.model.receipt import LevelResult
from bridge.model.regions import Move, RankPlan
from engine_side.load.loader import Loader
from engine_side.plan import probes
from engine_side.plan.probes import Probe
from engine_side.verify.verify import Verifier
from tests.engine_side import toy_engine as toy

METHODS = [toy.Plain, toy.Transposed, toy.Shuffled, toy.Packed, toy.HiddenCopy, toy.Latched]


@contextmanager
def ready(**options: Any) -> Iterator[tuple[toy.ToyHost, Loader, Verifier]]:
    """Version in slot 0 (seed 1) applied and proven; slot 1 holds seed 2."""
    host = toy.ToyHost(**options)
    loader = Loader(host, host.infos, threads=2)
    loader.map(*toy.arena(host.infos, 1, 2))
    verifier = Verifier(loader)
    outcome = loader.apply(0)
    assert all(r.ok for r in verifier.run(RANK_LEVELS, 0, outcome=outcome))
    try:
        yield host, loader, verifier
    finally:
        loader.close()


def fired(verifier: Verifier, slot: int, **options: Any) -> set[str]:
    """Levels that fail, each asked alone."""
    return {level for level in RANK_LEVELS for r in verifier.run([level], slot, **options) if not r.ok}


def only(result: tuple[LevelResult, ...]) -> LevelResult:
    (found,) = result
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decay", [False, True])
def test_a_sound_push_passes_every_level(method: Any, decay: bool) -> None:
    with ready(method=method, decay=decay, wrapped=1) as (_, loader, verifier):
        for slot, previous in ((1, 0), (0, 1)):
            outcome = loader.apply(slot)
            found = verifier.run(RANK_LEVELS, slot, outcome=outcome, previous=previous)
            assert [r.level for r in found] == list(RANK_LEVELS)
            assert all(r.ok for r in found)
            assert found[2].checked > 0
        assert verifier.canary_only() == ()


def test_levels_that_are_not_asked_do_not_run() -> None:
    with ready() as (_, _loader, verifier):
        assert verifier.run(["canary", "transfer"], 0) == ()
        assert [r.level for r in verifier.run(["probe", "coverage"], 0)] == ["coverage", "probe"]


def drop(plan: RankPlan, name: str) -> RankPlan:
    return RankPlan(plan.targets, tuple(m for m in plan.moves if m.tensor != name), plan.fills, plan.computed)


def test_a_dropped_name_fires_coverage() -> None:
    with ready() as (_, loader, verifier):
        loader.baked = replace(loader.baked, plan=drop(loader.baked.plan, "layers.0.k.weight"))
        assert fired(verifier, 0) == {"coverage"}
        (failure,) = only(verifier.run(["coverage"], 0)).failures
        assert failure.name == failure.parameter == "layers.0.qkv.weight"
        assert "128" in failure.got


def swapped(moves: tuple[Move, ...], a: str, b: str) -> tuple[Move, ...]:
    turn = {a: b, b: a}
    return tuple(Move(turn.get(m.tensor, m.tensor), m.source, m.target, m.dest) for m in moves)


@pytest.mark.parametrize("method", [toy.Plain, toy.Shuffled])
def test_swapped_shards_fire_read_back(method: Any) -> None:
    with ready(method=method) as (host, loader, verifier):
        weight = host.model.layers[0].qkv.weight
        good = loader.canonical.moves["layers.0.qkv.weight"]
        loader.canonical.moves["layers.0.qkv.weight"] = list(
            swapped(tuple(good), "layers.0.k.weight", "layers.0.v.weight")
        )
        loader._compile(0)
        loader.apply(0)
        loader.canonical.moves["layers.0.qkv.weight"] = good
        loader._compile(0)
        assert weight is host.model.layers[0].qkv.weight
        assert fired(verifier, 0) == {"read-back"}
        names = {f.tensor for f in only(verifier.run(["read-back"], 0)).failures}
        assert names == {"layers.0.k.weight", "layers.0.v.weight"}


@pytest.mark.parametrize("value", [float("nan"), -0.0, 1e-30])
def test_one_bit_fires_read_back(value: float) -> None:
    with ready() as (host, loader, verifier):
        sent = loader.mapped.slots[0][loader.mapped.index["layers.1.norm.weight"]]
        sent[3] = 0.0
        loader.apply(0)
        assert not fired(verifier, 0)
        host.model.layers[1].norm.weight.data[3] = value
        assert fired(verifier, 0) == {"read-back"}
        (failure,) = only(verifier.run(["read-back"], 0)).failures
        assert failure.name == "layers.1.norm.weight -> layers.1.norm.weight"
        assert (failure.tensor, failure.parameter) == ("layers.1.norm.weight", "layers.1.norm.weight")
        assert "0.0 at element 3" in failure.expected
        sent[3] = float("nan")
        loader.apply(0)
        assert not fired(verifier, 0)


@pytest.mark.parametrize("method", [toy.Packed, toy.HiddenCopy, toy.Latched])
def test_a_skipped_post_load_fires_probe(method: Any) -> None:
    with ready(method=method) as (host, loader, verifier):
        host.skip_post_load = True
        keep = dict(host.model.named_parameters())
        outcome = loader.apply(1)
        host.skip_post_load = False
        assert keep.keys() == dict(host.model.named_parameters()).keys()
        assert "probe" in fired(verifier, 1, outcome=outcome)
        assert any("qkv" in f.name for f in only(verifier.run(["probe"], 1)).failures)


def test_a_second_shuffle_fires_read_back_and_probe_of_everything() -> None:
    with ready(method=toy.Shuffled) as (host, _loader, verifier):
        host.post_load(host.model.layers[0].qkv)
        assert fired(verifier, 0) == {"read-back"}
        result = verifier.probe(0, every=True)
        assert [f.name for f in result.failures] == ["layers.0.qkv"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_probe_weighs_what_the_arena_holds_now(tied: bool) -> None:
    """Not what it held when this slot, or the arena before it, was last looked at."""
    with ready(method=toy.Packed, tied=tied) as (host, loader, verifier):
        assert verifier.probe(0, every=True).ok
        fresh = toy.weights_of(host.infos, 3)
        for spec, tensor in zip(loader.mapped.manifest.tensors, loader.mapped.slots[0], strict=True):
            tensor.copy_(fresh[spec.name])
        assert not verifier.probe(0, every=True).ok
        loader.apply(0)
        assert verifier.probe(0, every=True).ok
        former = loader.mapped.slots  # kept, so that the next arena lies elsewhere
        loader.map(*toy.arena(host.infos, 4, 5))
        assert not verifier.probe(0, every=True).ok
        loader.apply(0)
        assert verifier.probe(0, every=True).ok
        del former


def test_a_probe_that_raised_leaves_no_answer_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with ready(tied=False) as (host, loader, verifier):
        fails = partial(_raise, OSError("no memory for a twin"))
        monkeypatch.setattr(verifier._derived, "wrong", fails)
        with pytest.raises(OSError, match="no memory"):
            verifier.probe(0, every=True)
        monkeypatch.undo()
        fresh = toy.weights_of(host.infos, 3)
        for spec, tensor in zip(loader.mapped.manifest.tensors, loader.mapped.slots[0], strict=True):
            tensor.copy_(fresh[spec.name])
        assert {f.name for f in verifier.probe(0, every=True).failures} >= {"embed", "head"}
        loader.apply(0)
        assert verifier.probe(0, every=True).ok


def _raise(error: Exception, *_: Any) -> None:
    raise error


def test_a_closed_loader_holds_no_arena() -> None:
    with ready(method=toy.Packed) as (_, loader, verifier):
        assert verifier.probe(0, every=True).ok
        shown = [weakref.ref(tensor) for slot in loader.mapped.slots for tensor in slot]
        loader.close()
        gc.collect()
        assert not [ref for ref in shown if ref() is not None]
        with pytest.raises(ConfigError, match="not mapped"):
            loader.canonical.values(loader.decided.choices["layers.0.qkv"], 0)


def test_storage_that_nobody_reads_fires_only_the_probe_of_everything() -> None:
    with ready() as (host, _loader, verifier):
        layer = host.model.layers[0].qkv
        stale = layer.weight.detach().flip(0)
        layer.method.apply = lambda self, x: nn.functional.linear(x, stale, self.bias)
        assert not fired(verifier, 0)
        assert [f.name for f in verifier.probe(0, every=True).failures] == ["layers.0.qkv"]


def lose_loader(host: toy.ToyHost) -> None:
    del host.model.layers[0].qkv.weight.weight_loader


def new_object(host: toy.ToyHost) -> None:
    layer = host.model.layers[0].qkv
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def move_storage(host: toy.ToyHost) -> None:
    layer = host.model.layers[0].qkv
    layer.weight.data = layer.weight.data.clone()


@pytest.mark.parametrize("fault", [lose_loader, new_object, move_storage])
def test_lost_attributes_fire_attributes(fault: Any) -> None:
    with ready() as (host, _loader, verifier):
        fault(host)
        assert fired(verifier, 0) == {"attributes"}
        assert all(f.name == "layers.0.qkv.weight" for f in only(verifier.run(["attributes"], 0)).failures)


def test_a_stale_wrapper_alias_fires_attributes() -> None:
    with ready(wrapped=1) as (host, _loader, verifier):
        wrapper = host.model.layers[1].qkv
        wrapper.weight = nn.Parameter(wrapper.weight.detach().clone(), requires_grad=False)
        assert fired(verifier, 0) == {"attributes"}


@pytest.mark.parametrize("method", [toy.Plain, toy.Shuffled, toy.Packed, toy.HiddenCopy])
def test_a_frozen_tensor_fires_change(method: Any) -> None:
    with ready(method=method) as (_, loader, verifier):
        index = loader.mapped.index["layers.0.q.weight"]
        outcome = loader.apply(1, [k for n, k in loader.mapped.index.items() if "layers.0." not in n])
        found = verifier.change(1, 0, [index])
        assert not found.ok
        assert verifier.change(1, 0, []).ok
        loader.apply(1)
        assert verifier.change(1, 0, [index]).ok
        assert verifier.change(1, 0).ok
        assert outcome.written > 0


def test_a_change_below_the_engines_dtype_is_no_fault() -> None:
    with ready() as (_, loader, verifier):
        loader.mapped.slots[1][0].copy_(loader.mapped.slots[0][0])
        assert verifier.change(1, 0, [0]).ok


def test_corrupted_arena_bytes_fire_read_back() -> None:
    with ready() as (_, loader, verifier):
        loader.mapped.slots[0][1].view(torch.uint8)[0, 0] ^= 1
        assert fired(verifier, 0) == {"read-back"}


def test_a_computed_parameter_is_read_back_bit_for_bit() -> None:
    with ready(decay=True) as (host, _loader, verifier):
        live = host.model.decay.A.data
        live.view(torch.int32)[2] ^= 1
        assert fired(verifier, 0) == {"read-back"}


def test_failures_are_bounded_and_counted() -> None:
    with ready(layers=12) as (host, _loader, verifier):
        for block in host.model.layers:
            block.norm.weight.data.zero_()
            block.qkv.bias.data.zero_()
        result = only(verifier.run(["read-back"], 0))
        assert len(result.failures) == 16
        assert result.note == "32 more"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 2048])
def test_the_tolerance_catches_swapped_rows_and_a_dropped_bias(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(96, size, generator=generator) / size**0.5).to(dtype)
    bias = (torch.randn(96, generator=generator) * 0.02).to(dtype)
    probe = Probe("rows", size, 8, dtype, form="linear", weight="w", bias="b")
    x = probe.inputs(torch.device("cpu"))
    values = {"w": weight, "b": bias}
    assert probes.mismatch(probe, x, nn.functional.linear(x, weight, bias), values) is None
    wrong = weight.clone()
    wrong[[3, 4]] = wrong[[4, 3]]
    assert probes.mismatch(probe, x, nn.functional.linear(x, wrong, bias), values) is not None
    assert probes.mismatch(probe, x, nn.functional.linear(x, weight), values) is not None
    column = weight.clone()
    column[:, 5] = -column[:, 5]
    assert probes.mismatch(probe, x, nn.functional.linear(x, column, bias), values) is not None


def test_a_product_in_the_weights_own_dtype_judges_like_a_wider_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = torch.randn(300, 96).bfloat16(), torch.randn(300).bfloat16()
    probe = Probe("rows", 96, 8, torch.bfloat16, form="linear", weight="w", bias="b")
    x = probe.inputs(torch.device("cpu"))
    found = []
    for native in (True, False):
        monkeypatch.setattr(probes, "_multiplies", lambda dtype, device, native=native: native)
        found.append(probe.reference(x, {"b": bias}, (weight[:100], weight[100:])))
    (narrow, limit), (wide, limit_wide) = found
    assert bool(((narrow - wide).abs() <= limit_wide / 4).all())
    assert bool((limit >= limit_wide / 8).all())
    assert bool((limit <= limit_wide * 8).all())


def test_the_reference_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"w": torch.randn(50, 30), "b": torch.randn(50)}
    probe = Probe("rows", 30, 8, torch.float32, form="linear", weight="w", bias="b")
    x = probe.inputs(torch.device("cpu"))
    whole = probe.reference(x, values)
    monkeypatch.setattr(probes, "_PART", 70)
    parts = probe.reference(x, values)
    assert torch.allclose(whole[0], parts[0])
    assert torch.allclose(whole[1], parts[1])
