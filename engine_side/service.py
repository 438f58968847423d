"""One engine's half of a push: pause, load, verify, commit or put back, and the gate in front of its generation.

`EngineService` speaks the messages of `bridge.messages` and drives one `EngineAdapter`. It runs in the EngineActor, or
in the user's process for `bridge.attach`. It knows states and order; it knows neither names of weights nor sockets.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from pathlib import Path
from typing import TypeVar

from bridge import canary
from bridge.arena import Arena
from bridge.deadline import Deadline
from bridge.digest import check_slot
from bridge.errors import (
    BridgeError,
    CanaryMismatch,
    ConfigError,
    DigestMismatch,
    EngineQuarantined,
    IntegrityError,
    MissingTensor,
    ProtocolError,
)
from bridge.ledger import EngineState, transition
from bridge.mailbox import Mailbox
from bridge.messages import (
    AnyAnswer,
    AnyJob,
    BakeJob,
    EngineBake,
    EngineBaked,
    EngineCheck,
    EngineChecked,
    EngineClose,
    EngineCommit,
    EngineExplain,
    EngineExplained,
    EngineGenerate,
    EngineGenerated,
    EngineHello,
    EngineInfo,
    EngineIs,
    EngineLoad,
    EngineLoaded,
    EngineMap,
    EngineOk,
    EngineReadBack,
    EngineRestore,
    EngineResume,
    EngineVersionZero,
    ExplainJob,
    FromEngine,
    LoadJob,
    LogprobsJob,
    MapJob,
    RankAnswer,
    RankBake,
    RankDone,
    RankExplanation,
    RankFailed,
    RankJob,
    RankLoaded,
    RankReadBack,
    RankScores,
    ReadBackJob,
    Refused,
    Scores,
    ToEngine,
    VerifyJob,
)
from bridge.receipt import CanaryResult, EngineReport, Failure, LevelResult, RankReport
from bridge.wire import ErrorInfo, Sampling, pack, unpack
from engine_side.adapters.base import EngineAdapter
from engine_side.checkpoint import write_checkpoint

log = logging.getLogger(__name__)
A = TypeVar("A")

ERROR_OF_LEVEL: dict[str, type[IntegrityError]] = {
    "transfer": DigestMismatch,
    "coverage": MissingTensor,
    "attributes": IntegrityError,
    "read-back": DigestMismatch,
    "probe": IntegrityError,
    "change": IntegrityError,
    "canary": CanaryMismatch,
    "cache": CanaryMismatch,
}
RANK_LEVELS = frozenset({"coverage", "attributes", "read-back", "probe", "change"})
ABORT_TOKENS = 1


class EngineService:
    """Serves one engine. `handle` is called by the coordinator, one request at a time except EngineGenerate."""

    def __init__(
        self, engine_id: str, adapter: EngineAdapter, *, node: str, threads: int = 1
    ) -> None:
        self.id = engine_id
        self.adapter = adapter
        self._node = node
        self._threads = threads
        self._state = EngineState.SERVING
        self._serving: int | None = 0
        self._detail = ""
        self._touched = False
        self._busy = threading.RLock()
        self._nonce = int.from_bytes(os.urandom(4), "little") << 16
        self._mailbox: Mailbox | None = None
        self._page = 0
        self._arenas: dict[int, Arena] = {}
        self._paused_at: float | None = None
        self._pause_s = 0.0
        self._canary_s = 0.0
        self._warm_prompt: list[int] = []

    # ---- requests ---------------------------------------------------------------------------------------------------

    def handle(self, request: ToEngine) -> FromEngine:
        """Answer one request; every error comes back as Refused."""
        try:
            if isinstance(request, EngineGenerate):
                return self._generate(request)
            if isinstance(request, EngineHello) and request.mailbox is None:
                return self._hello(request)  # a question never waits for a push
            with self._busy:
                return self._answer(request)
        except BridgeError as error:
            return Refused(ErrorInfo.of(error))
        except Exception as error:  # process boundary: the coordinator must get an answer whatever broke here
            log.exception("request %s failed", type(request).__name__)
            return Refused(ErrorInfo.of(error))

    def _answer(self, request: ToEngine) -> FromEngine:
        match request:
            case EngineHello():
                return self._hello(request)
            case EngineBake():
                job = BakeJob(request.plan, request.tensors, request.partial)
                return EngineBaked(tuple(self._ask(job, RankBake, Deadline.after(request.timeout_s))))
            case EngineMap():
                return self._map(request)
            case EngineReadBack():
                return self._read_back(request)
            case EngineLoad():
                return self._load(request)
            case EngineCommit():
                return self._commit(request)
            case EngineResume():
                return self._resume(request)
            case EngineRestore():
                return self._restore(request)
            case EngineCheck():
                return self._check(request)
            case EngineExplain():
                job2 = ExplainJob(request.plan, request.name)
                found = self._ask(job2, RankExplanation, Deadline.after(request.timeout_s))
                return EngineExplained(tuple({"rank": str(r), **row} for r, x in enumerate(found) for row in x.rows))
            case EngineClose():
                self.close()
                return EngineOk(self._report())
            case EngineGenerate():
                return self._generate(request)

    def _hello(self, request: EngineHello) -> EngineIs:
        if request.mailbox is not None:
            if self._mailbox is not None:
                self._mailbox.close()
            self._mailbox, self._page = Mailbox.open(Path(request.mailbox)), request.page
        a = self.adapter
        return EngineIs(
            EngineInfo(
                self.id,
                a.kind,
                a.ranks,
                a.can_generate,
                self._state.value,
                self._serving,
                self._node,
                os.getpid(),
                self._detail,
            )
        )

    def _report(self, ranks: tuple[RankReport, ...] = (), error: str | None = None) -> EngineReport:
        return EngineReport(self.id, self._state.value, self._serving, ranks, pause_s=self._pause_s, error=error)

    def _move(self, to: EngineState) -> None:
        self._state = transition(self.id, self._state, to)

    # ---- ranks ------------------------------------------------------------------------------------------------------

    def _answers(self, job: AnyJob, deadline: Deadline) -> list[AnyAnswer]:
        """Run a job on every rank and collect the answers from the mailbox, in rank order."""
        if self._mailbox is None:
            raise ProtocolError("this engine has no mailbox yet", where=self.id)
        self._nonce += 1
        frame = pack(RankJob(str(self._mailbox.path), self._page, self._nonce, job))
        self.adapter.dispatch(frame, deadline)
        pages = range(self._page, self._page + self.adapter.ranks)
        payloads = self._mailbox.wait(pages, self._nonce, deadline)
        answers = []
        for rank, payload in enumerate(payloads):
            answer = unpack(payload, RankAnswer)
            if answer.rank != rank or answer.nonce != self._nonce:
                raise ProtocolError(
                    "an answer of another rank or job",
                    where=self.id,
                    expected=f"rank {rank}, nonce {self._nonce}",
                    got=f"rank {answer.rank}, nonce {answer.nonce}",
                )
            answers.append(answer.answer)
        return answers

    def _ask(self, job: AnyJob, kind: type[A], deadline: Deadline) -> list[A]:
        """Like `_answers`, all of one kind. Raises the first rank's error, with its rank and engine in the message."""
        out: list[A] = []
        for rank, answer in enumerate(self._answers(job, deadline)):
            if isinstance(answer, RankFailed):
                error = answer.error.rebuild()
                where = f"{error.where} ({self.id} rank {rank})" if error.where else f"{self.id} rank {rank}"
                located = type(error)(
                    error.what,
                    where=where,
                    expected=error.expected,
                    got=error.got,
                    remedy=error.remedy,
                    names=error.names,
                )
                self._touched |= answer.touched
                raise located
            if not isinstance(answer, kind):
                raise ProtocolError("an answer of the wrong kind", expected=kind.__name__, got=type(answer).__name__)
            out.append(answer)
        return out

    # ---- plan -------------------------------------------------------------------------------------------------------

    def _map(self, request: EngineMap) -> EngineOk:
        arena = Arena.open(Path(request.path), request.manifest)
        try:
            job = MapJob(request.plan, request.path, request.manifest, request.keep)
            self._ask(job, RankDone, Deadline.after(request.timeout_s))
        except BaseException:
            arena.close()
            raise
        self._arenas[request.plan] = arena
        for plan in [p for p in self._arenas if p != request.plan and p not in request.keep]:
            self._arenas.pop(plan).close()
        return EngineOk(self._report())

    def _arena(self, plan: int) -> Arena:
        try:
            return self._arenas[plan]
        except KeyError:
            raise ProtocolError("this engine does not know that plan", where=self.id, got=str(plan)) from None

    def _read_back(self, request: EngineReadBack) -> EngineVersionZero:
        """Live weights into the slot; where post-load work packed some away, the engine's own checkpoint instead."""
        deadline = Deadline.after(request.timeout_s)
        found = self._ask(ReadBackJob(request.plan, request.slot), RankReadBack, deadline)
        unreadable = sorted({name for answer in found for name in answer.unreadable})
        if not unreadable:
            return EngineVersionZero(True, "live")
        checkpoint = self.adapter.checkpoint
        if checkpoint is None or self._serving != 0:
            got = f"{len(unreadable)} tensors packed away, {unreadable[0]} among them"
            return EngineVersionZero(False, "none", f"{got}, and the engine's checkpoint is not known")
        arena = self._arena(request.plan)
        missing = write_checkpoint(checkpoint, arena, request.slot)
        if missing:
            return EngineVersionZero(False, "none", f"{checkpoint} does not hold {missing[0]}")
        return EngineVersionZero(True, "checkpoint")

    # ---- load and verify --------------------------------------------------------------------------------------------

    def _load(self, request: EngineLoad) -> EngineLoaded:
        deadline = Deadline.after(request.options.timeout_s)
        self._require_usable()
        self._touched = False
        phases: dict[str, float] = {}
        ranks: tuple[RankReport, ...] = ()
        drift: CanaryResult | None = None
        self._move(EngineState.STAGING)
        try:
            ranks = self._stage(request, phases)
            self._warm_cache(request)
            self._pause(request.options.inflight, deadline)
            ranks = self._write(request, ranks, phases, deadline)
            self._move(EngineState.LOADED)
            _raise_first_failure(self.id, ranks)
            drift = self._canary(request, deadline)
            phases["verify"] = phases.get("verify", 0.0) + self._canary_s
            if drift is not None and not drift.ok:
                raise _canary_error(self.id, drift)
            self._move(EngineState.VERIFIED)
        except BridgeError as error:
            report = _with_canary(self._report(ranks, str(error)), drift)
            return EngineLoaded(report, self._touched, ErrorInfo.of(error), phases)
        return EngineLoaded(_with_canary(self._report(ranks), drift), True, None, phases)

    def _require_usable(self) -> None:
        if self._state is EngineState.QUARANTINED:
            log.warning("%s is quarantined (%s); a verified push will lift it", self.id, self._detail)

    def _stage(self, request: EngineLoad, phases: dict[str, float]) -> tuple[RankReport, ...]:
        """Before anything is written: the announced version is sealed, and its bytes are what was sealed."""
        arena = self._arena(request.plan)
        seal = arena.seal_of(request.slot)
        if seal is None or seal.root != request.root or seal.version != request.version:
            raise ProtocolError(
                "the arena does not hold the announced version",
                where=f"{self.id} slot {request.slot}",
                expected=f"version {request.version}, root {request.root.hex()}",
                got="unsealed" if seal is None else f"version {seal.version}, root {seal.root.hex()}",
            )
        started = time.perf_counter()
        levels: tuple[LevelResult, ...] = ()
        if request.check:
            check_slot(arena, request.slot, self._threads)
        if "transfer" in request.options.levels:
            note = "" if request.check else "digests were checked by another engine of this node"
            levels = (LevelResult("transfer", True, len(arena.manifest.tensors), note=note),)
        phases["transfer"] = time.perf_counter() - started
        return tuple(RankReport(rank, levels) for rank in range(self.adapter.ranks))

    def _write(
        self, request: EngineLoad, staged: tuple[RankReport, ...], phases: dict[str, float], deadline: Deadline
    ) -> tuple[RankReport, ...]:
        self._touched = True
        levels = tuple(level for level in request.options.levels if level in RANK_LEVELS)
        job = LoadJob(request.plan, request.slot, levels, request.changed, request.previous)
        loaded = [answer.report for answer in self._ask(job, RankLoaded, deadline)]
        for phase in ("load", "postload", "verify"):
            phases[phase] = max(getattr(report, f"{phase}_s") for report in loaded)
        return tuple(
            RankReport(
                r.rank,
                (*s.levels, *r.levels),
                r.strategies,
                r.rebound,
                r.canary_only,
                r.written,
                r.load_s,
                r.postload_s,
                r.verify_s,
            )
            for s, r in zip(staged, loaded, strict=True)
        )

    def _canary(self, request: EngineLoad, deadline: Deadline) -> CanaryResult | None:
        """The engine's own log-probabilities, past the scheduler, against the trainer's."""
        self._canary_s = 0.0
        if "canary" not in request.options.levels or request.reference is None or not self.adapter.can_generate:
            return None
        started = time.perf_counter()
        scores = self._scores(request.reference.prompts, deadline)
        self._canary_s = time.perf_counter() - started
        return canary.compare(
            request.reference.logprobs, scores, floor=request.canary_floor, baseline=request.canary_baseline
        )

    def _scores(self, prompts: tuple[tuple[int, ...], ...], deadline: Deadline) -> Scores:
        return self._ask(LogprobsJob(prompts), RankScores, deadline)[0].logprobs

    # ---- pause, commit, resume --------------------------------------------------------------------------------------

    def _pause(self, inflight: str, deadline: Deadline) -> None:
        if self._paused_at is None:
            self._paused_at = time.perf_counter()
            self._pause_s = 0.0
        self.adapter.pause(inflight, deadline)

    def _unpause(self) -> None:
        self.adapter.resume()
        if self._paused_at is not None:
            self._pause_s = time.perf_counter() - self._paused_at
            self._paused_at = None

    def _warm_cache(self, request: EngineLoad) -> None:
        """Have the old weights' KV of one canary prompt in the prefix cache, so that the cache check has something to
        find stale. Only an engine that serves can; a busy one does this like any request of its users."""
        self._warm_prompt = []
        wanted = "cache" in request.options.levels and request.options.kv == "reset" and request.reference is not None
        if not wanted or not self.adapter.can_generate or self._serving is None or request.reference is None:
            return
        prompt = max((list(p) for p in request.reference.prompts), key=len)
        self.adapter.generate([prompt], Sampling(max_tokens=ABORT_TOKENS, temperature=0.0), past_gate=True)
        self._warm_prompt = prompt

    def _commit(self, request: EngineCommit) -> EngineOk:
        if self._state is not EngineState.VERIFIED:
            raise ProtocolError("a commit of a version that was not verified", where=self.id, got=self._state.value)
        levels: tuple[LevelResult, ...] = ()
        if request.options.kv == "reset" and self.adapter.can_generate:
            answered = self.adapter.reset_caches()
            if "cache" in request.options.levels:
                levels = (self._check_cache(answered, Deadline.after(request.timeout_s)),)
            elif not answered:
                raise CanaryMismatch("the engine refused to reset its caches", where=self.id, remedy="use kv='keep'")
        for level in levels:
            if not level.ok:
                raise _level_error(self.id, 0, level)
        return EngineOk(self._report(tuple(RankReport(0, levels) for _ in levels)))

    def _check_cache(self, answered: bool, deadline: Deadline) -> LevelResult:
        """A prompt cached before the sync is generated again with cache reads allowed. Its first token's
        log-probability must be what the new weights give past the cache, which the canary has just weighed."""
        if not answered:
            return LevelResult("cache", False, 1, (Failure("reset", "caches dropped", "the engine refused"),))
        prompt = self._warm_prompt
        if not prompt:
            return LevelResult("cache", True, 1, note="reset answered; no prompt was cached before")
        (again,) = self.adapter.generate([prompt], Sampling(max_tokens=1, temperature=0.0), past_gate=True)
        if not again.token_ids:
            failure = Failure("cached prompt", "one token", f"none ({again.finish_reason})")
            return LevelResult("cache", False, 1, (failure,))
        fresh = self._scores(((*prompt, again.token_ids[0]),), deadline)[0][-1]
        drift = abs(fresh - again.logprobs[0])
        if not math.isfinite(drift) or drift > canary.DEFAULT_FLOOR:
            failure = Failure("cached prompt", f"log-probability {fresh:.4f}", f"{again.logprobs[0]:.4f}")
            return LevelResult("cache", False, 2, (failure,))
        return LevelResult("cache", True, 2)

    def _resume(self, request: EngineResume) -> EngineOk:
        if self._state is not EngineState.VERIFIED:
            raise ProtocolError("a resume of a version that was not verified", where=self.id, got=self._state.value)
        self._publish(request.version)
        return EngineOk(self._report())

    def _publish(self, version: int) -> None:
        self._move(EngineState.SERVING)
        self._serving, self._detail = version, ""
        self.adapter.publish(version)
        self.adapter.refuse(None)
        self._unpause()

    # ---- put back ---------------------------------------------------------------------------------------------------

    def _restore(self, request: EngineRestore) -> EngineOk:
        """Serve the previous version again, proven by bits or probes, or nothing at all."""
        if not self._touched and self._serving is not None:
            if self._state is EngineState.SERVING:
                return EngineOk(self._report())
            self._move(EngineState.SERVING)
            self._unpause()
            return EngineOk(self._report())
        deadline = Deadline.after(request.timeout_s)
        if self._state is not EngineState.STAGING:
            self._move(EngineState.STAGING)
        try:
            if request.slot is None or request.version is None:
                raise EngineQuarantined("there is no previous version to return to", where=self.id)
            self._pause("abort", deadline)
            levels = ("coverage", "read-back", "probe")
            job = LoadJob(request.plan, request.slot, levels)
            ranks = tuple(answer.report for answer in self._ask(job, RankLoaded, deadline))
            self._move(EngineState.LOADED)
            _raise_first_failure(self.id, ranks)
            self._move(EngineState.VERIFIED)
            if self.adapter.can_generate and not self.adapter.reset_caches():
                raise EngineQuarantined("the engine refused to reset its caches", where=self.id)
        except BridgeError as error:
            self._quarantine(f"{request.reason}; then the way back failed: {error}")
            return EngineOk(self._report(error=self._detail))
        self._touched = False
        self._publish(request.version)
        return EngineOk(self._report(error=request.reason))

    def _quarantine(self, reason: str) -> None:
        log.error("%s is quarantined: %s", self.id, reason)
        self._move(EngineState.QUARANTINED)
        self._serving, self._detail = None, reason
        self.adapter.refuse(reason)

    # ---- health, generation, end ------------------------------------------------------------------------------------

    def _check(self, request: EngineCheck) -> EngineChecked:
        deadline = Deadline.after(request.timeout_s)
        transfer: tuple[LevelResult, ...] = ()
        if "transfer" in request.levels:
            transfer = (self._check_arena(request),)
        levels = tuple(level for level in request.levels if level in RANK_LEVELS)
        found = self._ask(VerifyJob(request.plan, request.slot, levels), RankLoaded, deadline)
        scores: Scores = ()
        if request.prompts and self.adapter.can_generate:
            scores = self._scores(request.prompts, deadline)
        return EngineChecked(tuple((*transfer, *answer.report.levels) for answer in found), scores)

    def _check_arena(self, request: EngineCheck) -> LevelResult:
        arena = self._arena(request.plan)
        try:
            check_slot(arena, request.slot, self._threads)
        except DigestMismatch as error:
            failures = tuple(Failure(name, "the sealed digest", "other bytes") for name in error.names)
            return LevelResult("transfer", False, len(arena.manifest.tensors), failures)
        return LevelResult("transfer", True, len(arena.manifest.tensors))

    def _generate(self, request: EngineGenerate) -> EngineGenerated:
        if self._state is EngineState.QUARANTINED:
            raise EngineQuarantined(
                "this engine holds weights that nobody verified and serves nothing",
                where=self.id,
                got=self._detail,
                remedy="push a version that verifies",
            )
        if self._state is EngineState.STALE:
            raise ConfigError("this engine is stale and serves nothing until a verified push", where=self.id)
        completions = self.adapter.generate(request.prompts, request.sampling, request.adapter)
        return EngineGenerated(tuple(completions))

    def close(self) -> None:
        """Release the shared memory and stop what the adapter started. Idempotent."""
        self.adapter.close()
        for arena in self._arenas.values():
            arena.close()
        self._arenas.clear()
        if self._mailbox is not None:
            self._mailbox.close()
            self._mailbox = None


