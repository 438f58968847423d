"""Push run: one sealed version, or one rollback, from the coordinator's acceptance to its result."""

from __future__ import annotations

import logging
import secrets
import time

import msgspec

from bridge.coordinator.engines import Fleet
from bridge.coordinator.reports import receipt_of, unserved, verified
from bridge.coordinator.rollback import Rollback
from bridge.coordinator.two_phase_commit import PushTarget, TwoPhaseCommit, Verdict, restore
from bridge.coordinator.versions import Held, OpenPush, References, Served, Versions
from bridge.errors import BridgeError
from bridge.journal.ledger import Ledger
from bridge.model.engine_state import EngineState
from bridge.model.receipt import Receipt
from bridge.protocol.codec import ErrorInfo
from bridge.protocol.coordinator_messages import Finished, SubmitRequest
from bridge.protocol.deadline import Deadline
from bridge.shm.seal import differing_tensors

log = logging.getLogger(__name__)

HOLDS_TIMEOUT_S = 30.0
"""How long engines are asked whether they still hold the served adapter."""


class PushRunner:
    """Runs pushes and rollbacks, one at a time, on the coordinator's owner thread. The one orchestrator of what engines
    do for a push."""

    def __init__(self, name: str, fleet: Fleet, ledger: Ledger, versions: Versions) -> None:
        self._name = name
        self._fleet = fleet
        self._ledger = ledger
        self._versions = versions
        self._nonce = secrets.token_hex(3)  # an engine remembers adapter names longer than a journal lasts
        self._reloads = 0

    def push(self, push: OpenPush, request: SubmitRequest) -> Finished:
        """Bring the engines to a sealed version, or leave them as they were. Blocks until they serve; never leaves an
        engine paused. Returns the receipt, and the error that the trainer is told."""
        now, settings, plan = self._versions.committed, request.settings, push.plan
        if request.reference is not None:
            self._versions.references[push.version] = References(request.reference, request.base)
        references = self._versions.references.get(push.version, References()).for_load_of(plan)
        kept = now.held_in(plan) if now is not None else None
        has_lora = plan.lora is not None or (now is not None and now.lora_name is not None)
        lora = self._lora_of(push, now, keeps=settings.mode == "base") if has_lora else None
        held = Held(push.version, plan, push.slot)
        target = PushTarget(
            version=push.version,
            held=held,
            root=request.root,
            settings=settings,
            reference=references.served,
            base_reference=references.base,
            lora=lora,
            base=now.version if now else None,
            changed=differing_tensors(plan.arena, kept.slot, push.slot) if kept is not None else None,
            previous=kept.slot if kept is not None else None,
        )
        if plan.lora is not None:
            served = Served(push.version, now.weights if now else None, held, lora, settings.mode)
        else:
            served = Served(push.version, held, now.lora if now and lora else None, lora, settings.mode)
        verdict = self._advance(target, now, served, "committed")
        if verdict.verified and not request.base_proven:
            verdict.verified = "partial"
        if verdict.error is None and now is not None and now.lora_name is not None and lora is None:
            gone = f"the adapter {now.lora_name} is not served any more: these weights took the place of its base"
            verdict.notes = (*verdict.notes, gone)
        if verdict.error is not None:
            self._versions.references.pop(push.version, None)
            self.note("aborted", version=push.version, reason=str(verdict.error))
        receipt = receipt_of(target, verdict, request.phases, request.wire_nbytes, request.notes)
        return self._finish(receipt, verdict)

    def roll_back(self, rollback: Rollback) -> Finished:
        """Bring the engines back to an earlier version, or leave them as they are. Blocks as `push` does."""
        now, back, held = rollback.now, rollback.back, rollback.held
        references = self._versions.references.get(back.version, References()).for_load_of(held.plan)
        lora = back.lora_name
        if held.plan.lora is not None:  # the adapter is loaded once more, under a name that was never used
            self._reloads += 1
            lora = f"{self._name}-v{back.version}-{self._nonce}-again{self._reloads}"
        elif lora is not None and not self._fleet.holds_lora(lora, Deadline.after(HOLDS_TIMEOUT_S)):
            lora = None
        kept = now.held_in(held.plan)
        target = PushTarget(
            version=back.version,
            held=held,
            root=rollback.root,
            settings=rollback.settings,
            reference=references.served,
            base_reference=references.base,
            lora=lora,
            base=now.version,
            changed=differing_tensors(held.plan.arena, kept.slot, held.slot) if kept is not None else None,
            previous=kept.slot if kept is not None else None,
        )
        served = Served(back.version, back.weights, back.lora, lora, back.mode)
        verdict = self._advance(target, now, served, "rolled_back")
        return self._finish(receipt_of(target, verdict), verdict)

    def give_up(self, version: int, error: Exception) -> Finished:
        """End a push whose run raised: put every engine back, and answer with the error. Never raises."""
        log.exception("push %d failed", version)
        try:
            restore(self._fleet, self._versions.committed, (), f"an error of ours: {error}")
        except Exception:  # thread boundary: the trainer must get the first error, whatever the second is
            log.exception("engines could not be put back after push %d", version)
        return Finished(None, ErrorInfo.of(error), aborted=True, serving=self._fleet.serving)

    def _lora_of(self, push: OpenPush, now: Served | None, *, keeps: bool) -> str | None:
        """Name the adapter that "current" means once the push serves: the one that it brings, under a name that was
        never used; the one before over new base weights; none over weights that have it merged in."""
        if push.plan.lora is not None:
            return f"{self._name}-v{push.version}-{self._nonce}"
        if now is None or now.lora_name is None or not keeps:
            return None
        return now.lora_name if self._fleet.holds_lora(now.lora_name, Deadline.after(HOLDS_TIMEOUT_S)) else None

    def _advance(self, target: PushTarget, now: Served | None, served: Served, entry: str) -> Verdict:
        """Two-phase commit with the journal's entry at the point of no return."""
        commit = TwoPhaseCommit(self._fleet, target)
        verdict = commit.load()
        started = time.perf_counter()
        if verdict.error is None:
            commit.vote(verdict)
        if verdict.error is None:
            try:  # journalled before any engine resumes: nothing serves an unrecorded version
                self._ledger.record(entry, version=served.version, engines=tuple(self._fleet.infos))
            except BridgeError as error:
                verdict.error = error
        if verdict.error is not None:
            verdict.reports = restore(self._fleet, now, verdict.reports, str(verdict.error))
            return verdict
        if entry == "committed":
            self._versions.commit(served)
        else:
            self._versions.return_to(served)
        commit.resume(verdict, now.weights if now else None)
        verdict.phases["commit"] = time.perf_counter() - started
        verdict.verified = verified(target.version, verdict.reports)
        if "canary" in target.settings.levels and not any(report.canary for report in verdict.reports):
            verdict.notes = (*verdict.notes, "no canary: no engine answers log-probabilities")
        if verdict.verified:  # the first verified sync of an engine sets the scale for its later ones
            for report in verdict.reports:
                if report.canary is not None:
                    self._fleet.baselines.setdefault(report.id, report.canary.mean_abs)
        return verdict

    def _finish(self, receipt: Receipt, verdict: Verdict) -> Finished:
        """Journal the receipt, and build what the trainer is told."""
        unwritten = self.note("receipt", version=receipt.version, receipt=msgspec.to_builtins(receipt))
        if unwritten is not None:
            receipt = msgspec.structs.replace(receipt, notes=(*receipt.notes, unwritten))
        for report in verdict.reports:
            if report.state == EngineState.QUARANTINED.value:
                self.note("quarantined", engine=report.id, reason=report.error or "")
        serving = self._fleet.serving
        if verdict.error is not None:
            return Finished(receipt, ErrorInfo.of(verdict.error), verdict.touched, serving)
        lost = unserved(receipt.version, receipt.engines)
        return Finished(receipt, None if lost is None else ErrorInfo.of(lost), serving=serving)

    def note(self, kind: str, **fields: object) -> str | None:
        """Journal an entry that nothing depends on. Returns what the receipt should say where that failed: the trainer
        must not be told that a push failed because of it."""
        try:
            self._ledger.record(kind, **fields)
        except BridgeError as error:
            log.error("the journal lacks an entry (%s): %s", kind, error)
            return f"the journal lacks an entry ({kind}): {error}"
        return None
