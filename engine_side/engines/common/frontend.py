"""The frontend of an engine: code of ours in the process where the engine's requests arrive.

It holds requests during a push, refuses them while nobody knows what the weights are, lets the bridge's own requests
through, and remembers for the next bridge what was published. This is the part that is the same for every engine.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import socket
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Self

from bridge.daemon.processes import started_at
from bridge.errors import BridgeError, DeadlineExceeded, EngineQuarantined
from bridge.protocol.codec import Completion, ErrorInfo, pack, unpack
from bridge.protocol.coordinator_messages import Refused
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.claim import busy_error
from engine_side.engines.common.published_state import PublishedState

log = logging.getLogger(__name__)

HOLD_S = 60.0
"""Longest wait for requests that are on their way into the engine when a push begins."""
_KEY = "_weighbridge_front"
_WATCH_S = 0.5


class Frontend:
    """One per engine. Every method runs on the engine's event loop.

    Attributes:
        name: the engine's name in messages.
        published: what a bridge published last.
        reason: why requests are refused; None when they are not.
        jobs: number of rank jobs that have passed; counted by the code that lets them pass.
    """

    name: str

    def __init__(self) -> None:
        self.published = PublishedState()
        self.reason: str | None = None
        self.jobs = 0
        self._holder: msg.Claim | None = None
        self._visible = False
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, engine: Any) -> Self:
        """The frontend that hangs on this object of the engine; made at the first call."""
        found = vars(engine).get(_KEY)
        if not isinstance(found, cls):
            found = vars(engine)[_KEY] = cls(engine)  # type: ignore[call-arg]  # an engine's own class takes it
        return found

    # ---- the engine's part ---------------------------------------------------------------------------------------

    @abstractmethod
    def _facts(self) -> tuple[bytes, int]:
        """The engine's packed facts and number of frontend processes, as in `FrontendIdentity`."""

    @property
    @abstractmethod
    def _held(self) -> bool:
        """True while new requests wait."""

    @abstractmethod
    async def _list_loras(self) -> tuple[str, ...]:
        """Names of the loaded LoRAs, those of the bridge first."""

    @abstractmethod
    def _count_unfinished(self) -> int:
        """Number of requests inside the engine."""

    @abstractmethod
    async def _close_gate(self) -> None:
        """Make new requests wait, and wait until those that had passed are inside the engine. Idempotent."""

    @abstractmethod
    async def _open_gate(self) -> None:
        """Let waiting requests go on, or fail when there is a `reason`. Idempotent."""

    @abstractmethod
    async def _stop_engine(self) -> None:
        """Pause the engine, end its requests and mark its weight label as unknown."""

    @abstractmethod
    async def _resume_engine(self) -> None:
        """Let a paused engine run."""

    @abstractmethod
    async def _end_requests(self, loras: Iterable[str]) -> None:
        """End, as aborted, every request that uses one of these LoRAs."""

    @abstractmethod
    async def _retire_loras(self, loras: Iterable[str]) -> None:
        """Drop these LoRAs once no request uses them."""

    @abstractmethod
    async def _generate(self, request: msg.Generate) -> list[Completion]:
        """Sample for the bridge. Cancelled after `request.timeout_s`: it then ends what it has asked the engine for."""

    async def _publish(self, version: int, lora: str | None) -> None:
        self.published.version, self.published.lora = version, lora

    # ---- requests of a bridge ------------------------------------------------------------------------------------

    async def handle(self, request: msg.FrontendRequest) -> msg.FrontendReply:
        """Carry out one request of a driver. Raises errors of `bridge.errors`."""
        match request:
            case msg.Hello():
                return self._identify(request)
            case msg.GetState():
                return await self._state()
            case msg.Generate():
                try:
                    async with asyncio.timeout(request.timeout_s):
                        return msg.Completions(tuple(await self._generate(request)))
                except TimeoutError:
                    raise DeadlineExceeded(
                        "requests of the bridge did not finish",
                        where=self.name,
                        expected=f"within {request.timeout_s} s",
                        got="some still run",
                        remedy="raise the time limit, ask for fewer tokens, or look for a hung engine",
                    ) from None
            case msg.Claim():
                self._claim(request)
            case msg.GiveUp():
                if self._holder is not None and self._holder.token == request.token:
                    self._holder = None
            case msg.Hold():
                await self._hold()
                self.published.paused |= request.paused
            case msg.Release():
                await self._release()
                self.published.paused = False
            case msg.Refuse():
                await self.refuse(request.reason)
            case msg.EndRequests():
                await self._end_requests(request.loras)
            case msg.Retire():
                await self._retire_loras(request.loras)
            case msg.Publish():
                await self._publish(request.version, request.lora)
        return msg.FrontendDone()

    def _identify(self, request: msg.Hello) -> msg.FrontendIdentity:
        try:
            found = os.stat(request.file)
            sees = (found.st_dev, found.st_ino) == (request.device, request.inode)
        except OSError:
            sees = False
        return msg.FrontendIdentity(*self._facts(), sees, socket.gethostname())

    async def _state(self) -> msg.FrontendState:
        published, holder = self.published, self._holder
        return msg.FrontendState(
            version=published.version,
            lora=published.lora,
            paused=published.paused,
            held=self._held,
            refusal=self.reason,
            loras=await self._list_loras(),
            owner=holder.owner if holder is not None and self._is_alive(holder) else "",
            unfinished=self._count_unfinished(),
        )

    # ---- claim, hold, refusal ------------------------------------------------------------------------------------

    def _claim(self, request: msg.Claim) -> None:
        holder = self._holder
        if holder is not None and holder.token != request.token and self._is_alive(holder):
            raise busy_error(self.name, request.owner, holder.owner, holder.pid)
        self._holder, self._visible = request, started_at(request.pid) == request.started

    def _is_alive(self, holder: msg.Claim) -> bool:
        """False also for a process in another PID namespace, which cannot be watched: the last claim wins there."""
        return self._visible and started_at(holder.pid) == holder.started

    async def _hold(self) -> None:
        """Make new requests wait; running ones go on until the engine is paused. Idempotent."""
        try:
            async with asyncio.timeout(HOLD_S):
                await self._close_gate()
        except TimeoutError:
            raise DeadlineExceeded(
                "requests on their way into the engine did not arrive",
                where=self.name,
                expected=f"all inside within {HOLD_S:.0f} s",
                got="some are still on their way",
                remedy="look for a request whose tokenisation or preprocessing hangs, then push again",
            ) from None
        if self._watch is None and self._holder is not None and self._is_alive(self._holder):
            self._watch = asyncio.create_task(self._watch_holder(self._holder, self.jobs))

    async def _release(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        await self._open_gate()

    async def refuse(self, reason: str | None) -> None:
        """Refuse requests with `reason`, end those inside the engine and keep it paused; None lifts the refusal."""
        self.reason = reason
        if reason is None:
            return
        await self._release()
        self.published.paused = True
        await self._stop_engine()

    async def _watch_holder(self, holder: msg.Claim, jobs: int) -> None:
        """Wait, while requests are held, for the end of the bridge's process: then nobody would release them.

        `jobs` is the count when the hold began: if it is unchanged, the weights were not touched, and serving goes on.
        """
        while self._is_alive(holder):
            await asyncio.sleep(_WATCH_S)
        self._watch = None
        if self.jobs == jobs:
            log.warning("bridge %r died before it touched the weights; serving goes on", holder.owner)
            await self._resume_engine()
            self.published.paused = False
            await self._release()
            return
        log.error("bridge %r died in the middle of a push", holder.owner)
        await self.refuse(f"bridge {holder.owner!r} (process {holder.pid}) died in the middle of a push")


async def answer(find: Callable[[], Frontend], frame: str) -> str:
    """Have the frontend that `find` returns handle a request that came over HTTP: frame and reply are in base64. Never
    raises: an error, of `find` too, is the reply."""
    reply: msg.FrontendReply
    try:
        reply = await find().handle(unpack(base64.b64decode(frame), msg.FrontendRequest))
    except Exception as error:  # process boundary: the caller gets an answer, whatever broke
        if not isinstance(error, BridgeError):
            log.exception("a call of the bridge failed")
        reply = Refused(ErrorInfo.of(error))
    return base64.b64encode(pack(reply)).decode()


def quarantine_error(where: str, reason: str) -> EngineQuarantined:
    """The error for a request to an engine that refuses, with the reason given to `refuse`."""
    return EngineQuarantined(
        "this engine holds weights that nobody verified and serves nothing",
        where=where,
        expected="a version that was verified in this engine",
        got=reason,
        remedy="push a version that verifies",
    )
