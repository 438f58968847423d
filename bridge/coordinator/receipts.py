"""Receipts: the record of a push or rollback that has ended, well or not."""

from __future__ import annotations

import time
from collections.abc import Mapping

from bridge.coordinator.two_phase_commit import PushTarget, Verdict
from bridge.coordinator.versions import AgreedPlan
from bridge.model.receipt import Receipt


def scope_of(plan: AgreedPlan) -> tuple[str, ...]:
    """Say what a version of this plan leaves unwatched; nothing for a plan of the whole model."""
    if not plan.partial:
        return ()
    return (
        f"only the {len(plan.tensors)} tensors that were sent are watched; nothing is known of the engine's others",
    )


def receipt_of(
    target: PushTarget,
    verdict: Verdict,
    phases: Mapping[str, float] | None = None,
    wire_nbytes: int = 0,
    notes: tuple[str, ...] = (),
) -> Receipt:
    """Build the receipt of `target`'s push. `phases`, `wire_nbytes` and `notes` are the trainer's part."""
    manifest, settings = target.held.plan.arena.manifest, target.settings
    return Receipt(
        version=target.version,
        previous=target.base,
        mode=settings.mode,
        reason=settings.reason,
        tensors=len(manifest.tensors),
        nbytes=manifest.payload_nbytes,
        wire_nbytes=wire_nbytes,
        phases={**(phases or {}), **verdict.phases},
        pause_s=max((report.pause_s for report in verdict.reports), default=0.0),
        engines=verdict.reports,
        verify=settings.verify,
        verified=verdict.verified,
        at=time.time(),
        error=None if verdict.error is None else str(verdict.error),
        notes=(*notes, *scope_of(target.held.plan), *verdict.notes),
    )
