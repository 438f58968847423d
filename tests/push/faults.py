"""Faults for tests of the verification: each breaks the smallest point, once, so that the way back is not broken."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

import engine_side.load.loader
from bridge.model.regions import Move
from bridge.protocol.coordinator_messages import SubmitRequest
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import EngineLoad, EngineLoaded
from bridge.shm.seal import seal_slot
from engine_side.driver.service import EngineService
from engine_side.engines.embedded import EmbeddedRankHost
from engine_side.load.copies import CopyBatch
from engine_side.load.loader import Loader, LoadOutcome
from engine_side.load.rebuild import Rebuilder
from tests.push.rig import Rig

Patch = pytest.MonkeyPatch
Inject = Callable[[Rig, Patch], None]
DOWN = "model.layers.0.mlp.down_proj.weight"
QKV = "model.layers.0.self_attn.qkv_proj.weight"


def parameter(rig: Rig, path: str) -> torch.Tensor:
    return rig.engine.runner.model.get_parameter(path)


def around_apply(
    patch: Patch, before: Callable[[], None] | None, after: Callable[[], None] | None, times: int = 1
) -> None:
    """Run something around the next `times` loads."""
    apply, left = Loader.apply, [times]

    def faulty(self: Loader, slot: int, changed: Iterable[int] | None = None) -> LoadOutcome:
        now = left[0] > 0
        left[0] -= 1
        if now and before is not None:
            before()
        outcome = apply(self, slot, changed)
        if now and after is not None:
            after()
        return outcome

    patch.setattr(Loader, "apply", faulty)


# ---- one per level --------------------------------------------------------------------------------------------------


def on_submit(rig: Rig, patch: Patch, change: Callable[[SubmitRequest], SubmitRequest]) -> None:
    """What the trainer hands over is changed on its way to the coordinator."""
    inner = rig.b._coordinator

    class Port:
        def call(self, request: Any, reply: Any, deadline: Any) -> Any:
            return inner.call(change(request) if isinstance(request, SubmitRequest) else request, reply, deadline)

    patch.setattr(rig.b, "_coordinator", Port())


def corrupt_a_byte(rig: Rig, patch: Patch) -> None:
    """The sign of one weight flips in the arena, after the version was sealed."""

    def corrupt(request: SubmitRequest) -> SubmitRequest:
        arena = rig.b.arena
        assert arena is not None
        slot = next(s for s in range(arena.slots) if getattr(arena.seal_of(s), "version", 0) == request.version)
        arena.flat(slot)[arena.manifest.by_name[DOWN].offset + 3] ^= 0x80
        return request

    on_submit(rig, patch, corrupt)


def seal_anew(rig: Rig, patch: Patch) -> None:
    """Somebody seals the slot as another version before the engine loads it."""
    load = EngineService._load

    def faulty(service: EngineService, request: EngineLoad, deadline: Deadline) -> EngineLoaded:
        arena = rig.b.arena
        assert arena is not None
        seal = arena.seal_of(request.job.slot)
        assert seal is not None
        seal_slot(arena, request.job.slot, request.sealed + 1, seal.digests)
        return load(service, request, deadline)

    patch.setattr(EngineService, "_load", faulty)


def with_moves(patch: Patch, change: Callable[[Move], Move | None]) -> None:
    """The engine's plan comes out of baking with other moves than its loader made."""
    bake = engine_side.load.loader.bake

    def faulty(*args: Any, **kwargs: Any) -> Any:
        baked = bake(*args, **kwargs)
        moves = tuple(m for m in map(change, baked.plan.moves) if m is not None)
        return replace(baked, plan=type(baked.plan)(baked.plan.targets, moves, baked.plan.fills, baked.plan.computed))

    patch.setattr(engine_side.load.loader, "bake", faulty)


def drop_a_move(rig: Rig, patch: Patch) -> None:
    with_moves(patch, lambda move: None if move.tensor.endswith("layers.0.self_attn.k_proj.weight") else move)


def swap_in_the_plan(rig: Rig, patch: Patch) -> None:
    """Gate and up projection of a layer change places, consistently: bits and probes follow the same wrong plan."""
    names = {f"model.layers.0.mlp.{a}_proj.weight": f"model.layers.0.mlp.{b}_proj.weight" for a, b in
             (("gate", "up"), ("up", "gate"))}  # fmt: skip
    with_moves(patch, lambda m: Move(names.get(m.tensor, m.tensor), m.source, m.target, m.dest))


