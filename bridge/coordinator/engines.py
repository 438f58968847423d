"""Engines of one bridge: ask them side by side, and remember what they answered last."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from bridge.coordinator.versions import AgreedPlan, Held
from bridge.errors import REPORT, BridgeError, DeadlineExceeded, EngineQuarantined, PeerLost, ProtocolError
from bridge.model import canary
from bridge.model.engine_state import EngineState
from bridge.model.receipt import EngineReport
from bridge.ports import EnginePort
from bridge.protocol.codec import ErrorInfo
from bridge.protocol.coordinator_messages import EngineInfo, PlanRequest
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import (
    EngineClaim,
    EngineClose,
    EngineHello,
    EngineIs,
    EngineOk,
    EngineRan,
    EngineReadBack,
    EngineRun,
    EngineVersionZero,
    ToEngine,
)
from bridge.protocol.rank_jobs import (
    AnyJob,
    BakeJob,
    ForgetJob,
    RankBake,
    RankLoaded,
    ReadBackJob,
    VerifyJob,
)
from bridge.shm.seal import digest_slot, seal_slot

log = logging.getLogger(__name__)
T = TypeVar("T")

LOST_TIMEOUT_S = 3.0
"""How long an engine that has not answered is waited for when it is asked again: it may be hanging for good."""
ANSWER_GRACE_S = 1.0
"""A port has the same deadline, and its own error tells more: it is waited for a little longer."""
STATUS_WAIT_S = 0.1
"""How long a status waits for engines before it shows what they answered last."""
WEIGHTS_SHOWN = ("read-back", "probe")
"""Levels that compare live weights with an arena, whoever wrote them."""


class Fleet:
    """All engines of one bridge. Used by the coordinator's owner thread only, except for `infos`, `serving` and
    `current_infos`: those read one mapping that is replaced as a whole.

    Attributes:
        infos: what each engine answered last.
        floors: the canary's floor by engine: that of its coarsest dtype.
    """

    def __init__(self, engines: Sequence[EnginePort]) -> None:
        self.engines = tuple(engines)
        self.infos: Mapping[str, EngineInfo] = {}
        self.floors: dict[str, float] = {}
        self.turn = time.time_ns()  # a coordinator that was started again goes on above the turns of the last one
        self._asking_lock = threading.Lock()
        self._asking: dict[str, threading.Thread] = {}  # threads of `current_infos`

    # ---- fan-out ----------------------------------------------------------------------------------------------------

    def ask_each(
        self, requests: Mapping[str, ToEngine], reply: type[T], deadline: Deadline
    ) -> dict[str, T | BridgeError]:
        """Send each engine its request, side by side, and wait for all: the slowest decides, not the sum. Blocks. An
        error of ours becomes that engine's answer."""
        answers: dict[str, T | BridgeError] = {}
        asked = [port for port in self.engines if port.id in requests]
        if len(self.engines) == 1:  # nobody else waits for it: no thread is needed
            for port in asked:
                _ask(port, requests[port.id], reply, deadline, answers)
            return answers
        threads = [
            threading.Thread(target=_ask, args=(port, requests[port.id], reply, deadline, answers), daemon=True)
            for port in asked
        ]
        for thread in threads:
            thread.start()
        for port, thread in zip(asked, threads, strict=True):
            thread.join(deadline.remaining_s + ANSWER_GRACE_S)
            if thread.is_alive():
                late = DeadlineExceeded(
                    "an engine did not answer in time",
                    where=port.id,
                    expected="an answer before the deadline",
                    got="none",
                    remedy="look at its log",
                )
                answers.setdefault(port.id, late)
        return {port.id: answers[port.id] for port in asked}

    def ask_all(self, request: ToEngine, reply: type[T], deadline: Deadline) -> dict[str, T]:
        """Send every engine the same request. Raises the first engine's error."""
        answers = self.ask_each(dict.fromkeys((port.id for port in self.engines), request), reply, deadline)
        for answer in answers.values():
            if isinstance(answer, BridgeError):
                raise answer
        return {engine: answer for engine, answer in answers.items() if not isinstance(answer, BridgeError)}

    def run_all(self, job: AnyJob, reply: type[T], deadline: Deadline) -> dict[str, list[T]]:
        """Run one job in every rank of every engine: engine -> answers in rank order. Raises the first error."""
        out: dict[str, list[T]] = {}
        for engine, ran in self.ask_all(EngineRun(job), EngineRan, deadline).items():
            answers: list[T] = [answer for answer in ran.answers if isinstance(answer, reply)]
            out[engine] = answers
            if len(answers) != len(ran.answers):
                raise ProtocolError(
                    "ranks answered another job",
                    where=engine,
                    expected=reply.__name__,
                    got="another kind of answer",
                    remedy=REPORT,
                )
        return out

    # ---- who they are -----------------------------------------------------------------------------------------------

    @property
    def serving(self) -> dict[str, int | None]:
        """Engine -> version that it served when it was last heard of."""
        return {engine: info.serving for engine, info in self.infos.items()}

    def hello(self, deadline: Deadline) -> list[EngineInfo]:
        """Ask every engine for its facts and remember them. Raises the first error."""
        found = self.ask_all(EngineHello(), EngineIs, deadline)
        self.infos = {engine: answer.info for engine, answer in found.items()}
        return list(self.infos.values())

    def ask_infos(self, deadline: Deadline) -> dict[str, EngineInfo]:
        """Ask every engine for its facts and remember them; one that does not answer is shown as LOST."""
        found = self.ask_each(dict.fromkeys(self.infos, EngineHello()), EngineIs, deadline)
        self.infos = infos = {
            engine: _lost(self.infos[engine], answer) if isinstance(answer, BridgeError) else answer.info
            for engine, answer in found.items()
        }
        return infos

    def current_infos(self) -> tuple[EngineInfo, ...]:
        """Tell each engine's facts at once, from any thread: fresh where the engine answers within STATUS_WAIT_S, else
        the last known ones. An engine that still owes an earlier answer is not asked again."""
        answers: dict[str, EngineIs | BridgeError] = {}
        deadline = Deadline.after(STATUS_WAIT_S)
        with self._asking_lock:
            for port in self.engines:
                if port.id not in self._asking or not self._asking[port.id].is_alive():
                    asked = (port, EngineHello(), EngineIs, Deadline.after(LOST_TIMEOUT_S), answers)
                    self._asking[port.id] = threading.Thread(target=_ask, args=asked, daemon=True)
                    self._asking[port.id].start()
            waiting = list(self._asking.values())
        for thread in waiting:
            thread.join(deadline.remaining_s)
        infos = dict(self.infos)
        for engine, answer in list(answers.items()):
            if isinstance(answer, EngineIs):
                infos[engine] = answer.info
            elif not isinstance(answer, DeadlineExceeded):
                infos[engine] = _lost(infos[engine], answer)
        return tuple(infos.values())

    def claim(self, mailbox: str, owner: str, deadline: Deadline) -> None:
        """Claim every engine and give it its pages of the mailbox, in engine order. Raises Busy for an engine that
        another bridge drives."""
        page = 0
        for port in self.engines:
            port.call(EngineClaim(mailbox, page, owner), EngineIs, deadline)
            page += self.infos[port.id].ranks

    def not_serving(self, version: int | None) -> list[str]:
        """List engines that do not serve `version` (None: any), by what they answered last."""
        return [engine for engine, info in self.infos.items() if not _serves(info, version)]

    def require_serving(self, version: int | None) -> None:
        """Ask the engines of `not_serving` again, for a short while, since a LoRA adapter goes over weights that every
        engine serves. Raises PeerLost for one that is gone, EngineQuarantined for one that does not serve `version`."""
        hello = dict.fromkeys(self.not_serving(version), EngineHello())
        for engine, answer in self.ask_each(hello, EngineIs, Deadline.after(LOST_TIMEOUT_S)).items():
            if isinstance(answer, PeerLost):
                raise answer
            got = str(answer)
            if not isinstance(answer, BridgeError):
                self.infos = {**self.infos, engine: answer.info}
                if _serves(answer.info, version):
                    continue
                got = f"{answer.info.state}, version {answer.info.serving} {answer.info.detail}"
            raise EngineQuarantined(
                "this engine does not serve the weights that the adapter would go over",
                where=engine,
                expected="SERVING" if version is None else f"SERVING, version {version}",
                got=got.strip(),
                remedy="push the weights first: mode='base', then the adapter",
            )

    def note(self, report: EngineReport) -> None:
        """Remember an engine's state from its report."""
        info = msgspec.structs.replace(self.infos[report.id], state=report.state, serving=report.serving, detail="")
        self.infos = {**self.infos, report.id: info}

    # ---- plans and weights -------------------------------------------------------------------------------------------

    def bake(self, plan: int, request: PlanRequest, deadline: Deadline) -> dict[str, list[RankBake]]:
        """Have every rank plan a layout. Raises the first rank's IntegrityError for what does not fit."""
        job = BakeJob(plan, request.tensors, request.partial, request.lora, request.unsent)
        found = self.run_all(job, RankBake, deadline)
        for engine, ranks in found.items():
            if request.lora is None or engine not in self.floors:
                self.floors[engine] = canary.floor_for(
                    {d for rank in ranks for d in (*rank.dtypes.values(), *rank.codes)}
                )
        return found

    def forget(self, keep: tuple[int, ...], deadline: Deadline) -> None:
        """Have every rank let go of all plans but `keep`. An engine that does not answer keeps the old arena mapped,
        but can no longer load from it."""
        forget = dict.fromkeys(self.infos, EngineRun(ForgetJob(keep)))
        for engine, answer in self.ask_each(forget, EngineRan, deadline).items():
            if isinstance(answer, BridgeError):
                log.warning("%s still maps an older arena: %s", engine, answer)

    def differing_weights(self, plan: AgreedPlan, slot: int, deadline: Deadline) -> tuple[str, ...]:
        """Compare every engine's live weights with a slot, whatever was verified before: names of what differs."""
        found = self.run_all(VerifyJob(plan.id, slot, WEIGHTS_SHOWN), RankLoaded, deadline)
        levels = [level for ranks in found.values() for rank in ranks for level in rank.report.levels]
        failures = [failure for level in levels for failure in level.failures]
        return tuple(dict.fromkeys(failure.tensor or failure.name for failure in failures))

    def keep_current(self, plan: AgreedPlan, slot: int, held: Held | None, deadline: Deadline) -> Held | None:
        """Put the weights that the engines serve now into `slot`, sealed as the version of `held` (None: 0). None when
        they cannot be had, or when the engines do not all serve the same ones; a failing next push then ends in
        quarantine."""
        first, arena = self.engines[0], plan.arena
        arena.begin(slot)
        older = (held.plan.id, held.slot) if held is not None else (None, None)
        request = EngineReadBack(ReadBackJob(plan.id, slot), *older)
        answer = first.call(request, EngineVersionZero, deadline)
        if not answer.ok:
            log.warning("%s: what it serves cannot be kept for a rollback: %s", first.id, answer.reason)
            return None
        version = held.version if held is not None else 0
        kept = Held(version, plan, slot, seal_slot(arena, slot, version, digest_slot(arena, slot)))
        if len(self.engines) == 1 and answer.source == "live":
            return kept
        found = self.run_all(VerifyJob(plan.id, slot, WEIGHTS_SHOWN), RankLoaded, deadline)
        for engine, ranks in found.items():
            if not all(level.ok for rank in ranks for level in rank.report.levels):
                log.warning("%s serves other weights than this layout can hold for %s", engine, first.id)
                arena.begin(slot)
                return None
        return kept

    def close(self, deadline: Deadline) -> None:
        """Have every engine let go of its arenas. One that does not answer is logged and left."""
        for engine, answer in self.ask_each(dict.fromkeys(self.infos, EngineClose()), EngineOk, deadline).items():
            if isinstance(answer, BridgeError) and not isinstance(answer, PeerLost):
                log.warning("%s did not close: %s", engine, answer)


def _ask(
    port: EnginePort, request: ToEngine, reply: type[T], deadline: Deadline, into: dict[str, T | BridgeError]
) -> None:
    try:
        into[port.id] = port.call(request, reply, deadline)
    except BridgeError as error:
        into[port.id] = error
    except Exception as error:  # thread boundary: whatever broke, the engine has an answer
        log.exception("%s: %s failed", port.id, type(request).__name__)
        into[port.id] = ErrorInfo.of(error).rebuild(port.id)


def _serves(info: EngineInfo, version: int | None) -> bool:
    return info.state == EngineState.SERVING.value and version in (None, info.serving)


def _lost(last: EngineInfo, error: BridgeError) -> EngineInfo:
    return EngineInfo(last.id, last.kind, last.ranks, False, "LOST", None, "?", 0, str(error))
