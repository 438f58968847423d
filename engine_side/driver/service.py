"""One engine's half of a push: pause, load, verify, commit or put back, and the gate in front of its generation.

`EngineService` answers the messages of `bridge.protocol.engine_messages` and drives one `EngineDriver`. It runs in the
EngineActor, or in the user's process for `bridge.attach`. It knows states and order, but neither names of weights nor
sockets.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bridge.errors import (
    BridgeError,
    Busy,
    CanaryMismatch,
    ConfigError,
    EngineQuarantined,
    ProtocolError,
    TransportError,
)
from bridge.model.engine_state import EngineState, Standing
from bridge.model.levels import RANK_LEVELS
from bridge.model.receipt import CanaryResult, EngineReport, LevelResult, RankReport
from bridge.protocol.codec import ErrorInfo
from bridge.protocol.coordinator_messages import EngineInfo, Refused
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
    EngineGenerate,
    EngineGenerated,
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
    FromEngine,
    ToEngine,
)
from bridge.protocol.rank_jobs import (
    BakeJob,
    ExplainJob,
    LoadJob,
    RankBake,
    RankExplanation,
    RankLoaded,
    Scores,
    VerifyJob,
)
from engine_side.driver.arenas import Arenas
from engine_side.driver.level_errors import canary_error, level_error, raise_first_failure
from engine_side.driver.lora_versions import LoraVersions
from engine_side.driver.output_checks import Outputs
from engine_side.driver.prompt_checks import require_fit
from engine_side.driver.quantised_trial import require_strategies
from engine_side.driver.rank_client import RankClient
from engine_side.protocol import EngineDriver, LivesInALoop

log = logging.getLogger(__name__)


class EngineService:
    """Serves one engine. `handle` is called by the coordinator, one request at a time except EngineGenerate."""

    def __init__(self, engine_id: str, adapter: EngineDriver, *, node: str, threads: int = 1) -> None:
        self.id = engine_id
        self.adapter = adapter
        self._node = node
        self._detail = adapter.refusal or ""
        if self._detail:
            self._standing = Standing(engine_id, EngineState.QUARANTINED)
        else:
            self._standing = Standing(engine_id, EngineState.SERVING, 0)  # its own checkpoint is version 0
        self._busy = threading.RLock()
        self._turn = 0
        self._ranks = RankClient(engine_id, adapter)
        self._arenas = Arenas(engine_id, self._ranks, threads)
        self._paused_at: float | None = None
        self._pause_s = 0.0
        self._outputs = Outputs(engine_id, adapter, self._ranks)
        self._shelf = LoraVersions(adapter, self._ranks)

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
        if isinstance(request, EngineLoad | EngineCommit | EngineResume | EngineRestore):
            self._take_turn(request.turn)
        match request:
            case EngineHello():
                return self._hello(request)
            case EngineBake():
                job = BakeJob(request.plan, request.tensors, request.partial, request.adapter)
                return EngineBaked(tuple(self._ranks.ask(job, RankBake, Deadline.after(request.timeout_s))))
            case EngineMap():
                self._arenas.map(request)
                return EngineOk(self._report())
            case EngineForget():
                self._arenas.forget(request.keep, request.timeout_s)
                return EngineOk(self._report())
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
                found = self._ranks.ask(job2, RankExplanation, Deadline.after(request.timeout_s))
                return EngineExplained(tuple({"rank": str(r), **row} for r, x in enumerate(found) for row in x.rows))
            case EngineClose():
                self.close()
                return EngineOk(self._report())
            case EngineGenerate():
                return self._generate(request)

    def _take_turn(self, turn: int) -> None:
        if turn < self._turn:
            raise ProtocolError("asked for in a push that has ended", where=self.id, expected=f"turn {self._turn}")
        self._turn = turn

    def _hello(self, request: EngineHello) -> EngineIs:
        if request.mailbox is not None:
            self.adapter.claim(request.owner)
            self._ranks.assign(Path(request.mailbox), request.page)
            try:
                require_strategies(self.id, self.adapter, self._ranks)
            except BaseException:
                self._ranks.close()
                self.adapter.close()
                raise
        a = self.adapter
        return EngineIs(
            EngineInfo(
                self.id,
                a.kind,
                a.ranks,
                a.can_generate,
                self._standing.state.value,
                self._standing.serving,
                self._node,
                os.getpid(),
                self._detail,
                a.max_prompt,
                a.lora,
                self._shelf.current,
                tuple(sorted(self._shelf.loaded)),
            )
        )

    def _report(
        self, ranks: tuple[RankReport, ...] = (), error: str | None = None, adapter: str | None = None
    ) -> EngineReport:
        state, serving = self._standing.state.value, self._standing.serving
        return EngineReport(self.id, state, serving, ranks, adapter=adapter, pause_s=self._pause_s, error=error)

    def _read_back(self, request: EngineReadBack) -> EngineVersionZero:
        if self._standing.state is not EngineState.SERVING:
            reason = f"it is {self._standing.state.value}: nobody verified what it holds"
            return EngineVersionZero(False, "none", reason)
        return self._arenas.read_back(request, self.adapter.checkpoint)

    # ---- load and verify --------------------------------------------------------------------------------------------

    def _load(self, request: EngineLoad) -> EngineLoaded:
        deadline = Deadline.after(request.options.timeout_s)
        # an engine that hung may still be in the middle of the push before this one: what it wrote then still counts
        self._ranks.touched &= self._standing.state is not EngineState.SERVING
        phases: dict[str, float] = {}
        ranks: tuple[RankReport, ...] = ()
        drift: CanaryResult | None = None
        written = False
        if request.adapter is not None:
            self._require_weights()
        if self._standing.state is not EngineState.STAGING:
            self._standing.move(EngineState.STAGING)
        self._shelf.settle()  # committed, but this engine never resumed with it: one of ours all the same
        try:
            ranks = self._stage(request, phases, deadline)
            raise_first_failure(self.id, ranks)
            if request.adapter is None:
                self._shelf.require(request.keeps)
            serving = self._standing.serving
            if request.adapter is None or not self._shelf.lost:
                self._outputs.warm_cache(request, serving, deadline)
            self._pause(request.options.inflight, deadline)
            if request.adapter is None:
                self._shelf.end_others(request.keeps)
            self._outputs.remember(request, serving, deadline)
            written = True
            ranks, notes = self._write(request, ranks, phases, deadline)
            self._standing.move(EngineState.LOADED)
            raise_first_failure(self.id, ranks)
            started = time.perf_counter()
            drift = self._outputs.canary(request, deadline)
            phases["verify"] += time.perf_counter() - started
            if drift is not None and not drift.ok:
                raise canary_error(self.id, drift)
            self._standing.move(EngineState.VERIFIED)
        except BridgeError as error:
            report = _with_canary(self._report(ranks, str(error)), drift)
            return EngineLoaded(report, written or self._ranks.touched, ErrorInfo.of(error), phases)
        report = self._report(ranks, adapter=request.adapter)
        return EngineLoaded(_with_canary(report, drift), True, None, phases, notes)

    def _require_weights(self) -> None:
        """An adapter goes over weights that somebody verified."""
        if self._standing.serving is None or self._standing.state is EngineState.STALE:
            raise EngineQuarantined(
                "this engine serves no weights that an adapter could go over",
                where=self.id,
                got=f"{self._standing.state.value} {self._detail}".strip(),
                remedy="push the weights first: mode='base'",
            )

    def _stage(self, request: EngineLoad, phases: dict[str, float], deadline: Deadline) -> tuple[RankReport, ...]:
        """Before anything is written: the announced version is sealed, its bytes are what was sealed, and the plan
        covers this engine."""
        self._arenas.require_sealed(request)
        started = time.perf_counter()
        levels: tuple[LevelResult, ...] = ()
        if request.check:
            self._arenas.check(request.plan, request.slot)
        if "transfer" in request.options.levels:
            note = "" if request.check else "digests were checked by another engine of this node"
            levels = (LevelResult("transfer", True, len(self._arenas[request.plan].manifest.tensors), note=note),)
        phases["transfer"] = time.perf_counter() - started
        if "coverage" not in request.options.levels:
            return tuple(RankReport(rank, levels) for rank in range(self.adapter.ranks))
        covered = self._ranks.ask(VerifyJob(request.plan, request.slot, ("coverage",)), RankLoaded, deadline)
        return tuple(RankReport(rank, (*levels, *a.report.levels)) for rank, a in enumerate(covered))

    def _write(
        self, request: EngineLoad, staged: tuple[RankReport, ...], phases: dict[str, float], deadline: Deadline
    ) -> tuple[tuple[RankReport, ...], tuple[str, ...]]:
        """Load and verify on every rank: their reports over the staged ones, and notes for the receipt."""
        self._shelf.staged = request.adapter
        self._ranks.touched |= request.adapter is None
        levels = tuple(level for level in request.options.levels if level in RANK_LEVELS and level != "coverage")
        job = LoadJob(request.plan, request.slot, levels, request.changed, request.previous, request.adapter)
        loaded = [answer.report for answer in self._ranks.ask(job, RankLoaded, deadline)]
        notes: tuple[str, ...] = ()
        failed = [report for report in loaded if not all(level.ok for level in report.levels)]
        if failed and all(report.skipped_only for report in failed):
            # what was skipped as unchanged is not what this engine was given: somebody wrote to it since. Load it all.
            notes = (f"{self.id} did not hold what it was given before; everything was loaded anew",)
            log.warning(notes[0])
            job = LoadJob(request.plan, request.slot, levels, None, request.previous)
            loaded = [answer.report for answer in self._ranks.ask(job, RankLoaded, deadline)]
        for phase in ("load", "postload", "verify"):
            phases[phase] = max(getattr(report, f"{phase}_s") for report in loaded)
        pairs = zip(staged, loaded, strict=True)
        return tuple(msgspec.structs.replace(now, levels=(*before.levels, *now.levels)) for before, now in pairs), notes

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

    def _commit(self, request: EngineCommit) -> EngineOk:
        if self._standing.state is not EngineState.VERIFIED:
            raise ProtocolError(
                "a commit of a version that was not verified", where=self.id, got=self._standing.state.value
            )
        levels: tuple[LevelResult, ...] = ()
        if request.options.kv == "reset" and self.adapter.can_generate:
            # what was cached under another adapter's name stays true: only new weights make it stale
            staged = self._shelf.staged
            answered = staged is not None or self.adapter.reset_caches()
            if "cache" in request.options.levels:
                levels = (self._outputs.check_cache(answered, Deadline.after(request.timeout_s), staged),)
            elif not answered:
                raise CanaryMismatch("the engine refused to reset its caches", where=self.id, remedy="use kv='keep'")
        elif "cache" in request.options.levels:
            why = "kv='keep': caches hold what the version before computed" if self.adapter.can_generate else "no cache"
            levels = (LevelResult("cache", True, 0, note=why),)
        for level in levels:
            if not level.ok:
                raise level_error(self.id, 0, level)
        return EngineOk(self._report(tuple(RankReport(0, levels) for _ in levels)))

    def _resume(self, request: EngineResume) -> EngineOk:
        if self._standing.state is not EngineState.VERIFIED:
            raise ProtocolError(
                "a resume of a version that was not verified", where=self.id, got=self._standing.state.value
            )
        self._outputs.published()
        self._shelf.settle()
        try:
            self._serve(request.version, request.adapter, Deadline.after(request.timeout_s))
        except TransportError as error:  # nobody may wait at the gate of an engine that does not answer
            self._quarantine(f"lost when version {request.version} was to be served: {error}")
            return EngineOk(self._report(error=self._detail))
        return EngineOk(self._report())

    def _serve(self, version: int, adapter: str | None, deadline: Deadline) -> None:
        """`_publish`, a second time for an engine that was only late or whose connection broke: who is gone says so
        again."""
        try:
            self._publish(version, adapter)
        except TransportError as error:
            if deadline.expired:
                raise
            log.warning("%s is asked once more to serve version %d: %s", self.id, version, error)
            self._publish(version, adapter)

    def _publish(self, version: int, adapter: str | None) -> None:
        """Serve `version`; adapters of earlier pushes go as soon as no request uses them."""
        if adapter is None or adapter != self._shelf.current or not self._shelf.lost:
            self._shelf.publish(version, adapter)
        self.adapter.refuse(None)
        self._unpause()
        if self._standing.state is not EngineState.SERVING:  # it is, the second time, if only the tidying was late
            self._standing.move(EngineState.SERVING, version)
        self._detail = ""
        self._shelf.tidy()

    # ---- put back ---------------------------------------------------------------------------------------------------

    def _restore(self, request: EngineRestore) -> EngineOk:
        """Serve the previous version again, proven by bits or probes, or nothing at all."""
        try:
            self._shelf.drop(Deadline.after(request.timeout_s), keep=request.adapter)
            if self._stands_at(request):
                if self._standing.state is EngineState.LOADED:
                    self._standing.move(EngineState.STAGING)  # an adapter that did not pass: the weights never moved
                if self._standing.state is not EngineState.SERVING:
                    deadline = Deadline.after(request.timeout_s)
                    self._serve(self._standing.serving or 0, self._shelf.current, deadline)
                return EngineOk(self._report())
            self._shelf.require(request.adapter)
            self._load_back(request)
        except Exception as error:  # the engine's own code runs here: whatever broke, nothing may be served
            if not isinstance(error, BridgeError):
                log.exception("%s: the way back failed", self.id)
            self._quarantine(f"{request.reason}; then the way back failed: {error}")
            return EngineOk(self._report(error=self._detail))
        return EngineOk(self._report(error=request.reason))

    def _stands_at(self, request: EngineRestore) -> bool:
        """Nothing was written here, and what is served is what is to be returned to: an engine that has missed a commit
        must not serve what came before it."""
        if self._ranks.touched or self._standing.serving is None:
            return False
        if request.version is None:  # whoever asks has never brought anything
            return True
        return request.version == self._standing.serving and request.adapter == self._shelf.current

    def _load_back(self, request: EngineRestore) -> None:
        deadline = Deadline.after(request.timeout_s)
        if self._standing.state is not EngineState.STAGING:
            self._standing.move(EngineState.STAGING)
        if request.slot is None or request.version is None:
            raise EngineQuarantined("there is no previous version to return to", where=self.id)
        self._pause("abort", deadline)
        job = LoadJob(request.plan, request.slot, ("coverage", "read-back", "probe"))
        ranks = tuple(answer.report for answer in self._ranks.ask(job, RankLoaded, deadline))
        self._standing.move(EngineState.LOADED)
        raise_first_failure(self.id, ranks)
        self._outputs.require_former(request.version, deadline)
        self._standing.move(EngineState.VERIFIED)
        if self.adapter.can_generate and not self.adapter.reset_caches():
            raise EngineQuarantined("the engine refused to reset its caches", where=self.id)
        self._ranks.touched = False
        self._serve(request.version, request.adapter, deadline)

    def _quarantine(self, reason: str) -> None:
        log.error("%s is quarantined: %s", self.id, reason)
        self._standing.move(EngineState.QUARANTINED)
        self._detail = reason
        try:
            self.adapter.refuse(reason)
        except TransportError as error:  # it refuses here, and the report of it must not get lost
            self._detail = f"{reason}; and it could not be told to refuse: {error}"
            log.error("%s could not be told to refuse: %s", self.id, error)

    # ---- health, generation, end ------------------------------------------------------------------------------------

    def _check(self, request: EngineCheck) -> EngineChecked:
        if request.version is not None and self._standing.serving not in (None, request.version):
            raise Busy("another version serves meanwhile", where=self.id, got=str(self._standing.serving))
        deadline = Deadline.after(request.timeout_s)
        transfer: tuple[LevelResult, ...] = ()
        if "transfer" in request.levels:
            transfer = (self._arenas.transfer(request.plan, request.slot),)
        levels = tuple(level for level in request.levels if level in RANK_LEVELS)
        job = VerifyJob(request.plan, request.slot, levels, request.loaded)
        found = self._ranks.ask(job, RankLoaded, deadline)
        scores: Scores = ()
        if request.prompts and self.adapter.can_generate:
            with self._still(deadline):
                scores = self._outputs.scores(request.prompts, deadline, request.scored)
        return EngineChecked(tuple((*transfer, *answer.report.levels) for answer in found), scores)

    @contextmanager
    def _still(self, deadline: Deadline) -> Iterator[None]:
        """Log-probabilities past the scheduler take KV blocks that requests may hold: what runs is kept meanwhile."""
        serving = self._standing.state is EngineState.SERVING and self._paused_at is None
        if serving:
            try:
                self.adapter.pause("keep", deadline)
            except Exception:  # it may still fall asleep, or have closed its door
                self._go_on()
                raise
        try:
            yield
        finally:
            if serving:
                self._go_on()

    def _go_on(self) -> None:
        """Asked a second time; after that nobody may wait for it."""
        try:
            try:
                self.adapter.resume()
            except Exception as error:  # the engine's own code runs here
                log.warning("%s is asked once more to go on after an examination: %s", self.id, error)
                self.adapter.resume()
        except Exception as error:  # as above
            self._quarantine(f"lost after an examination: {error}")
            raise

    def _generate(self, request: EngineGenerate) -> EngineGenerated:
        if self._standing.state is EngineState.QUARANTINED:
            raise EngineQuarantined(
                "this engine holds weights that nobody verified and serves nothing",
                where=self.id,
                got=self._detail,
                remedy="push a version that verifies",
            )
        if self._standing.state is EngineState.STALE:
            raise ConfigError("this engine is stale and serves nothing until a verified push", where=self.id)
        if self.adapter.can_generate:
            require_fit(self.adapter, request.prompts)
        deadline = Deadline.after(request.timeout_s)
        completions = self.adapter.generate(request.prompts, request.sampling, request.adapter, deadline=deadline)
        return EngineGenerated(tuple(completions))

    def refuse_caller(self) -> None:
        """Raise ConfigError when this thread may not wait for the engine, because the engine would wait for it."""
        if isinstance(self.adapter, LivesInALoop):
            self.adapter.refuse_caller()

    def close(self) -> None:
        """Have the ranks let go of the arenas, release the mailbox, give the engine up. Idempotent."""
        said = self._arenas.close()
        if said is not None:
            log.warning("%s: its ranks did not let go of the arena: %s", self.id, said)
        self.adapter.close()
        self._ranks.close()


def _with_canary(report: EngineReport, drift: CanaryResult | None) -> EngineReport:
    return msgspec.structs.replace(report, canary=drift)
