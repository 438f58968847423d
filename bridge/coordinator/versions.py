"""Versions that a coordinator knows: agreed plans with their arenas, what is served, the push in flight."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from bridge.coordinator.unused_tensors import ALL_USED, Unused
from bridge.model.lora_format import LoraSpec
from bridge.model.manifest import TensorInfo
from bridge.protocol.coordinator_messages import Reference
from bridge.shm.arena import Arena, Seal


@dataclass(frozen=True, eq=False)
class AgreedPlan:
    """A layout that every engine has planned, with its arena; of the model's weights or (with `lora`) of an adapter.
    `unused`: what of it engines have no place for. `unsent`: names of what the trainer had besides."""

    id: int
    tensors: tuple[TensorInfo, ...]
    partial: bool
    arena: Arena
    lora: LoraSpec | None = None
    unused: Unused = ALL_USED
    unsent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Held:
    """The bytes that one push brought: its version, where they lie, and the seal that closed them."""

    version: int
    plan: AgreedPlan
    slot: int
    seal: Seal


@dataclass(frozen=True)
class Served:
    """A version that all engines serve, or can return to: weights, and a LoRA adapter over them.

    Attributes:
        weights: None: what lies in the engines is not held here and cannot be put back.
        lora, lora_name: the adapter's bytes, and its name in the engines.
        mode: mode of the push that brought the version; None: no push did.
    """

    version: int
    weights: Held | None
    lora: Held | None = None
    lora_name: str | None = None
    mode: str | None = None

    def held_in(self, plan: AgreedPlan) -> Held | None:
        """Find the bytes of this version that lie in the plan's arena."""
        if self.weights is not None and self.weights.plan is plan:
            return self.weights
        return self.lora if self.lora is not None and self.lora.plan is plan else None


@dataclass(frozen=True)
class References:
    """The trainer's canary for one version: of what is served, and for an adapter also of the model without it.
    `canary_limit` is the user's, of the push that brought it."""

    served: Reference | None = None
    base: Reference | None = None
    canary_limit: float | None = None

    def for_load_of(self, plan: AgreedPlan) -> References:
        """Choose what a load through `plan` is compared with: weights alone, an adapter also without it. When a
        rollback reloads the other kind than the last push did, only the base's answers are known."""
        if plan.lora is None:
            return References(self.served if self.base is None else self.base)
        return self if self.base is not None else References(self.served, self.served)


@dataclass
class OpenPush:
    """The one push in flight. `submitted` None: the trainer is still writing its snapshot. A push of version 0 only
    compares and is never submitted."""

    version: int
    plan: AgreedPlan
    slot: int
    holder: str
    submitted: Held | None = None
    since: float = field(default_factory=time.monotonic)


class Versions:
    """Versions of one coordinator: the committed one, the one before, and their canary references.

    Written by the coordinator's owner thread and, while no push is in flight, under the coordinator's lock; every
    attribute is replaced as a whole, so any thread may read it.
    """

    def __init__(self, committed: Served | None = None) -> None:
        self.committed = committed
        self.previous: Served | None = None
        self.references: dict[int, References] = {}

    @property
    def held(self) -> tuple[Held, ...]:
        """The bytes of every version that can be returned to."""
        found = [h for s in (self.committed, self.previous) if s is not None for h in (s.weights, s.lora)]
        return tuple(held for held in found if held is not None)

    @property
    def committed_version(self) -> int | None:
        """The committed version's number; None before the first."""
        return self.committed.version if self.committed is not None else None

    @property
    def weights_version(self) -> int | None:
        """Version of the push that brought the weights that are served; None when they are not held here."""
        weights = self.committed.weights if self.committed is not None else None
        return weights.version if weights is not None else None

    def commit(self, served: Served) -> None:
        """Make `served` the committed version, and the one so far the previous one."""
        self.previous, self.committed = self.committed, served
        keep = {served.version, self.previous.version if self.previous else -1}
        self.references = {v: ref for v, ref in self.references.items() if v in keep}

    def return_to(self, served: Served | None) -> None:
        """Make `served` (None: nothing that could be put back) the committed version, with none before it."""
        self.committed, self.previous = served, None