def lose_a_loader(rig: Rig, patch: Patch) -> None:
    around_apply(patch, None, lambda: parameter(rig, QKV).__dict__.pop("weight_loader"))


def replace_a_parameter(rig: Rig, patch: Patch) -> None:
    """What an engine's post-load often does: the same values in a new object."""

    def fault() -> None:
        module = rig.engine.runner.model.get_submodule(QKV.rpartition(".")[0])
        fresh = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        fresh.__dict__.update(module.weight.__dict__)
        module.weight = fresh

    around_apply(patch, None, fault)


def swap_rows(rig: Rig, patch: Patch, *, times: int = 1) -> None:
    """The first head rows of q and k change places in live storage, after each of the next `times` loads."""

    def fault() -> None:
        weight = parameter(rig, QKV).detach()
        q, k = weight[0:24].clone(), weight[48:72].clone()
        weight[0:24], weight[48:72] = k, q

    around_apply(patch, None, fault, times)


def skip_post_load(rig: Rig, patch: Patch) -> None:
    """Live modules are filled, but what is derived from them is not built anew."""
    post_load, skipping = EmbeddedRankHost.post_load, [False]
    live = {id(module) for module in rig.engine.runner.model.modules()}

    def faulty(self: EmbeddedRankHost, module: torch.nn.Module) -> bool:
        return True if skipping[0] and id(module) in live else post_load(self, module)

    def switch() -> None:
        skipping[0] = not skipping[0]

    patch.setattr(EmbeddedRankHost, "post_load", faulty)
    around_apply(patch, switch, switch)


def freeze_a_tensor(rig: Rig, patch: Patch) -> None:
    kept: list[torch.Tensor] = []

    def before() -> None:
        kept.append(parameter(rig, DOWN).detach().clone())

    def after() -> None:
        parameter(rig, DOWN).detach().copy_(kept[0])

    around_apply(patch, before, after)


def bend_rope(rig: Rig, patch: Patch, *, forever: bool = False) -> None:
    """A derived tensor that no checkpoint holds goes wrong while loading (and comes right at the next load)."""
    inverse = rig.engine.runner.model.get_buffer("model.rotary_emb.inverse")
    right = inverse.clone()
    apply, loads = Loader.apply, [0]

    def faulty(self: Loader, slot: int, changed: Iterable[int] | None = None) -> LoadOutcome:
        outcome = apply(self, slot, changed)
        loads[0] += 1
        inverse.copy_(right * 3 if forever or loads[0] == 1 else right)
        return outcome

    patch.setattr(Loader, "apply", faulty)


def lie_about_the_cache(rig: Rig, patch: Patch) -> None:
    patch.setattr(rig.engine, "reset_prefix_cache", lambda *_, **__: True)


# ---- writes that fail -----------------------------------------------------------------------------------------------


class Injected(RuntimeError):
    """The fault of a test."""


class Breaker:
    """Counts writes of a load into modules (runs, small copies, rebuilt modules) and raises before the k-th.

    `k=None` counts only. `always`: also every later load fails, at its first write.
    """

    def __init__(self, patch: Patch, k: int | None = None, *, always: bool = False) -> None:
        self.count, self.k, self.always, self.fired, self._loading = 0, k, always, False, False
        apply, rebuild = Loader.apply, Rebuilder.rebuild

        def counted_apply(loader: Loader, slot: int, changed: Iterable[int] | None = None) -> LoadOutcome:
            self._loading, self.count = True, 0
            try:
                return apply(loader, slot, changed)
            finally:
                self._loading = False

        def counted_copy(batch: CopyBatch) -> None:
            for into, out_of, nbytes in batch.runs:
                self.tick()
                ctypes.memmove(into, out_of, nbytes)
            for live, sent in zip(batch.live, batch.sent, strict=True):
                self.tick()
                live.copy_(sent)

        def counted_rebuild(rebuilder: Rebuilder, *args: Any) -> Any:
            self.tick()
            out = rebuild(rebuilder, *args)
            self.tick()
            return out

        patch.setattr(Loader, "apply", counted_apply)
        patch.setattr(CopyBatch, "copy", counted_copy)
        patch.setattr(Rebuilder, "rebuild", counted_rebuild)

    def tick(self) -> None:
        if not self._loading:
            return
        if self.fired and self.always:
            raise Injected("a write failed on the way back")
        if not self.fired and self.count == self.k:
            self.fired = True
            raise Injected(f"write {self.k} failed")
        self.count += 1
