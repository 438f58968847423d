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
from collections.abc import Iterable
from pathlib import Path

import msgspec

from bridge.errors import (
    REPORT,
    BridgeError,
    Busy,
    CanaryMismatch,
    ConfigError,
    DeadlineExceeded,
    EngineQuarantined,
    ProtocolError,
    TransportError,
)
from bridge.model.engine_state import TRANSITIONS, EngineState
from bridge.model.receipt import CanaryResult, EngineReport, LevelResult, RankReport
from bridge.protocol import engine_messages as msg
from bridge.protocol.codec import ErrorInfo
from bridge.protocol.coordinator_messages import EngineInfo
from bridge.protocol.deadline import Deadline
from bridge.protocol.rank_jobs import ForgetJob, RankLoaded, Scores
from engine_side.driver.arenas import Arenas
from engine_side.driver.level_errors import canary_error, level_error
from engine_side.driver.lora_versions import LoraVersions
from engine_side.driver.output_checks import OutputChecks
from engine_side.driver.prompt_checks import require_fit
from engine_side.driver.quantised_trial import require_strategies
from engine_side.driver.rank_client import RankClient
from engine_side.protocol import EmptiesCaches, EngineDriver, LivesInALoop

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
"""How long ranks are waited for when a service closes."""


class Standing:
    """Keeps the state of one engine and the version that it serves; owned by the engine's service."""

    def __init__(self, engine: str, state: EngineState = EngineState.STALE, serving: int | None = None) -> None:
        self.engine = engine
        self.state = state
        self.serving = serving
        """The version that it serves; None: no verified one."""

    def move(self, to: EngineState, serving: int | None = None) -> None:
        """Go to another state.

        Args:
            serving: the version served from now on; None keeps the present one. A quarantined engine serves none.

        Raises ProtocolError for a step that is not in TRANSITIONS, or for SERVING without a version; then nothing has
        changed.
        """
        if to not in TRANSITIONS[self.state]:
            raise ProtocolError(
                "an engine cannot go from this state to that one", where=self.engine,
                expected=f"{self.state.name} -> {', '.join(state.name for state in TRANSITIONS[self.state])}",
                got=to.name, remedy=REPORT
            )  # fmt: skip
        version = self.serving if serving is None else serving
        if to is EngineState.SERVING and version is None:
            raise ProtocolError(
                "an engine cannot serve without a version",
                where=self.engine,
                expected="a version",
                got="none",
                remedy=REPORT,
            )
        self.state = to
        self.serving = None if to is EngineState.QUARANTINED else version


