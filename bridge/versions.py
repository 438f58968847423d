"""What a coordinator holds: agreed plans with their arenas, versions that can be returned to, the open push."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from bridge.arena import Arena
from bridge.manifest import TensorInfo


@dataclass
class Plan:
    """One agreed manifest with its arena. `slots` says which version lies in which slot."""

    id: int
    tensors: tuple[TensorInfo, ...]
    partial: bool
    arena: Arena
    slots: dict[int, int] = field(default_factory=dict)
    dtypes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Held:
    """A version that can be served or returned to: its number and where its bytes lie."""

    version: int
    plan: Plan
    slot: int

    @property
    def plan_id(self) -> int:
        return self.plan.id


@dataclass
class OpenPush:
    """The one push in flight. `submitted` False: the trainer is still writing its snapshot."""

    version: int
    plan: Plan
    slot: int
    holder: str
    submitted: bool = False
    since: float = field(default_factory=time.monotonic)
