"""Two-phase commit: bring all engines to one version, or all of them back.

    load      every engine stages, pauses, loads and verifies: the first vote
    vote      every engine resets its caches and checks them: the second vote
              (the orchestrator journals the commit here: the point of no return)
    resume    every engine publishes the version and serves it
    restore   after a failure before the point of no return: every engine goes back, or is quarantined

Engines are asked side by side, so the slowest engine decides, not the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from bridge.coordinator.engines import LOST_TIMEOUT_S, Fleet
from bridge.coordinator.versions import Held, References, Served
from bridge.errors import BridgeError, TransportError
from bridge.model import canary
from bridge.model.engine_state import EngineState
from bridge.model.receipt import EngineReport
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import (
    EngineCommit,
    EngineLoad,
    EngineLoaded,
    EngineOk,
    EngineRestore,
    EngineResume,
    ToEngine,
)
from bridge.protocol.rank_jobs import LoadJob
from bridge.push_settings import PushSettings

RESTORE_TIMEOUT_S = 120.0
"""Putting engines back has a deadline of its own: a push that ran out of time must still be undone."""
_RESTORE = PushSettings("restore", ("coverage", "read-back", "probe"))
"""A version that is put back is proven by bits and probes; its outputs were proven when it was pushed."""


@dataclass(frozen=True)
class PushTarget:
    """A sealed slot on its way into the engines.

    Attributes:
        served: the version to be served, and the adapter that "current" means then.
        held: the slot.
        now: what the engines serve now. `changed` (manifest indices, None: all) and `previous` (slot) refer to what
            they hold at that version.
        references: the trainer's canary, and for an adapter its answers without it.
        unmoved: the engines hold these weights (an adapter's: those below it) already, bit for bit.
    """

    served: Served
    held: Held
    now: Served | None
    settings: PushSettings
    references: References
    changed: tuple[int, ...] | None
    previous: int | None
    unmoved: bool = False


@dataclass
class Verdict:
    """Outcome of a push so far. `error` None: every engine agrees. `touched`: some engine had been written to."""

    reports: dict[str, EngineReport] = field(default_factory=dict)
    error: BridgeError | None = None
    touched: bool = False
    phases: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class TwoPhaseCommit:
    """One attempt to bring a fleet to a target. Made by `push_run` on the owner thread; its methods are called in the
    order of the module's docstring, and block."""

    def __init__(self, fleet: Fleet, target: PushTarget, deadline: Deadline) -> None:
        self._fleet = fleet
        self._target = target
        self._deadline = deadline
        fleet.turn += 1

    def load(self) -> Verdict:
        """Load the target into every engine and collect the first vote."""
        answers = self._fleet.ask_each(self._load_requests(), EngineLoaded, self._deadline)
        verdict = Verdict()
        for engine, answer in answers.items():
            if isinstance(answer, BridgeError):
                # it may have begun to write before it was lost or ran out of time
                verdict.touched = True
                verdict.error = verdict.error or answer
                verdict.reports[engine] = _stale(self._fleet, engine, answer)
                continue
            verdict.touched |= answer.touched
            verdict.notes = (*verdict.notes, *answer.notes)
            verdict.reports[engine] = answer.report
            for name, seconds in answer.phases.items():
                verdict.phases[name] = max(verdict.phases.get(name, 0.0), seconds)
            if answer.error is not None:
                verdict.error = verdict.error or answer.error.rebuild()
        return verdict

    def _load_requests(self) -> dict[str, ToEngine]:
        target, fleet, checked = self._target, self._fleet, set[str]()
        requests: dict[str, ToEngine] = {}
        for engine, info in fleet.infos.items():
            # skipping unchanged tensors is only safe where read-back then compares all of them
            current = (
                info.state == EngineState.SERVING.value
                and target.now is not None
                and info.serving == target.now.version
            )
            skipping = current and "read-back" in target.settings.levels
            brings_lora = target.held.plan.lora is not None
            requests[engine] = EngineLoad(
                job=LoadJob(
                    plan=target.held.plan.id,
                    slot=target.held.slot,
                    settings=target.settings,
                    changed=target.changed if skipping else None,
                    previous=target.previous if current else None,
                    lora=target.served.lora_name if brings_lora else None,
                ),
                version=target.served.version,
                sealed=target.held.version,
                root=target.held.seal.root,
                # engines of one node share the arena: the first of them digests it
                check="transfer" in target.settings.levels and info.node not in checked,
                reference=target.references.served,
                base=target.references.base,
                canary_floor=fleet.floors.get(engine, canary.DEFAULT_FLOOR),
                unmoved=target.unmoved,
                turn=fleet.turn,
                keeps=None if brings_lora else target.served.lora_name,
            )
            checked.add(info.node)
        return requests

    def vote(self, verdict: Verdict) -> None:
        """Have every engine reset and check its caches; a failure becomes the verdict's error."""
        commit = EngineCommit(self._target.served.version, self._target.settings, self._fleet.turn)
        answers = self._fleet.ask_each(dict.fromkeys(self._fleet.infos, commit), EngineOk, self._deadline)
        for engine, answer in answers.items():
            if not isinstance(answer, BridgeError):
                verdict.reports[engine] = _merge(verdict.reports[engine], answer.report)
                continue
            verdict.error = verdict.error or answer
            if isinstance(answer, TransportError):  # it may hang: the others' way back does not wait for it
                verdict.reports[engine] = _merge(verdict.reports[engine], _stale(self._fleet, engine, answer))

    def resume(self, verdict: Verdict) -> None:
        """Have every engine serve the committed version.

        Nothing is undone from here on: an engine that does not resume is loaded anew (an adapter's over the weights
        that are served), or refuses, or is STALE where it does not answer at all; the others serve.
        """
        resume = EngineResume(self._target.served.version, self._fleet.turn, self._target.served.lora_name)
        deadline = Deadline.after(RESTORE_TIMEOUT_S)
        answers = self._fleet.ask_each(dict.fromkeys(self._fleet.infos, resume), EngineOk, deadline)
        for engine, answer in answers.items():
            if isinstance(answer, BridgeError):
                verdict.notes = (*verdict.notes, f"{engine} did not resume after the commit: {answer}")
                report = self._load_again(engine, resume, str(answer))
            else:
                report = answer.report
            verdict.reports[engine] = _merge(verdict.reports[engine], report)
            self._fleet.note(report)

    def _load_again(self, engine: str, resume: EngineResume, why: str) -> EngineReport:
        """Ask an engine that did not resume once more, then have it load the version from the arena."""
        deadline, fleet, target = Deadline.after(RESTORE_TIMEOUT_S), self._fleet, self._target
        answer = fleet.ask_each({engine: resume}, EngineOk, deadline)[engine]
        if isinstance(answer, BridgeError) and not isinstance(answer, TransportError):
            message = _restore_message(target.served, why, fleet.turn)
            answer = fleet.ask_each({engine: message}, EngineOk, deadline)[engine]
        return _stale(fleet, engine, answer) if isinstance(answer, BridgeError) else answer.report


def restore(
    fleet: Fleet, back: Served | None, reports: Mapping[str, EngineReport], reason: str
) -> dict[str, EngineReport]:
    """Have every engine return to `back`, verified, or be quarantined. Blocks; engines that `reports` shows as STALE
    are not waited for."""
    fleet.turn += 1  # what an engine that hung has not begun yet must not be done after it was told to go back
    message = _restore_message(back, reason, fleet.turn)
    lost = {engine for engine, report in reports.items() if report.state == EngineState.STALE.value}
    merged = dict(reports)
    for engines, seconds in ((fleet.infos.keys() - lost, RESTORE_TIMEOUT_S), (lost, LOST_TIMEOUT_S)):
        answers = fleet.ask_each(dict.fromkeys(engines, message), EngineOk, Deadline.after(seconds))
        for engine, answer in answers.items():
            if isinstance(answer, BridgeError):
                merged[engine] = _stale(fleet, engine, answer)
            else:
                merged[engine] = _merge(merged.get(engine, answer.report), answer.report)
                fleet.note(answer.report)
    return merged


def _restore_message(back: Served | None, reason: str, turn: int) -> EngineRestore:
    weights = back.weights if back is not None else None
    job = None if weights is None else LoadJob(weights.plan.id, weights.slot, _RESTORE)
    version, lora = (back.version, back.lora_name) if back is not None else (None, None)
    return EngineRestore(job, version, reason, RESTORE_TIMEOUT_S, turn, lora)


def _stale(fleet: Fleet, engine: str, error: BridgeError) -> EngineReport:
    report = EngineReport(engine, EngineState.STALE.value, None, error=str(error))
    fleet.note(report)
    return report


def _merge(before: EngineReport, after: EngineReport) -> EngineReport:
    """Join two reports of one engine: the later one's state over the earlier one's findings."""
    extra = {rank.rank: rank.levels for rank in after.ranks}
    ranks = tuple(
        msgspec.structs.replace(rank, levels=(*rank.levels, *extra.get(rank.rank, ()))) for rank in before.ranks
    )
    return msgspec.structs.replace(
        after,
        ranks=ranks or after.ranks,
        canary=before.canary or after.canary,
        adapter=after.adapter or before.adapter,
        pause_s=max(before.pause_s, after.pause_s),
        error=after.error or before.error,
    )
