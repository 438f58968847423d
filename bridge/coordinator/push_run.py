"""Push run: one sealed version, or one rollback, from the coordinator's acceptance to its result."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import replace

import msgspec

from bridge.coordinator.engines import Fleet
from bridge.coordinator.reports import receipt_of
from bridge.coordinator.two_phase_commit import PushTarget, TwoPhaseCommit, Verdict, restore
from bridge.coordinator.versions import Held, References, Served, Versions
from bridge.errors import BridgeError, EngineQuarantined, PeerLost
from bridge.journal.ledger import Ledger
from bridge.model.engine_state import EngineState
from bridge.model.receipt import EngineReport, Receipt
from bridge.protocol.codec import ErrorInfo
from bridge.protocol.coordinator_messages import Finished, SubmitRequest
from bridge.protocol.deadline import Deadline
from bridge.push_settings import PushSettings
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

    def push(self, held: Held, request: SubmitRequest) -> Finished:
        """Bring the engines to a sealed version, or leave them as they were. Blocks until they serve; never leaves an
        engine paused. Returns the receipt, and the error that the trainer is told."""
        now, mode, version = self._versions.committed, request.settings.mode, held.version
        if request.reference is not None:
            self._versions.references[version] = References(
                request.reference, request.base, request.settings.canary_limit
            )
        if held.plan.lora is not None:
            served = Served(version, now.weights if now else None, held, f"{self._name}-v{version}-{self._nonce}", mode)
        else:  # the adapter before stays over new base weights, not over weights that have it merged in
            lora = self._if_held(now.lora_name) if now is not None and mode == "base" else None
            served = Served(version, held, now.lora if now and lora else None, lora, mode)
        target = self._target(served, held, request.settings, over_base=request.proven)
        verdict = self._advance(target, "committed")
        if verdict.error is not None:
            self._versions.references.pop(version, None)
            self.note("aborted", version=version, reason=str(verdict.error))
        elif now is not None and now.lora_name is not None and served.lora_name is None:
            gone = f"the adapter {now.lora_name} is not served any more: these weights took the place of its base"
            verdict.notes = (*verdict.notes, gone)
        return self._finish(receipt_of(target, verdict, request), verdict)

    def roll_back(self, back: Served, held: Held, settings: PushSettings) -> Finished:
        """Bring the engines back to an earlier version by loading `held`, or leave them as they are. Blocks as `push`
        does."""
        if held.plan.lora is not None:  # the adapter is loaded once more, under a name that was never used
            self._reloads += 1
            lora: str | None = f"{self._name}-v{back.version}-{self._nonce}-again{self._reloads}"
        else:
            lora = self._if_held(back.lora_name)
        target = self._target(replace(back, lora_name=lora), held, settings)
        verdict = self._advance(target, "rolled_back")
        return self._finish(receipt_of(target, verdict, None), verdict)

    def give_up(self, version: int, error: BaseException) -> Finished:
        """End a push whose run raised: put every engine back, and answer with the error. Never raises."""
        log.exception("push %d failed", version)
        committed = self._versions.committed
        if committed is None or committed.version != version:
            self._versions.references.pop(version, None)
            self.note("aborted", version=version, reason=str(error))
        try:
            self._note_quarantines(restore(self._fleet, committed, {}, f"an error of ours: {error}").values())
        except Exception:  # thread boundary: the trainer must get the first error, whatever the second is
            log.exception("engines could not be put back after push %d", version)
        return Finished(None, ErrorInfo.of(error), aborted=True, serving=self._fleet.serving)

    def _if_held(self, lora: str | None) -> str | None:
        """Return the adapter's name if every engine still holds it, else None. Blocks."""
        if lora is None:
            return None
        infos = self._fleet.ask_infos(Deadline.after(HOLDS_TIMEOUT_S))
        return lora if all(lora in info.adapters for info in infos.values()) else None

    def _target(self, served: Served, held: Held, settings: PushSettings, over_base: bool = False) -> PushTarget:
        """Say where to bring the engines. `over_base`: an adapter's base was compared with them, bit for bit."""
        now = self._versions.committed
        kept = now.held_in(held.plan) if now is not None else None
        references = self._versions.references.get(served.version, References()).for_load_of(held.plan)
        changed = differing_tensors(kept.seal, held.seal) if kept is not None else None
        return PushTarget(
            served=served,
            held=held,
            now=now,
            settings=settings,
            references=references,
            changed=changed,
            previous=kept.slot if kept is not None else None,
            unmoved=changed == () and not held.plan.partial if held.plan.lora is None else over_base,
        )

    def _advance(self, target: PushTarget, entry: str) -> Verdict:
        """Two-phase commit with the journal's entry at the point of no return."""
        commit = TwoPhaseCommit(self._fleet, target, Deadline.after(target.settings.timeout_s))
        verdict = commit.load()
        started = time.perf_counter()
        if verdict.error is None:
            commit.vote(verdict)
        if verdict.error is None:
            try:  # journalled before any engine resumes: nothing serves an unrecorded version
                self._ledger.record(entry, version=target.served.version, engines=tuple(self._fleet.infos))
            except BridgeError as error:
                verdict.error = error
        if verdict.error is not None:
            verdict.reports = restore(self._fleet, target.now, verdict.reports, str(verdict.error))
            return verdict
        if entry == "committed":
            self._versions.commit(target.served)
        else:
            self._versions.return_to(target.served)
        commit.resume(verdict)
        verdict.phases["commit"] = time.perf_counter() - started
        if "canary" in target.settings.levels and not any(report.canary for report in verdict.reports.values()):
            verdict.notes = (*verdict.notes, "no canary: no engine answers log-probabilities")
        return verdict

    def _finish(self, receipt: Receipt, verdict: Verdict) -> Finished:
        """Journal the receipt, and build what the trainer is told."""
        error = verdict.error or _unserved(receipt)
        serving = {report.id: report.serving for report in receipt.engines}
        aborted = verdict.error is not None and (verdict.touched or None in serving.values())
        unwritten = self.note("receipt", version=receipt.version, receipt=msgspec.to_builtins(receipt))
        if unwritten is not None:
            receipt = msgspec.structs.replace(receipt, notes=(*receipt.notes, unwritten))
        self._note_quarantines(receipt.engines)
        return Finished(receipt, None if error is None else ErrorInfo.of(error), aborted, serving)

    def _note_quarantines(self, reports: Iterable[EngineReport]) -> None:
        for report in reports:
            if report.state == EngineState.QUARANTINED.value:
                self.note("quarantined", engine=report.id, reason=report.error or "")

    def note(self, kind: str, **fields: object) -> str | None:
        """Journal an entry that nothing depends on. Returns what the receipt should say where that failed: the trainer
        must not be told that a push failed because of it."""
        try:
            self._ledger.record(kind, **fields)
        except BridgeError as error:
            log.error("the journal lacks an entry (%s): %s", kind, error)
            return f"the journal lacks an entry ({kind}): {error}"
        return None


def _unserved(receipt: Receipt) -> BridgeError | None:
    """Build the error for engines that were lost between the commit of a version and their serving it:
    EngineQuarantined or PeerLost. None when every engine serves it."""
    version = receipt.version
    lost = [report for report in receipt.engines if report.serving != version]
    if not lost:
        return None
    kind = EngineQuarantined if any(report.state == EngineState.QUARANTINED.value for report in lost) else PeerLost
    return kind(
        f"version {version} is committed, and an engine was lost before it served it",
        where=", ".join(report.id for report in lost),
        expected=f"version {version} served by every engine",
        got="; ".join(f"{report.state}: {report.error or 'no answer'}" for report in lost),
        remedy="the other engines serve it; what was lost serves nothing until a verified push",
    )
