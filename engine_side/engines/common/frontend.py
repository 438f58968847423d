"""What stands in front of an engine, in the process where its requests come in: holds them during a push, refuses them
afterwards if need be, lets the bridge's own through, and keeps the books for whichever bridge comes next.

This is the part that does not depend on the engine.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import socket
from abc import abstractmethod
from collections.abc import Iterable

from bridge.daemon.processes import started_at
from bridge.errors import BridgeError, Busy, EngineQuarantined
from bridge.protocol.codec import Completion, ErrorInfo, pack, unpack
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.published_state import PublishedState

log = logging.getLogger(__name__)

_WATCH_S = 0.5


class Frontend:
    """One per engine. Every method runs on the engine's event loop.

    Attributes:
        reason: why requests are refused; None when they are not.
        jobs: how many jobs for the ranks came by; whoever lets them pass counts them.
    """

    name: str
    books: PublishedState

    def __init__(self) -> None:
        self.reason: str | None = None
        self.jobs = 0
        self._holder: msg.Claim | None = None
        self._visible = False
        self._watch: asyncio.Task[None] | None = None

    # ---- what the engine fills in --------------------------------------------------------------------------------

    @abstractmethod
    def _facts(self) -> tuple[str, bytes, int]:
        """Version, facts and number of processes that take requests in, as `FrontendIdentity` has them."""

    @property
    @abstractmethod
    def _held(self) -> bool:
        """Do new requests wait?"""

    @abstractmethod
    async def _adapters(self) -> tuple[str, ...]: ...

    @abstractmethod
    def _unfinished(self) -> int: ...

    @abstractmethod
    async def _close(self) -> None:
        """From now on callers wait, and whoever was on the way in has arrived. Idempotent."""

    @abstractmethod
    async def _open(self) -> None:
        """Those who wait go on, or are refused when there is a reason. Idempotent."""

    @abstractmethod
    async def _stop(self) -> None:
        """Pause the engine for good and end what is inside; its label says that nobody knows the weights."""

    @abstractmethod
    async def _go_on(self) -> None:
        """Let the engine run again, as it was."""

    @abstractmethod
    async def _end(self, adapters: Iterable[str]) -> None: ...

    @abstractmethod
    async def _retire(self, adapters: Iterable[str]) -> None: ...

    @abstractmethod
    async def _generate(self, request: msg.Generate) -> list[Completion]: ...

    async def _published(self, version: int, adapter: str | None) -> None:
        self.books.version, self.books.adapter = version, adapter

    # ---- what a bridge asks --------------------------------------------------------------------------------------

    async def answer(self, frame: str) -> str:
        """`handle` for a frame in base64, as it comes through HTTP. Never raises."""
        try:
            reply = await self.handle(unpack(base64.b64decode(frame), msg.FrontendRequest))
        except Exception as error:  # process boundary: the asker is told, whatever broke
            if not isinstance(error, BridgeError):
                log.exception("a call of the bridge failed")
            return failed(error)
        return base64.b64encode(pack(reply)).decode()

    async def handle(self, request: msg.FrontendRequest) -> msg.FrontendReply:
        """Answer one request. Raises our errors."""
        match request:
            case msg.Hello():
                return self._hello(request)
            case msg.GetState():
                return await self._state()
            case msg.Generate():
                return msg.Completions(tuple(await self._generate(request)))
            case msg.Claim():
                self._claim(request)
            case msg.GiveUp():
                if self._holder is not None and self._holder.token == request.token:
                    self._holder = None
            case msg.Hold():
                await self._hold()
            case msg.Release():
                await self._release()
            case msg.Refuse():
                await self.refuse(request.reason)
            case msg.EndRequests():
                await self._end(request.adapters)
            case msg.Note():
                self.books.paused = request.paused
            case msg.Publish():
                await self._published(request.version, request.adapter)
            case msg.Retire():
                await self._retire(request.adapters)
        return msg.FrontendDone()

    def _hello(self, request: msg.Hello) -> msg.FrontendIdentity:
        try:
            found = os.stat(request.file)
            sees = (found.st_dev, found.st_ino) == (request.device, request.inode)
        except OSError:
            sees = False
        return msg.FrontendIdentity(*self._facts(), sees, socket.gethostname())

    async def _state(self) -> msg.FrontendState:
        books, holder = self.books, self._holder
        driven = holder is not None and self._alive(holder)
        return msg.FrontendState(
            version=books.version,
            adapter=books.adapter,
            paused=books.paused,
            held=self._held,
            refusal=self.reason,
            adapters=await self._adapters(),
            owner=holder.owner if holder is not None and driven else "",
            unfinished=self._unfinished(),
        )

    # ---- who drives ----------------------------------------------------------------------------------------------

    def _claim(self, request: msg.Claim) -> None:
        holder = self._holder
        if holder is not None and holder.token != request.token and self._alive(holder):
            raise Busy(
                "another bridge drives this engine",
                where=f"{self.name}, asked for by bridge {request.owner!r}",
                expected="one bridge per engine: two of them would weigh one engine against two arenas",
                got=f"it is attached to bridge {holder.owner!r} of process {holder.pid}",
                remedy=f"close bridge {holder.owner!r} first",
            )
        self._holder, self._visible = request, started_at(request.pid) == request.started

    def _alive(self, holder: msg.Claim) -> bool:
        """A process that cannot be seen from here was never seen: then the last one to come drives."""
        return self._visible and started_at(holder.pid) == holder.started

    async def _hold(self) -> None:
        """What is in flight goes on until the engine itself is paused. Idempotent."""
        await self._close()
        if self._watch is None and self._holder is not None and self._alive(self._holder):
            self._watch = asyncio.create_task(self._guard(self._holder, self.jobs))

    async def _release(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        await self._open()

    async def refuse(self, reason: str | None) -> None:
        """What runs or waits inside the engine is ended too, and the engine stays paused."""
        self.reason = reason
        if reason is None:
            return
        await self._release()
        self.books.paused = True
        await self._stop()

    def check_open(self) -> None:
        """Raises EngineQuarantined while the engine refuses."""
        if self.reason is not None:
            raise quarantined(self.name, self.reason)

    async def _guard(self, holder: msg.Claim, jobs: int) -> None:
        """While requests are held: a bridge whose process dies leaves nobody who knows what the weights are."""
        while self._alive(holder):
            await asyncio.sleep(_WATCH_S)
        self._watch = None
        if self.jobs == jobs:
            log.warning("bridge %r died before it touched the weights; serving goes on", holder.owner)
            await self._go_on()
            self.books.paused = False
            await self._release()
            return
        log.error("bridge %r died in the middle of a push", holder.owner)
        await self.refuse(f"bridge {holder.owner!r} (process {holder.pid}) died in the middle of a push")


def failed(error: Exception) -> str:
    """What `answer` says of an error."""
    return base64.b64encode(pack(msg.FrontendFailed(ErrorInfo.of(error)))).decode()


def quarantined(where: str, reason: str) -> EngineQuarantined:
    return EngineQuarantined(
        "this engine holds weights that nobody verified and serves nothing",
        where=where,
        got=reason,
        remedy="push a version that verifies",
    )
