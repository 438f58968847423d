"""Layouts: the agreed plans of one coordinator and their arenas.

A plan is made when a layout is new, and kept while a version lies in its arena.

There is one current plan of the model's weights and one of the LoRA adapter, each with a two-slot arena of its own.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import msgspec

from bridge.coordinator import manifest_agreement
from bridge.coordinator.engines import Fleet
from bridge.coordinator.unused_tensors import find_unused, unproven_of
from bridge.coordinator.versions import AgreedPlan, Served, Versions
from bridge.errors import ProtocolError
from bridge.protocol.coordinator_messages import PlanRequest, Unproven
from bridge.protocol.deadline import Deadline
from bridge.protocol.rank_jobs import MapJob, RankBake, RankDone
from bridge.shm.arena import Arena

log = logging.getLogger(__name__)

FORGET_TIMEOUT_S = 30.0
CARRY_SLOT = 1
"""Where a new arena holds what the engines serve, so that the first push through it can be undone."""


class Layouts:
    """Agreed plans by id. Changed by the coordinator's owner thread only; any thread may ask for the current ones."""

    def __init__(self, name: str, fleet: Fleet, journal: Path, shm_dir: Path | None) -> None:
        self._name = name
        self._fleet = fleet
        self._journal = journal
        self._shm_dir = shm_dir
        self._plans: dict[int, AgreedPlan] = {}
        self.weights: AgreedPlan | None = None
        self.lora: AgreedPlan | None = None
        self._untold = False  # engines may know a plan that came to nothing
        self._unproven: tuple[PlanRequest, int, dict[str, list[RankBake]]] | None = None  # baked, and not agreed yet
        self.outdated = False  # some plan is no current one any more, and is kept for the version that lies in it
        # ids that no other coordinator uses: an engine may remember a plan of the one before
        self._next = int.from_bytes(os.urandom(4), "little") << 16

    def current(self, plan_id: int) -> AgreedPlan:
        """Find the plan that pushes go through now. Raises ProtocolError for an id that is not a current one."""
        for plan in (self.weights, self.lora):
            if plan is not None and plan.id == plan_id:
                return plan
        raise ProtocolError(
            "the plan is out of date",
            where="the coordinator",
            expected="the latest plan",
            got=str(plan_id),
            remedy="ask for a new plan",
        )

    def serving(self, request: PlanRequest) -> AgreedPlan | None:
        """Find the current plan that can carry this request, if there is one."""
        plan = self.weights if request.lora is None else self.lora
        if plan is None or plan.lora != request.lora:
            return None
        return plan if manifest_agreement.serves(plan.tensors, plan.partial, request, plan.unsent) else None

    def make(self, request: PlanRequest, versions: Versions, deadline: Deadline) -> AgreedPlan | Unproven:
        """Bake in every engine, agree on a manifest, create its arena, have the engines map it, and make the plan the
        current one of its kind. Blocks (owner thread); on an error nothing has changed.

        A new weights arena first receives what the engines serve now, so that the next push can be undone. Call
        `drop_unheld` afterwards. Where the trainer has to show something first, engines keep what they have baked for
        the request that brings it.
        """
        arena: Arena | None = None
        try:
            plan_id, baked = self._bake(request, deadline)
            unused = find_unused(request, baked)
            unproven = unproven_of(unused, request)
            if unproven is not None:
                self._unproven = request, plan_id, baked
                self._untold = self.outdated = True
                return unproven
            manifest = manifest_agreement.agree(request, baked, unused)
            arena = Arena.create(manifest, name=self._name, directory=self._shm_dir, journal=self._journal)
            plan = AgreedPlan(plan_id, request.tensors, request.partial, arena, request.lora, unused, request.unsent)
            self._fleet.run_all(MapJob(plan_id, str(arena.path), manifest, tuple(self._plans)), RankDone, deadline)
            if plan.lora is None:
                carried = self._carry(plan, versions.committed, deadline)
                if carried is not versions.committed:
                    versions.return_to(carried)
        except BaseException:
            if arena is not None:
                _discard(arena)
            # engines may know this plan; they are told with the next push, for one of them may hang now
            self._untold = self.outdated = True
            raise
        self._plans[plan.id] = plan
        if plan.lora is None:
            self.weights = plan
        else:
            self.lora = plan
        self.outdated = True
        return plan

    def _bake(self, request: PlanRequest, deadline: Deadline) -> tuple[int, dict[str, list[RankBake]]]:
        """Have every rank plan the request, unless they have done so for the last one, which lacked a proof."""
        last, self._unproven = self._unproven, None
        if last is not None and last[0] == msgspec.structs.replace(request, independent=last[0].independent):
            return last[1], last[2]
        plan_id, self._next = self._next, self._next + 1
        return plan_id, self._fleet.bake(plan_id, request, deadline)

    def _carry(self, plan: AgreedPlan, served: Served | None, deadline: Deadline) -> Served | None:
        """Put what the engines serve now into a slot of a new weights arena; what can be returned to from then on.

        Where it cannot be read back, the served version in an older arena still counts, provided that it holds every
        tensor that the new plan writes.
        """
        weights = served.weights if served is not None else None
        kept = self._fleet.keep_current(plan, CARRY_SLOT, weights, deadline)
        if kept is not None:
            return Served(0, kept) if served is None else replace(served, weights=kept)
        if weights is None or manifest_agreement.holds(weights.plan.arena.manifest, plan.arena.manifest):
            return served
        log.warning("version %d cannot be restored once the new layout was pushed", weights.version)
        return None if served is None or served.lora is None else replace(served, weights=None)

    def drop_unheld(self, versions: Versions, in_use: AgreedPlan | None) -> None:
        """Unlink the arenas that no version and no push needs any more, here and in the engines. `in_use` is the plan
        of the push that a trainer has begun, if there is one."""
        needed = {held.plan.id for held in versions.held}
        needed |= {plan.id for plan in (self.weights, self.lora, in_use) if plan is not None}
        old = [plan for plan in self._plans.values() if plan.id not in needed]
        for plan in old:
            _discard(self._plans.pop(plan.id).arena)
        self.outdated = len(self._plans) > (self.weights is not None) + (self.lora is not None)
        if old or self._untold:
            self._untold, self._unproven = False, None
            self._fleet.forget(tuple(self._plans), Deadline.after(FORGET_TIMEOUT_S))

    def close(self) -> None:
        """Unlink every arena."""
        for plan in self._plans.values():
            _discard(plan.arena)
        self._plans.clear()


def _discard(arena: Arena) -> None:
    arena.close()
    arena.unlink()
