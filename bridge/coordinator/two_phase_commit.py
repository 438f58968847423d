"""All engines of a bridge, driven together: two-phase commit over engine services (transports.md 4.6).

Stage and load on every engine, vote; reset caches on every engine, vote; journal; resume. Any failure or deadline
before the journal entry puts every engine back. One thread per engine, so the slowest engine decides, not the sum.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from bridge.coordinator.reports import Verdict, both, merge, verified
from bridge.coordinator.versions import Held, Served
from bridge.errors import BridgeError, Busy, EngineQuarantined, PeerLost, TransportError
from bridge.journal.ledger import EngineState
from bridge.model import canary
from bridge.model.manifest import Manifest
from bridge.model.receipt import EngineReport
from bridge.ports import EnginePort, expect
from bridge.protocol.coordinator_messages import EngineInfo, Options, PlanRequest, Reference
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import (
    EngineBake,
    EngineBaked,
    EngineCheck,
    EngineChecked,
    EngineClose,
    EngineCommit,
    EngineExplain,
    EngineExplained,
    EngineForget,
    EngineHello,
    EngineIs,
    EngineLoad,
    EngineLoaded,
    EngineMap,
    EngineOk,
    EngineReadBack,
    EngineRestore,
    EngineResume,
    EngineVersionZero,
)
from bridge.shm.arena import Arena
from bridge.shm.seal import digest_slot, seal_slot

log = logging.getLogger(__name__)
T = TypeVar("T")

RESTORE_TIMEOUT_S = 120.0
"""Putting engines back has a deadline of its own: a push that ran out of time must still be undone."""
LOST_TIMEOUT_S = 3.0
"""How long an engine that has not answered is waited for when it is told to go back: it may be hanging for good, and
what it is told waits for it."""


@dataclass(frozen=True)
class Target:
    """A sealed slot on its way into the engines, to be served as `version`. `sealed` is the version that the slot was
    sealed with. `changed` and `previous` refer to what the engines hold at version `base`.

    `adapter` is what "current" means once it serves; with `load_lora` the slot holds that adapter, else weights.
    """

    plan: int
    slot: int
    version: int
    sealed: int
    root: bytes
    options: Options
    reference: Reference | None
    base_reference: Reference | None
    changed: tuple[int, ...] | None
    previous: int | None
    base: int | None
    adapter: str | None = None
    load_lora: bool = False


class Fleet:
    """The engines of one bridge. Not thread-safe except `serving`: the coordinator calls it from one push at a time."""

    def __init__(self, engines: Sequence[EnginePort]) -> None:
        self._engines = list(engines)
        self._pool = ThreadPoolExecutor(
            max_workers=max(4, 2 * len(self._engines)), thread_name_prefix="weighbridge-fan"
        )
        self._infos: dict[str, EngineInfo] = {}
        self._baseline: dict[str, float] = {}
        self._floor: dict[str, float] = {}  # by the coarsest dtype that the engine itself holds
        self._turn = time.time_ns()  # a coordinator that was started again goes on above the turns of the last one

    # ---- fan-out ----------------------------------------------------------------------------------------------------

    def _each(
        self, call: Callable[[EnginePort], T], engines: Iterable[EnginePort] | None = None
    ) -> dict[str, T | BridgeError]:
        """Run `call` for every engine at once; an engine's BridgeError becomes its answer."""

        chosen = self._engines if engines is None else list(engines)
        answers = self._pool.map(lambda engine: _outcome(call, engine), chosen)
        return dict(zip((e.id for e in chosen), answers, strict=True))

    def _all(self, call: Callable[[EnginePort], T]) -> dict[str, T]:
        """Like `_each`, but the first engine's error is raised."""
        answers = self._each(call)
        for answer in answers.values():
            if isinstance(answer, BridgeError):
                raise answer
        return {name: answer for name, answer in answers.items() if not isinstance(answer, BridgeError)}

    def hello(self, deadline: Deadline, strict: bool = True) -> list[EngineInfo]:
        """Ask every engine who it is. With `strict` an engine that does not answer raises, else it is shown as lost."""
        answers = self._each(lambda e: expect(e.call(EngineHello(), deadline), EngineIs).info)
        for engine, answer in answers.items():
            if isinstance(answer, BridgeError):
                if strict:
                    raise answer
                last = self._infos.get(engine)
                self._infos[engine] = EngineInfo(
                    engine,
                    last.kind if last else "?",
                    last.ranks if last else 0,
                    False,
                    "LOST",
                    None,
                    "?",
                    0,
                    str(answer),
                )
            else:
                self._infos[engine] = answer
        return [self._infos[engine.id] for engine in self._engines]

    def assign_pages(self, mailbox: str, owner: str, deadline: Deadline) -> None:
        """Give every engine its pages of the mailbox, in engine order, and claim it. Raises Busy for an engine that
        another bridge drives."""
        page = 0
        for engine in self._engines:
            expect(engine.call(EngineHello(mailbox, page, owner), deadline), EngineIs)
            page += self._infos[engine.id].ranks

    def serving(self) -> dict[str, int | None]:
        """Engine -> version it served when it was last heard of."""
        return {name: info.serving for name, info in self._infos.items()}

    def serve_lora(self) -> str | None:
        """The adapter that every engine was left with by a bridge before this one; None when they do not agree."""
        names = {info.adapter for info in self._infos.values()}
        return names.pop() if len(names) == 1 else None

    def hold_lora(self, name: str, deadline: Deadline) -> bool:
        """Do all engines still hold it?"""
        return all(name in info.adapters for info in self.hello(deadline, strict=False))

    def same_weights(self, plan: int, slot: int, deadline: Deadline) -> tuple[str, ...]:
        """Read every engine's live weights back against a slot, whatever was last verified: names of what differs."""
        check = EngineCheck(plan, slot, ("read-back", "probe"), timeout_s=deadline.remaining_s)
        answers = self._all(lambda e: expect(e.call(check, deadline), EngineChecked).ranks)
        bad = [f for ranks in answers.values() for rank in ranks for level in rank for f in level.failures]
        return tuple(dict.fromkeys(failure.tensor or failure.name for failure in bad))

    def require_serving(self, version: int | None) -> None:
        """An adapter goes over weights that every engine serves. Engines that were last heard of in another state are
        asked again, for a short while. Raises PeerLost for one that is gone, EngineQuarantined for one that does not
        answer or does not serve `version` (None: any)."""

        def right(info: EngineInfo) -> bool:
            return info.state == EngineState.SERVING.value and version in (None, info.serving)

        doubtful = [engine for engine in self._engines if not right(self._infos[engine.id])]
        deadline = Deadline.after(LOST_TIMEOUT_S)
        answers = self._each(lambda e: expect(e.call(EngineHello(), deadline), EngineIs).info, doubtful)
        for engine, answer in answers.items():
            if isinstance(answer, PeerLost):
                raise answer
            got = str(answer)
            if not isinstance(answer, BridgeError):
                self._infos[engine] = answer
                if right(answer):
                    continue
                got = f"{answer.state}, version {answer.serving} {answer.detail}"
            raise EngineQuarantined(
                "this engine does not serve the weights that the adapter would go over",
                where=engine,
                expected="SERVING" if version is None else f"SERVING, version {version}",
                got=got.strip(),
                remedy="push the weights first: mode='base', then the adapter",
            )

    # ---- plan -------------------------------------------------------------------------------------------------------

    def bake(self, plan: int, request: PlanRequest, deadline: Deadline) -> dict[str, EngineBaked]:
        message = EngineBake(plan, request.tensors, request.partial, deadline.remaining_s, request.adapter)
        answers = self._all(lambda e: expect(e.call(message, deadline), EngineBaked))
        for engine, answer in answers.items():
            held = {dtype for rank in answer.ranks for dtype in rank.dtypes.values()}
            if request.adapter is None or engine not in self._floor:
                self._floor[engine] = canary.floor_for(held)
        return answers

    def map(self, plan: int, path: str, manifest: Manifest, keep: tuple[int, ...], deadline: Deadline) -> None:
        message = EngineMap(plan, path, manifest, keep, deadline.remaining_s)
        self._all(lambda e: expect(e.call(message, deadline), EngineOk))

    def keep_current(
        self, plan: int, slot: int, arena: Arena, held: Held | None, version: int, deadline: Deadline
    ) -> bool:
        """Put the weights that the engines serve now into `slot` and seal it as `version`. False when they cannot be
        had, or when the engines do not all serve the same ones; then a failing next push ends in quarantine."""
        first, *rest = self._engines
        arena.begin(slot)
        older = (held.plan_id, held.slot) if held is not None else (None, None)
        request = EngineReadBack(plan, slot, deadline.remaining_s, *older)
        answer = expect(first.call(request, deadline), EngineVersionZero)
        if not answer.ok:
            log.warning("%s: what it serves cannot be kept for a rollback: %s", first.id, answer.reason)
            return False
        seal_slot(arena, slot, version, digest_slot(arena, slot))
        check = EngineCheck(plan, slot, ("read-back", "probe"), timeout_s=deadline.remaining_s)
        for engine in (first, *rest) if answer.source != "live" else rest:
            ranks = expect(engine.call(check, deadline), EngineChecked).ranks
            if not all(level.ok for rank in ranks for level in rank):
                log.warning("%s serves other weights than this layout can hold for %s", engine.id, first.id)
                arena.begin(slot)
                return False
        return True

    def forget(self, keep: tuple[int, ...], deadline: Deadline) -> None:
        """Have the engines let go of every plan but `keep`. One that does not answer keeps memory, not rights."""
        for engine, answer in self._each(lambda e: expect(e.call(EngineForget(keep), deadline), EngineOk)).items():
            if isinstance(answer, BridgeError):
                log.warning("%s still maps an older arena: %s", engine, answer)

    def explain(self, plan: int, name: str, deadline: Deadline) -> tuple[dict[str, str], ...]:
        message = EngineExplain(plan, name, deadline.remaining_s)
        answers = self._all(lambda e: expect(e.call(message, deadline), EngineExplained))
        return tuple({"engine": engine, **row} for engine, answer in answers.items() for row in answer.rows)

    # ---- one push ---------------------------------------------------------------------------------------------------

    def advance(self, target: Target, back: Served | None, on_commit: Callable[[], None]) -> Verdict:
        """Bring all engines to `target` or back to `back`. `on_commit` comes between the last vote and any resume."""
        verdict = Verdict()
        self._turn += 1
        deadline = Deadline.after(target.options.timeout_s)
        loaded = self._load(target, deadline)
        self._note_loads(verdict, target, loaded)
        if verdict.error is None:
            started = time.perf_counter()
            commit = EngineCommit(target.version, target.options, deadline.remaining_s, self._turn)
            self._vote(verdict, self._each(lambda e: expect(e.call(commit, deadline), EngineOk).report))
            if verdict.error is None:
                verdict.error = _attempt(on_commit)
            if verdict.error is None:
                resume = EngineResume(target.version, RESTORE_TIMEOUT_S, self._turn, target.adapter)
                answers = self._each(
                    lambda e: expect(e.call(resume, Deadline.after(RESTORE_TIMEOUT_S)), EngineOk).report
                )
                self._after_resume(verdict, target, back.weights if back else None, answers)
            verdict.phases["commit"] = time.perf_counter() - started
        if verdict.error is not None:
            verdict.reports = self._restored(verdict.reports, back, str(verdict.error))
        else:
            verdict.verified = verified(target.version, verdict.reports)
            if "canary" in target.options.levels and not any(report.canary for report in verdict.reports):
                verdict.notes = (*verdict.notes, "no canary: no engine answers log-probabilities")
            if verdict.verified:
                self._learn(verdict.reports)
        return verdict

    def _load(self, target: Target, deadline: Deadline) -> dict[str, EngineLoaded | BridgeError]:
        checked: set[str] = set()
        first_of_node = {}
        for engine in self._engines:
            node = self._infos[engine.id].node
            first_of_node[engine.id] = node not in checked
            checked.add(node)

        def load(engine: EnginePort) -> EngineLoaded:
            info = self._infos[engine.id]
            current = info.state == EngineState.SERVING.value and info.serving == target.base
            message = EngineLoad(
                plan=target.plan,
                slot=target.slot,
                version=target.version,
                sealed=target.sealed,
                root=target.root,
                check=first_of_node[engine.id] and "transfer" in target.options.levels,
                options=target.options,
                reference=target.reference,
                canary_floor=self._floor.get(engine.id, canary.DEFAULT_FLOOR),
                canary_baseline=self._baseline.get(engine.id),
                # skipping unchanged tensors is only safe where read-back then weighs all of them
                changed=target.changed if current and "read-back" in target.options.levels else None,
                previous=target.previous if current else None,
                turn=self._turn,
                adapter=target.adapter if target.load_lora else None,
                base=target.base_reference,
                keeps=None if target.load_lora else target.adapter,
            )
            return expect(engine.call(message, deadline), EngineLoaded)

        return self._each(load)

    def _note_loads(self, verdict: Verdict, target: Target, loaded: Mapping[str, EngineLoaded | BridgeError]) -> None:
        reports = []
        for engine, answer in loaded.items():
            if isinstance(answer, BridgeError):
                # it may have begun to write before it was lost or ran out of time
                verdict.touched = True
                verdict.error = verdict.error or answer
                reports.append(self._lost(engine, answer))
                continue
            verdict.touched |= answer.touched
            verdict.notes = (*verdict.notes, *answer.notes)
            reports.append(answer.report)
            for name, seconds in answer.phases.items():
                verdict.phases[name] = max(verdict.phases.get(name, 0.0), seconds)
            if answer.error is not None:
                verdict.error = verdict.error or answer.error.rebuild()
        verdict.reports = tuple(reports)

    def _vote(self, verdict: Verdict, answers: Mapping[str, EngineReport | BridgeError]) -> None:
        reports = {report.id: report for report in verdict.reports}
        for engine, answer in answers.items():
            if isinstance(answer, BridgeError):
                verdict.error = verdict.error or answer
                if isinstance(answer, TransportError):  # it may hang: the others' way back does not wait for it
                    reports[engine] = merge(reports[engine], self._lost(engine, answer))
            else:
                reports[engine] = merge(reports[engine], answer)
        verdict.reports = tuple(reports.values())

    def _after_resume(
        self,
        verdict: Verdict,
        target: Target,
        weights: Held | None,
        answers: Mapping[str, EngineReport | BridgeError],
    ) -> None:
        """After the journal entry nothing is undone: an engine that did not resume is loaded anew, or refuses, or, when
        it does not answer at all, is STALE; the others serve."""
        reports = {report.id: report for report in verdict.reports}
        for engine, answer in answers.items():
            if isinstance(answer, BridgeError):
                verdict.notes = (*verdict.notes, f"{engine} did not resume after the commit: {answer}")
                answer = self._load_again(engine, target, weights, answer)
            reports[engine] = merge(reports[engine], answer)
            self._heard(answer)
        verdict.reports = tuple(reports.values())

    def _load_again(self, engine_id: str, target: Target, weights: Held | None, why: BridgeError) -> EngineReport:
        """An engine that did not resume after the commit: asked once more, then brought there from the arena."""
        engine = next(e for e in self._engines if e.id == engine_id)
        deadline = Deadline.after(RESTORE_TIMEOUT_S)
        resume = EngineResume(target.version, RESTORE_TIMEOUT_S, self._turn, target.adapter)
        answer = _outcome(lambda e: expect(e.call(resume, deadline), EngineOk).report, engine)
        if isinstance(answer, BridgeError) and not isinstance(answer, TransportError):
            plan, slot = (target.plan, target.slot) if not target.load_lora else (0, None)
            if target.load_lora and weights is not None:
                plan, slot = weights.plan_id, weights.slot
            message = EngineRestore(
                plan, slot, target.version, str(why), RESTORE_TIMEOUT_S, turn=self._turn, adapter=target.adapter
            )
            answer = _outcome(lambda e: expect(e.call(message, deadline), EngineOk).report, engine)
        return self._lost(engine_id, answer) if isinstance(answer, BridgeError) else answer

    def put_back(self, back: Served | None, reason: str) -> None:
        """Have every engine that was written to return to `back`, or quarantine."""
        self._restored((), back, reason)

    def _restored(self, before: tuple[EngineReport, ...], back: Served | None, reason: str) -> tuple[EngineReport, ...]:
        weights = back.weights if back else None
        self._turn += 1  # what an engine that hung has not begun yet must not be done after it was told to go back
        message = EngineRestore(
            plan=weights.plan_id if weights else 0,
            slot=weights.slot if weights else None,
            version=back.version if back else None,
            reason=reason,
            timeout_s=RESTORE_TIMEOUT_S,
            turn=self._turn,
            adapter=back.name if back else None,
        )
        lost = {report.id for report in before if report.state == EngineState.STALE.value}

        def restore(engine: EnginePort) -> EngineReport:
            wait_s = LOST_TIMEOUT_S if engine.id in lost else RESTORE_TIMEOUT_S
            return expect(engine.call(message, Deadline.after(wait_s)), EngineOk).report

        answers = self._each(restore)
        reports = {report.id: report for report in before}
        for engine, answer in answers.items():
            if isinstance(answer, BridgeError):
                reports[engine] = self._lost(engine, answer)
            else:
                reports[engine] = merge(reports.get(engine, answer), answer)
                self._heard(answer)
        return tuple(reports.values())

    def _heard(self, report: EngineReport) -> None:
        info = self._infos[report.id]
        self._infos[report.id] = msgspec.structs.replace(info, state=report.state, serving=report.serving, detail="")

    def _lost(self, engine: str, error: BridgeError) -> EngineReport:
        report = EngineReport(engine, EngineState.STALE.value, None, error=str(error))
        self._heard(report)
        return report

    def _learn(self, reports: Iterable[EngineReport]) -> None:
        """The first verified sync of an engine sets the scale for its later ones."""
        for report in reports:
            if report.canary is not None:
                self._baseline.setdefault(report.id, report.canary.mean_abs)

    # ---- health -----------------------------------------------------------------------------------------------------

    def describe(self, deadline: Deadline) -> list[dict[str, Any]]:
        """Facts for health when there is nothing to compare with."""
        return [_facts(info) for info in self.hello(deadline, strict=False)]

    def examine(
        self, served: Served, weights: Held, reference: Reference | None, with_lora: bool, deadline: Deadline
    ) -> list[dict[str, Any]]:
        """Fresh read-back, probes and canary of what every engine serves now, its adapter included. Writes nothing."""
        prompts = reference.prompts if reference is not None else ()
        levels = ("transfer", "read-back", "probe")
        check = EngineCheck(
            weights.plan_id, weights.slot, levels, prompts, served.version, deadline.remaining_s,
            scored=served.name if with_lora else None,
        )  # fmt: skip
        held = served.adapter
        check_adapter = (
            None
            if held is None
            else EngineCheck(
                held.plan_id, held.slot, levels, (), served.version, deadline.remaining_s, loaded=served.name
            )
        )
        infos = {info.id: info for info in self.hello(deadline, strict=False)}
        alive = [engine for engine in self._engines if infos[engine.id].state != "LOST"]
        answers = self._each(lambda e: expect(e.call(check, deadline), EngineChecked), alive)
        if check_adapter is not None:
            more = self._each(lambda e: expect(e.call(check_adapter, deadline), EngineChecked), alive)
            answers = {engine: both(answer, more[engine]) for engine, answer in answers.items()}
        out = []
        for engine, info in infos.items():
            facts = _facts(info)
            answer = answers.get(engine)
            if isinstance(answer, Busy):
                facts["moved_on"] = str(answer)
            elif isinstance(answer, BridgeError):
                facts["error"] = str(answer)
            elif answer is not None:
                facts["levels"] = [
                    {
                        "rank": rank,
                        "level": level.level,
                        "ok": level.ok,
                        "checked": level.checked,
                        "note": level.note,
                        "failures": [[f.name, f.expected, f.got] for f in level.failures],
                    }
                    for rank, levels in enumerate(answer.ranks)
                    for level in levels
                ]
                if reference is not None and answer.scores:
                    result = canary.compare(
                        reference.logprobs,
                        answer.scores,
                        floor=self._floor.get(engine, canary.DEFAULT_FLOOR),
                        baseline=self._baseline.get(engine),
                    )
                    facts["canary"] = {"mean_abs": result.mean_abs, "max_abs": result.max_abs, "limit": result.limit}
            out.append(facts)
        return out

    def close(self, deadline: Deadline) -> None:
        """Stop every engine gracefully; one that does not answer is logged and left."""

        def stop(engine: EnginePort) -> object:
            return engine.call(EngineClose(), deadline)

        try:
            answers = self._each(stop)
        except RuntimeError:  # the interpreter is ending and its thread pools are closed already: one after the other
            answers = {engine.id: _outcome(stop, engine) for engine in self._engines}
        for name, answer in answers.items():
            if isinstance(answer, BridgeError) and not isinstance(answer, PeerLost):
                log.warning("%s did not close: %s", name, answer)
        self._pool.shutdown(wait=False)


def _outcome(call: Callable[[EnginePort], T], engine: EnginePort) -> T | BridgeError:
    try:
        return call(engine)
    except BridgeError as error:
        return error


def _attempt(action: Callable[[], None]) -> BridgeError | None:
    try:
        action()
    except BridgeError as error:
        return error
    return None


def _facts(info: EngineInfo) -> dict[str, Any]:
    return {"id": info.id, "kind": info.kind, "state": info.state, "serving": info.serving, "ranks": info.ranks,
            "pid": info.pid, "detail": info.detail}  # fmt: skip
