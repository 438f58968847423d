"""Reports of engines, and the receipt that they add up to: is a version verified? Pure."""

from __future__ import annotations

import time
from collections.abc import Iterable

from bridge.coordinator.two_phase_commit import PushTarget, Verdict
from bridge.coordinator.versions import AgreedPlan
from bridge.model.levels import LORA_LEVELS, WEIGHT_LEVELS
from bridge.model.receipt import EngineReport, Receipt, Verified
from bridge.protocol.coordinator_messages import SubmitRequest


def verified(version: int, reports: Iterable[EngineReport]) -> Verified:
    """Decide whether a version is verified, from the levels that really ran.

    True: every engine serves it, and every level of the weights that could run has passed on each rank. "partial": some
    have, or a module was left to the canary. False: nothing was shown.
    """
    found = [_shown(report, version) for report in reports]
    if not found or not all(found):
        return False
    return True if all(shown is True for shown in found) else "partial"


def _shown(report: EngineReport, version: int) -> Verified:
    if report.serving != version or not report.ranks:
        return False
    levels = [{level.level: level for level in rank.levels if level.ok} for rank in report.ranks]
    weighed = all(any(rank[name].checked for name in ("read-back", "probe") if name in rank) for rank in levels)
    # without a version before there is nothing to have changed from
    needed = LORA_LEVELS if report.adapter is not None else set(WEIGHT_LEVELS) - {"change"}
    whole = all(set(rank) >= needed for rank in levels)
    alone = any(rank.canary_only for rank in report.ranks)
    if weighed and whole and not alone:
        return True
    scored = report.canary is not None and report.canary.conclusive
    return "partial" if scored or (weighed and not alone) else False


def scope_of(plan: AgreedPlan) -> tuple[str, ...]:
    """Say what a version of this plan leaves unwatched; nothing for a plan of the whole model."""
    watched = f"only the {len(plan.tensors)} tensors that were sent are watched"
    return (f"{watched}; nothing is known of the engine's others",) if plan.partial else ()


def receipt_of(target: PushTarget, verdict: Verdict, request: SubmitRequest | None) -> Receipt:
    """Build the receipt of `target`'s push. `request` is the trainer's part; None for a rollback."""
    manifest, settings, reports = target.held.plan.arena.manifest, target.settings, tuple(verdict.reports.values())
    shown = verdict.error is None and verified(target.served.version, reports)
    drifts = [report.canary for report in reports if report.canary is not None]
    scored = "canary" not in settings.levels or (bool(drifts) and all(drift.conclusive for drift in drifts))
    if shown and not (scored and (request is None or request.proven)):
        shown = "partial"  # a level that was asked for could not run; the notes say why
    return Receipt(
        version=target.served.version,
        previous=target.now.version if target.now else None,
        mode=settings.mode,
        reason=settings.reason,
        tensors=len(manifest.tensors),
        nbytes=manifest.payload_nbytes,
        wire_nbytes=request.wire_nbytes if request else 0,
        phases={**(request.phases if request else {}), **verdict.phases},
        pause_s=max((report.pause_s for report in reports), default=0.0),
        engines=reports,
        verify=settings.verify,
        verified=shown,
        at=time.time(),
        error=None if verdict.error is None else str(verdict.error),
        notes=(*(request.notes if request else ()), *scope_of(target.held.plan), *verdict.notes),
        unused=dict(target.held.plan.unused.by_engine),
    )
