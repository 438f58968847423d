"""Make the receipt of a push that has ended."""

from __future__ import annotations

import time

from bridge.coordinator.reports import Verdict
from bridge.coordinator.two_phase_commit import Target
from bridge.coordinator.versions import OpenPush, Plan
from bridge.model.receipt import Receipt
from bridge.protocol.coordinator_messages import SubmitRequest


def scope_of(plan: Plan) -> tuple[str, ...]:
    """What a version of this plan does not say anything about."""
    if not plan.partial:
        return ()
    return (
        f"only the {len(plan.tensors)} tensors that were sent are watched; nothing is known of the engine's others",
    )


def receipt_of(push: OpenPush, request: SubmitRequest, target: Target, verdict: Verdict) -> Receipt:
    """The record of a push that has ended, well or not."""
    manifest = push.plan.arena.manifest
    return Receipt(
        version=push.version,
        previous=target.base,
        mode=request.options.mode,
        reason=request.options.reason,
        tensors=len(manifest.tensors),
        nbytes=manifest.payload_nbytes,
        wire_nbytes=request.wire_nbytes,
        phases={**request.phases, **verdict.phases},
        pause_s=max((report.pause_s for report in verdict.reports), default=0.0),
        engines=verdict.reports,
        verify=request.options.verify,
        verified=verdict.verified,
        at=time.time(),
        error=None if verdict.error is None else str(verdict.error),
        notes=(*request.notes, *scope_of(push.plan), *verdict.notes),
    )