class EngineService:
    """Serves one engine. `handle` is called by the coordinator, one request at a time except EngineGenerate and
    EngineHello, which may come from any thread at any time."""

    def __init__(self, engine_id: str, driver: EngineDriver, *, node: str, threads: int = 1) -> None:
        self.id = engine_id
        self.driver = driver
        self._node = node
        self._detail = driver.refusal or ""
        if self._detail:
            self._standing = Standing(engine_id, EngineState.QUARANTINED)
        else:
            self._standing = Standing(engine_id, EngineState.SERVING, 0)  # its own checkpoint is version 0
        self._busy = threading.RLock()
        self._turn = 0
        self._ranks = RankClient(engine_id, driver)
        self._arenas = Arenas(engine_id, threads, self._ranks)
        self._paused_at: float | None = None
        self._pause_s = 0.0
        self._outputs = OutputChecks(engine_id, driver, self._ranks)
        self._loras = LoraVersions(driver, self._ranks)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def handle(self, request: msg.ToEngine, deadline: Deadline) -> msg.FromEngine:
        """Answer one request. Blocks, at most until the deadline as far as the engine lets go. Raises errors of our
        tree; anything else is a bug, and is raised as a BridgeError that says so."""
        try:
            if isinstance(request, msg.EngineGenerate):
                return self._generate(request)
            if isinstance(request, msg.EngineHello):
                return msg.EngineIs(self._info())  # a question never waits for a push
            if not self._busy.acquire(blocking=False):
                self._wait_for_turn(request, deadline)
            try:
                return self._answer(request, deadline)
            finally:
                self._busy.release()
        except BridgeError:
            raise
        except Exception as error:  # process boundary: the coordinator must get an answer whatever broke here
            log.exception("request %s failed", type(request).__name__)
            raise ErrorInfo.of(error).rebuild(self.id) from error

    def _wait_for_turn(self, request: msg.ToEngine, deadline: Deadline) -> None:
        """Wait until the request before this one has ended. Raises DeadlineExceeded when that takes too long."""
        # a way back has time of its own, counted from its turn: the load that made it necessary may still run
        seconds = request.timeout_s if isinstance(request, msg.EngineRestore) else deadline.remaining_s
        if not self._busy.acquire(timeout=min(seconds, threading.TIMEOUT_MAX)):
            raise DeadlineExceeded(
                "the engine is still busy with an earlier request", where=self.id,
                expected=f"free within {seconds:.1f} s", got="a request that hangs or takes longer",
                remedy="look for a hung engine in its log, or raise the time-out",
            )  # fmt: skip

    def _answer(self, request: msg.ToEngine, deadline: Deadline) -> msg.FromEngine:
        if isinstance(request, msg.EngineLoad | msg.EngineCommit | msg.EngineResume | msg.EngineRestore):
            if request.turn < self._turn:
                raise ProtocolError(
                    "asked for in a push that has ended", where=self.id, expected=f"turn {self._turn}",
                    got=f"turn {request.turn}", remedy="push again",
                )  # fmt: skip
            self._turn = request.turn
        match request:
            case msg.EngineLoad():
                return self._load(request, deadline)
            case msg.EngineCommit():
                return self._commit(request, deadline)
            case msg.EngineResume():
                return self._resume(request, deadline)
            case msg.EngineRestore():
                return self._restore(request)
            case msg.EngineRun():
                return msg.EngineRan(tuple(self._arenas.run(request.job, deadline)))
            case msg.EngineReadBack():
                return self._read_back(request, deadline)
            case msg.EngineCheck():
                return self._check(request, deadline)
            case msg.EngineClaim():
                return self._claim(request, deadline)
            case msg.EngineClose():
                self.close()
        return msg.EngineOk(self._report())

    def _claim(self, request: msg.EngineClaim, deadline: Deadline) -> msg.EngineIs:
        self.driver.claim(request.owner)
        self._ranks.assign(Path(request.mailbox), request.page)
        try:
            require_strategies(self.id, self.driver, self._ranks, deadline)
        except BaseException:
            self._ranks.close()
            self.driver.close()
            raise
        return msg.EngineIs(self._info())

    def _info(self) -> EngineInfo:
        driver = self.driver
        return EngineInfo(
            id=self.id,
            kind=driver.kind,
            ranks=driver.ranks,
            can_generate=driver.can_generate,
            state=self._standing.state.value,
            serving=self._standing.serving,
            node=self._node,
            pid=os.getpid(),
            detail=self._detail,
            max_prompt=driver.max_prompt,
            lora=driver.lora,
            adapter=self._loras.current,
            adapters=tuple(sorted(self._loras.loaded)),
            losses=self._outputs.noise.losses,
            noise=self._outputs.noise.measured,
        )

    def _report(
        self, ranks: tuple[RankReport, ...] = (), error: str | None = None, drift: CanaryResult | None = None,
        lora: str | None = None,
    ) -> EngineReport:  # fmt: skip
        state, serving = self._standing.state.value, self._standing.serving
        return EngineReport(self.id, state, serving, ranks, drift, lora, self._pause_s, error)

    def _read_back(self, request: msg.EngineReadBack, deadline: Deadline) -> msg.EngineVersionZero:
        if self._standing.state is not EngineState.SERVING:
            reason = f"it is {self._standing.state.value}: nobody verified what it holds"
            return msg.EngineVersionZero(False, "none", reason)
        return self._arenas.read_back(request, self.driver.checkpoint, deadline)

    # ---- load and verify --------------------------------------------------------------------------------------------

    def _load(self, request: msg.EngineLoad, deadline: Deadline) -> msg.EngineLoaded:
        # an engine that hung may still be in the middle of the push before this one: what it wrote then still counts
        self._ranks.touched &= self._standing.state is not EngineState.SERVING
        lora, settings = request.job.lora, request.job.settings
        phases: dict[str, float] = {}
        ranks: tuple[RankReport, ...] = ()
        drift: CanaryResult | None = None
        written = False
        if lora is not None:
            self._require_weights()
        if self._standing.state is not EngineState.STAGING:
            self._standing.move(EngineState.STAGING)
        outputs = self.driver.can_generate and bool({"canary", "cache"} & set(settings.levels))
        try:
            if self._loras.staged is not None:  # committed by others: this engine never resumed with it
                self._loras.settle()
            if request.keeps is not None:
                self._loras.require(request.keeps)
            started = time.perf_counter()
            ranks = self._arenas.stage(request, self.driver.ranks)
            phases["transfer"] = time.perf_counter() - started
            self._require_passed(ranks)
            serving = self._standing.serving
            if outputs and (lora is None or not self._loras.lost):
                self._outputs.warm_cache(request, serving, deadline)
            self._pause(settings.inflight, deadline)
            if lora is None and self._loras.ours:
                self._loras.end_others(request.keeps)
            if outputs:
                self._outputs.remember(request, serving, deadline)
            written = True
            ranks, notes = self._write(request, ranks, phases, deadline)
            self._standing.move(EngineState.LOADED)
            self._require_passed(ranks)
            if outputs:
                started = time.perf_counter()
                drift = self._outputs.canary(request, deadline)
                phases["verify"] += time.perf_counter() - started
            if drift is not None and not drift.ok:
                raise canary_error(self.id, drift, self._outputs.noise.losses)
            if drift is not None and not drift.conclusive:
                notes = (*notes, self._outputs.noise.inconclusive(drift))
            self._standing.move(EngineState.VERIFIED)
        except BridgeError as error:
            report = self._report(ranks, str(error), drift)
            touched = self._ranks.touched or (written and lora is not None)
            return msg.EngineLoaded(report, touched, ErrorInfo.of(error), phases)
        gone = self._why_caches_go() if settings.kv == "keep" else None
        notes = notes if gone is None else (*notes, f"kv='keep': {self.id} kept no KV or prefix cache: {gone}")
        return msg.EngineLoaded(self._report(ranks, None, drift, lora), True, None, phases, notes)

    def _why_caches_go(self) -> str | None:
        """Tell what empties the caches of an engine that cannot keep them over a push; None for one that can."""
        return self.driver.why_caches_go if isinstance(self.driver, EmptiesCaches) else None

    def _require_weights(self) -> None:
        """Refuse an adapter over weights that nobody verified."""
        if self._standing.serving is None or self._standing.state is EngineState.STALE:
            raise EngineQuarantined(
                "this engine serves no weights that an adapter could go over",
                where=self.id,
                expected="an engine that serves",
                got=f"{self._standing.state.value} {self._detail}".strip(),
                remedy="push the weights first: mode='base'",
            )

    def _require_passed(self, ranks: Iterable[RankReport]) -> None:
        """Raise the error of the first failed level, by rank."""
        for report in ranks:
            for level in report.levels:
                if not level.ok:
                    raise level_error(self.id, report.rank, level)

    def _write(
        self, request: msg.EngineLoad, staged: tuple[RankReport, ...], phases: dict[str, float], deadline: Deadline
    ) -> tuple[tuple[RankReport, ...], tuple[str, ...]]:
        """Load and verify on every rank: their reports over the staged ones, and notes for the receipt."""
        job = request.job
        self._loras.staged = job.lora
        loaded = [answer.report for answer in self._ranks.ask(job, RankLoaded, deadline)]
        notes: tuple[str, ...] = ()
        failed = [report for report in loaded if not all(level.ok for level in report.levels)]
        if failed and all(report.skipped_only for report in failed):
            # only tensors that this load skipped as unchanged are wrong: something wrote to them since. Load them all.
            notes = (f"{self.id} did not hold what it was given before; everything was loaded anew",)
            log.warning(notes[0])
            job = msgspec.structs.replace(job, changed=None)
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
        self.driver.pause(inflight, deadline)

    def _commit(self, request: msg.EngineCommit, deadline: Deadline) -> msg.EngineOk:
        if self._standing.state is not EngineState.VERIFIED:
            raise ProtocolError(
                "a commit of a version that was not verified",
                where=self.id,
                expected="VERIFIED",
                got=self._standing.state.value,
                remedy=REPORT,
            )
        settings, driver = request.settings, self.driver
        level: LevelResult | None = None
        if settings.kv == "reset" and driver.can_generate:
            # what was cached under another adapter's name stays true: only new weights make it stale
            staged = self._loras.staged
            answered = staged is not None or driver.reset_caches()
            if "cache" in settings.levels:
                level = self._outputs.check_cache(answered, deadline, staged)
            elif not answered:
                raise CanaryMismatch(
                    "the engine refused to reset its caches",
                    where=self.id,
                    expected="True from the engine",
                    got="False",
                    remedy="push again when no request runs in it, or start the engine anew",
                )
        elif "cache" in settings.levels:
            why = self._why_caches_go() or "caches hold what the version before computed"
            why = f"kv='keep': {why}" if driver.can_generate else "no cache"
            level = LevelResult("cache", True, 0, note=why)
        ranks = () if level is None else (RankReport(0, (level,)),)
        self._require_passed(ranks)
        return msg.EngineOk(self._report(ranks))

    def _resume(self, request: msg.EngineResume, deadline: Deadline) -> msg.EngineOk:
        if self._standing.state is not EngineState.VERIFIED:
            raise ProtocolError(
                "a resume of a version that was not verified",
                where=self.id,
                expected="VERIFIED",
                got=self._standing.state.value,
                remedy=REPORT,
            )
        if self.driver.can_generate:
            self._outputs.note_served(request.version)
        try:
            self._serve(request.version, request.lora, deadline)
        except TransportError as error:  # nobody may wait at the gate of an engine that does not answer
            self._quarantine(f"lost when version {request.version} was to be served: {error}")
            return msg.EngineOk(self._report(error=self._detail))
        return msg.EngineOk(self._report())

    def _serve(self, version: int, lora: str | None, deadline: Deadline) -> None:
        """Publish, resume, and retire adapters of earlier pushes. A connection that broke is tried a second time,
        since an engine may only have been late; one that is gone fails again."""
        for attempt in (1, 2):
            try:
                self._loras.publish(version, lora)
                self.driver.refuse(None)
                self.driver.resume()
                if self._paused_at is not None:
                    self._pause_s = time.perf_counter() - self._paused_at
                    self._paused_at = None
                if self._standing.state is not EngineState.SERVING:  # it is, if only the tidying failed
                    self._standing.move(EngineState.SERVING, version)
                self._detail = ""
                self._loras.tidy()
                return
            except TransportError as error:
                if attempt == 2 or deadline.expired:
                    raise
                log.warning("%s is asked once more to serve version %d: %s", self.id, version, error)

    # ---- put back ---------------------------------------------------------------------------------------------------

    def _restore(self, request: msg.EngineRestore) -> msg.EngineOk:
        """Serve the previous version again, proven by bits or probes, or nothing at all."""
        deadline = Deadline.after(request.timeout_s)
        try:
            self._loras.drop(deadline, keep=request.lora)
            if self._stands_at(request):
                if self._standing.state is EngineState.LOADED:
                    self._standing.move(EngineState.STAGING)  # an adapter that did not pass: the weights never moved
                if self._standing.state is not EngineState.SERVING:
                    self._serve(self._standing.serving or 0, self._loras.current, deadline)
                return msg.EngineOk(self._report())
            if request.lora is not None:
                self._loras.require(request.lora)
            self._load_back(request, deadline)
        except Exception as error:  # the engine's own code runs here: whatever broke, nothing may be served
            if not isinstance(error, BridgeError):
                log.exception("%s: the way back failed", self.id)
            self._quarantine(f"{request.reason}; then the way back failed: {error}")
            return msg.EngineOk(self._report(error=self._detail))
        return msg.EngineOk(self._report(error=request.reason))

    def _stands_at(self, request: msg.EngineRestore) -> bool:
        """True when nothing was written here and the engine serves what it should return to. An engine that has missed
        a commit must not serve what came before it."""
        if self._ranks.touched or self._standing.serving is None:
            return False
        if request.version is None:  # this coordinator has never brought anything
            return True
        return request.version == self._standing.serving and request.lora == self._loras.current

    def _load_back(self, request: msg.EngineRestore, deadline: Deadline) -> None:
        if self._standing.state is not EngineState.STAGING:
            self._standing.move(EngineState.STAGING)
        if request.job is None or request.version is None:
            raise EngineQuarantined(
                "there is no previous version to return to",
                where=self.id,
                expected="a version that a push of this bridge brought",
                got="none",
                remedy="push a version that verifies",
            )
        self._pause("abort", deadline)
        ranks = tuple(answer.report for answer in self._ranks.ask(request.job, RankLoaded, deadline))
        self._standing.move(EngineState.LOADED)
        self._require_passed(ranks)
        self._outputs.require_former(request.version, deadline)
        self._standing.move(EngineState.VERIFIED)
        if self.driver.can_generate and not self.driver.reset_caches():
            raise EngineQuarantined(
                "the engine refused to reset its caches",
                where=self.id,
                expected="True from the engine",
                got="False",
                remedy="push once more",
            )
        self._ranks.touched = False
        self._serve(request.version, request.lora, deadline)

    def _quarantine(self, reason: str) -> None:
        log.error("%s is quarantined: %s", self.id, reason)
        self._standing.move(EngineState.QUARANTINED)
        self._detail = reason
        try:
            self.driver.refuse(reason)
        except TransportError as error:  # the service refuses all the same, and its report must not get lost
            self._detail = f"{reason}; and it could not be told to refuse: {error}"
            log.error("%s could not be told to refuse: %s", self.id, error)

    # ---- health, generation, end ------------------------------------------------------------------------------------

    def _check(self, request: msg.EngineCheck, deadline: Deadline) -> msg.EngineChecked:
        if self._standing.serving not in (None, request.version):
            raise Busy(
                "another version serves meanwhile", where=self.id, expected=f"version {request.version}",
                got=f"version {self._standing.serving}", remedy="examine it again",
            )  # fmt: skip
        transfer: tuple[LevelResult, ...] = ()
        if "transfer" in request.job.levels:
            transfer = (self._arenas.check_level(request.job.plan, request.job.slot),)
        found = self._ranks.ask(request.job, RankLoaded, deadline)
        scores: Scores = ()
        if request.prompts and self.driver.can_generate:
            scores = self._examine(request, deadline)
        return msg.EngineChecked(tuple((*transfer, *answer.report.levels) for answer in found), scores)

    def _examine(self, request: msg.EngineCheck, deadline: Deadline) -> Scores:
        """Compute prompt log-probabilities. A serving engine is paused for it, keeping its requests: they take KV
        blocks that running requests may hold."""
        serving = self._standing.state is EngineState.SERVING and self._paused_at is None
        try:
            if serving:  # one that raises may still fall asleep, or have closed its gate
                self.driver.pause("keep", deadline)
            return self._outputs.scores(request.prompts, deadline, request.scored)
        finally:
            if serving:
                self._end_examination()

    def _end_examination(self) -> None:
        """Resume after an examination; tried a second time, and then nobody may wait for the engine."""
        try:
            try:
                self.driver.resume()
            except Exception as error:  # the engine's own code runs here
                log.warning("%s is asked once more to resume after an examination: %s", self.id, error)
                self.driver.resume()
        except Exception as error:  # as above
            self._quarantine(f"lost after an examination: {error}")
            raise

    def _generate(self, request: msg.EngineGenerate) -> msg.EngineGenerated:
        if self._standing.state is EngineState.QUARANTINED:
            raise EngineQuarantined(
                "this engine holds weights that nobody verified and serves nothing",
                where=self.id,
                expected="a verified version",
                got=self._detail,
                remedy="push a version that verifies",
            )
        if self._standing.state is EngineState.STALE:
            raise ConfigError(
                "this engine is stale and serves nothing until a verified push",
                where=self.id,
                expected="a verified version",
                got="what it was started with",
                remedy="push once",
            )
        if self.driver.can_generate:
            require_fit(self.driver, request.prompts)
        deadline = Deadline.after(request.timeout_s)
        completions = self.driver.generate(request.prompts, request.sampling, request.adapter, deadline=deadline)
        return msg.EngineGenerated(tuple(completions))

    def refuse_caller(self) -> None:
        """Raise ConfigError when this thread may not wait for the engine, because the engine would wait for it."""
        if isinstance(self.driver, LivesInALoop):
            self.driver.refuse_caller()

    def close(self) -> None:
        """Have the ranks let go of the arenas, release the mailbox, give the engine up. Idempotent."""
        if self._arenas:
            try:
                self._ranks.run(ForgetJob(), Deadline.after(CLOSE_TIMEOUT_S))
            except BridgeError as error:
                log.warning("%s: its ranks did not let go of the arena: %s", self.id, error)
        self._arenas.close_all_but(())
        self.driver.close()
        self._ranks.close()
