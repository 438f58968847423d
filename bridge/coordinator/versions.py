"""What a coordinator holds: agreed plans with their arenas, versions that can be returned to, the open push."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from bridge.errors import StaleVersion
from bridge.model.lora_format import LoraSpec
from bridge.model.manifest import TensorInfo
from bridge.protocol.coordinator_messages import Reference
from bridge.shm.arena import Arena

ROLLBACK = "rollback"
"""The holder of a push that is a rollback."""


@dataclass
class Plan:
    """One agreed manifest with its arena, of weights or (with `adapter`) of an adapter. `slots` says which version lies
    in which slot."""

    id: int
    tensors: tuple[TensorInfo, ...]
    partial: bool
    arena: Arena
    slots: dict[int, int] = field(default_factory=dict)
    adapter: LoraSpec | None = None


@dataclass(frozen=True)
class Held:
    """The bytes that one push brought: its version and where they lie."""

    version: int
    plan: Plan
    slot: int

    @property
    def plan_id(self) -> int:
        return self.plan.id


@dataclass(frozen=True)
class Served:
    """What all engines serve at `version`, or can return to: weights, and an adapter over them under its `name` there.

    `weights` None: what lies in the engines is not held here and cannot be put back.
    """

    version: int
    weights: Held | None
    adapter: Held | None = None
    name: str | None = None
    mode: str | None = None
    """Of the push that brought it; None: no push did."""

    @property
    def held(self) -> tuple[Held, ...]:
        return tuple(held for held in (self.weights, self.adapter) if held is not None)

    def of(self, plan: Plan) -> Held | None:
        """The bytes of this version that lie in the plan's arena."""
        return next((held for held in self.held if held.plan is plan), None)


@dataclass(frozen=True)
class References:
    """The trainer's canary for one version: of what is served, and of an adapter's push also without the adapter."""

    served: Reference | None = None
    base: Reference | None = None

    def for_slot_of(self, plan: Plan) -> References:
        """What a load of this plan's bytes is weighed against: weights alone, and an adapter also without it. Going
        back to a version whose last push was of the other kind, what is known is the base's answers."""
        if plan.adapter is None:
            return References(self.served if self.base is None else self.base)
        return self if self.base is not None else References(self.served, self.served)

    @property
    def with_lora(self) -> bool:
        """Whether `served` was computed with the adapter acting."""
        return self.base is not None


@dataclass
class OpenPush:
    """The one push in flight. `submitted` False: the trainer is still writing its snapshot. A push of version 0 only
    compares and is never submitted."""

    version: int
    plan: Plan
    slot: int
    holder: str
    submitted: bool = False
    mode: str | None = None
    keeps_lora: bool = False
    """Weights only: the adapter that is served over them stays."""
    since: float = field(default_factory=time.monotonic)


def after(push: OpenPush, name: str | None, now: Served | None) -> Served:
    """What is served once a push is committed; `name` is the adapter's that serves then."""
    brought = Held(push.version, push.plan, push.slot)
    if push.plan.adapter is not None:
        return Served(push.version, now.weights if now is not None else None, brought, name, push.mode)
    adapter = now.adapter if now is not None and name is not None else None
    return Served(push.version, brought, adapter, name, push.mode)


def to_reload(back: Served, now: Served, where: str) -> Held:
    """The bytes that bring `back` about: its weights, or its adapter where the weights are the same. Raises
    StaleVersion when it takes both."""
    same = back.weights == now.weights
    if same and back.adapter is not None and back.adapter != now.adapter:
        return back.adapter
    if back.weights is None or not (back.name is None or back.name == now.name):
        raise StaleVersion(
            "the previous version cannot be brought back in one step",
            where=where,
            expected="other weights, or another adapter, but not both",
            got=f"version {back.version} had the adapter {back.name} over other weights",
            remedy="push what should be served",
        )
    return back.weights


def mode_of_reload(back: Served, held: Held) -> str:
    """The mode in which `held` is sent once more to bring `back` about."""
    if held.plan.adapter is not None:
        return "adapter"
    # weights that lie under an adapter are its base, whichever of the two came last
    return "base" if back.name is not None else back.mode or "full"
