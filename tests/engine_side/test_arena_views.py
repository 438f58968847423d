"""Post-load steps on the arena's own memory: whatever they do with it, no later version shows through."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bridge.errors import OutOfMemory
from bridge.model.levels import RANK_LEVELS
from bridge.model.manifest import lay_out
from bridge.shm.arena import Arena
from engine_side.load import arena_views
from engine_side.load.arena_views import ArenaViews
from engine_side.load.loader import Loader
from engine_side.verify.verify import Verifier
from tests.engine_side import toy_engine as toy
from tests.engine_side.test_loader import outputs, same


def pack(layer: Any, seen: torch.Tensor) -> None:
    bias = layer.bias.detach().clone()
    layer.kernel = lambda x: nn.functional.linear(x, seen, bias)
    layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Watched(toy.Packed):
    seen: list[int] = []

    def post(self, layer: Any) -> None:
        Watched.seen.append(layer.weight.data_ptr())
        super().post(layer)


class Scribbling(toy.Packed):
    """Other values in what it packed from."""

    def post(self, layer: Any) -> None:
        weight = layer.weight.detach()
        super().post(layer)
        weight.mul_(2)


class Clamping(toy.Packed):
    """A write that changes nothing."""

    def post(self, layer: Any) -> None:
        layer.weight.data.clamp_(-1e6, 1e6)
        super().post(layer)


class KeepingView(toy.Packed):
    def post(self, layer: Any) -> None:
        pack(layer, layer.weight.detach().t().t())


class KeepingParameter(toy.Packed):
    """What it was given, under another name."""

    def post(self, layer: Any) -> None:
        layer.packed = nn.Parameter(layer.weight.detach(), requires_grad=False)
        pack(layer, layer.packed)


class KeepingInTurn(toy.Packed):
    """Keeps at every second load only: what it kept then must be gone, or its own."""

    times = 0

    def post(self, layer: Any) -> None:
        KeepingInTurn.times += 1
        (KeepingParameter if KeepingInTurn.times % 4 > 1 else toy.Packed).post(self, layer)


class Raising(toy.Packed):
    fail = False

    def post(self, layer: Any) -> None:
        if Raising.fail:
            layer.rest = nn.Parameter(layer.weight.detach(), requires_grad=False)
            raise RuntimeError("out of memory")
        super().post(layer)


@contextmanager
def viewed(
    method: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[toy.ToyHost, Loader, Arena, ArenaViews | None]]:
    """A loader over a read-only arena whose fused weights lie in one piece; the arena again, to write to."""
    monkeypatch.setattr(arena_views, "LEAST", 1)
    host = toy.ToyHost(method=method)
    manifest = lay_out(sorted(host.infos, key=lambda info: info.name.rpartition(".")[2]))
    with Arena.create(manifest, name="viewed", directory=folder) as writable:
        arena = Arena.open(writable.path, manifest)
        loader = Loader(host, host.infos)
        slots = [arena.tensors(slot) for slot in range(arena.slots)]
        views = ArenaViews.of(arena)
        loader.map(manifest, slots, views)
        try:
            yield host, loader, writable, views
        finally:
            loader.close()
            arena.close()
            writable.unlink()


def put(arena: Arena, host: toy.ToyHost, slot: int, seed: int) -> None:
    values = toy.weights_of(host.infos, seed)
    for spec, view in zip(arena.manifest.tensors, arena.tensors(slot), strict=True):
        view.copy_(values[spec.name])


@pytest.mark.parametrize(
    "method", [toy.Packed, Scribbling, Clamping, KeepingView, KeepingParameter, KeepingInTurn, toy.Latched]
)
def test_a_version_serves_alone_whatever_post_load_does(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with viewed(method, tmp_path, monkeypatch) as (host, loader, arena, _):
        verifier = Verifier(loader)
        for seed in range(1, 8):
            slot = seed % 2
            put(arena, host, slot, seed)
            outcome = loader.apply(slot)
            assert all(level.ok for level in verifier.run(RANK_LEVELS, slot, outcome=outcome))
            want = outputs(toy.ToyHost(method=toy.Packed, seed=seed))
            assert same(outputs(host), want)
            put(arena, host, slot, 100 + seed)  # a version that is on its way
            assert same(outputs(host), want)
            assert torch.equal(
                arena.tensors(slot)[0], toy.weights_of(host.infos, 100 + seed)[arena.manifest.tensors[0].name]
            )


def test_what_is_packed_is_read_where_the_trainer_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, mapped = Arena.private, []

    def noted(arena: Arena) -> mmap.mmap:
        mapped.append(private(arena))
        return mapped[-1]

    monkeypatch.setattr(Arena, "private", noted)
    with viewed(Watched, tmp_path, monkeypatch) as (host, loader, arena, views):
        put(arena, host, 0, 1)
        (mapping,) = mapped
        began = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
        Watched.seen.clear()
        loader.apply(0)
        assert all(began <= address < began + arena.nbytes for address in Watched.seen)
        assert len(Watched.seen) == 2
        assert views is not None
        assert views.usable


def test_a_step_that_raised_leaves_nothing_of_the_arena_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with viewed(Raising, tmp_path, monkeypatch) as (host, loader, arena, _):
        put(arena, host, 0, 1)
        put(arena, host, 1, 2)
        loader.apply(0)
        monkeypatch.setattr(Raising, "fail", True)
        with pytest.raises(OutOfMemory, match=r"layers\.0\.qkv.*RuntimeError: out of memory"):
            loader.apply(1)
        held = host.model.layers[0].qkv.rest.detach().clone()
        put(arena, host, 1, 3)
        assert torch.equal(host.model.layers[0].qkv.rest, held)
        monkeypatch.undo()
        loader.apply(1)
        assert same(outputs(host), outputs(toy.ToyHost(method=toy.Packed, seed=3)))
        loader.apply(0)
        assert same(outputs(host), outputs(toy.ToyHost(method=toy.Packed, seed=1)))


def test_without_a_private_mapping_weights_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(arena: Arena) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(Arena, "private", refuse)
    with viewed(Watched, tmp_path, monkeypatch) as (host, loader, arena, _):
        put(arena, host, 0, 1)
        loader.apply(0)
        assert same(outputs(host), outputs(toy.ToyHost(method=toy.Packed, seed=1)))


def test_small_odd_and_foreign_memory_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = lay_out(toy.announced())
    with Arena.create(manifest, name="viewed", directory=tmp_path) as arena:
        views = ArenaViews(arena.address, arena.private())
        big = arena.flat_tensor(0)
        monkeypatch.setattr(arena_views, "LEAST", 1 << 20)
        assert views.view(big) is None
        monkeypatch.setattr(arena_views, "LEAST", 16)
        assert views.view(big[1:65]) is None
        assert views.view(torch.zeros(64, dtype=torch.uint8)) is None
        assert views.view(big[:128].view(8, 16).t()) is None
        shown = views.view(big[64:192])
        assert shown is not None
        assert torch.equal(shown, big[64:192])
        views.close()
        views.close()
        assert views.view(big) is None
        arena.unlink()