def _with_canary(report: EngineReport, drift: CanaryResult | None) -> EngineReport:
    return EngineReport(
        report.id, report.state, report.serving, report.ranks, drift, report.adapter, report.pause_s, report.error
    )


def _canary_error(engine: str, drift: CanaryResult) -> CanaryMismatch:
    return CanaryMismatch(
        "the engine's log-probabilities are not the trainer's",
        where=f"{engine}, {drift.tokens} canary tokens",
        expected=f"mean |difference| at most {drift.limit:.4f} nats",
        got=f"mean {drift.mean_abs:.4f}, max {drift.max_abs:.4f}",
        remedy="bits and probes passed: look for derived state that a load does not reach (rope, caches, scales)",
    )


def _level_error(engine: str, rank: int, level: LevelResult) -> IntegrityError:
    first = level.failures[0] if level.failures else Failure("?", "", "")
    more = f" (and {len(level.failures) - 1} more)" if len(level.failures) > 1 else ""
    return ERROR_OF_LEVEL[level.level](
        f"the {level.level} check failed",
        where=f"{first.name}{more} on {engine} rank {rank}",
        expected=first.expected,
        got=first.got,
        remedy="weighbridge explain TENSOR shows where it goes",
        names=tuple(failure.name for failure in level.failures),
    )


def _raise_first_failure(engine: str, ranks: tuple[RankReport, ...]) -> None:
    for report in ranks:
        for level in report.levels:
            if not level.ok:
                raise _level_error(engine, report.rank, level)
