"""The plans of one coordinator and their arenas: made when a layout is new, kept while a version lies in them.

There is one current plan of the model's weights and one of the adapter, each with a two-slot arena of its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from bridge.coordinator import manifest_agreement
from bridge.coordinator.two_phase_commit import Fleet
from bridge.coordinator.versions import Held, Plan, Served
from bridge.errors import ProtocolError
from bridge.protocol.coordinator_messages import PlanRequest
from bridge.protocol.deadline import Deadline
from bridge.shm.arena import Arena

log = logging.getLogger(__name__)

CARRY_SLOT = 1
"""Where a new arena holds what the engines serve, so that the first push through it can be undone."""


class Plans:
    """Agreed plans by id. Not thread safe: the coordinator calls it under its lock."""

    def __init__(self, name: str, fleet: Fleet, journal: Path, shm_dir: Path | None) -> None:
        self._name = name
        self._fleet = fleet
        self._journal = journal
        self._shm_dir = shm_dir
        self._plans: dict[int, Plan] = {}
        self.weights: Plan | None = None
        self.adapter: Plan | None = None
        # ids that no other coordinator uses: an engine may remember a plan of the one before
        self._next = int.from_bytes(os.urandom(4), "little") << 16

    def current(self, plan_id: int) -> Plan:
        """The plan that pushes go through now. Raises ProtocolError for an id that is not one of the current ones."""
        for plan in (self.weights, self.adapter):
            if plan is not None and plan.id == plan_id:
                return plan
        raise ProtocolError("the plan is out of date", got=str(plan_id), remedy="ask for a new plan")

    def serving(self, request: PlanRequest) -> Plan | None:
        """The current plan, if it can carry this request."""
        plan = self.weights if request.adapter is None else self.adapter
        if plan is None or plan.adapter != request.adapter:
            return None
        return plan if manifest_agreement.serves(plan.tensors, plan.partial, request) else None

    def make(self, request: PlanRequest, keep: Iterable[Held], deadline: Deadline) -> Plan:
        """Bake in every engine, agree on a manifest, create its arena and have the engines map it. Not current yet."""
        plan_id, self._next = self._next, self._next + 1
        manifest = manifest_agreement.agree(request, self._fleet.bake(plan_id, request, deadline))
        arena = Arena.create(manifest, name=self._name, directory=self._shm_dir, journal=self._journal)
        other = self.adapter if request.adapter is None else self.weights
        needed = {held.plan.id for held in keep} | ({other.id} if other is not None else set())
        try:
            self._fleet.map(plan_id, str(arena.path), manifest, tuple(needed), deadline)
        except BaseException:
            _discard(arena)
            raise
        return Plan(plan_id, request.tensors, request.partial, arena, adapter=request.adapter)

    def carry(self, plan: Plan, served: Served | None, deadline: Deadline) -> Served | None:
        """Put what the engines serve now into a slot of a new weights arena; what can be returned to from then on.

        Where it cannot be read back, the served version in an older arena still counts, provided that it holds every
        tensor that the new plan writes.
        """
        weights = served.weights if served is not None else None
        name, adapter, mode = (served.name, served.adapter, served.mode) if served is not None else (None, None, None)
        version = served.version if served is not None else 0
        brought = weights.version if weights is not None else 0
        try:
            kept = self._fleet.keep_current(plan.id, CARRY_SLOT, plan.arena, weights, brought, deadline)
        except BaseException:
            _discard(plan.arena)
            raise
        if kept:
            plan.slots[CARRY_SLOT] = brought
            return Served(version, Held(brought, plan, CARRY_SLOT), adapter, name, mode)
        if weights is not None and not manifest_agreement.holds(weights.plan.arena.manifest, plan.arena.manifest):
            log.warning("version %d cannot be restored once the new layout was pushed", version)
            return None if adapter is None else Served(version, None, adapter, name, mode)
        return served

    def use(self, plan: Plan) -> None:
        """From now on pushes of its kind go through this plan."""
        self._plans[plan.id] = plan
        if plan.adapter is None:
            self.weights = plan
        else:
            self.adapter = plan

    def drop_unheld(self, held: Iterable[Held]) -> None:
        """Unlink the arenas that no version and no push needs any more, here and in the engines."""
        needed = [h.plan for h in held] + [plan for plan in (self.weights, self.adapter) if plan is not None]
        old = [plan for plan in self._plans.values() if not any(plan is kept for kept in needed)]
        for plan in old:
            self._drop(plan)
        if old:
            self._fleet.forget(tuple(self._plans), Deadline.after(30))

    def _drop(self, plan: Plan) -> None:
        self._plans.pop(plan.id, None)
        _discard(plan.arena)

    def close(self) -> None:
        """Unlink every arena."""
        for plan in list(self._plans.values()):
            self._drop(plan)


def _discard(arena: Arena) -> None:
    arena.close()
    arena.unlink()
