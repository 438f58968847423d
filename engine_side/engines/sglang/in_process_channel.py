"""The event loop of one `sglang.Engine`, usable from every thread while a bridge is attached.

An Engine runs its loop only inside its own blocking calls, and two threads that call it at once fail. While the line
stands, a thread keeps the loop running and the engine's blocking calls wait for it instead.
"""

from __future__ import annotations

import asyncio
import threading
from asyncio.mixins import _LoopBoundMixin
from collections.abc import Awaitable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from bridge.errors import ConfigError, DeadlineExceeded, PeerLost, ProtocolError
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.sglang.loop_proxy import Relay
from engine_side.engines.sglang.scheduler import ACTION

T = TypeVar("T")
_KEY = "_weighbridge_line"
_LOOK_S = 0.5
"""How often a wait looks whether the other side is still there."""
_END_S = 10.0
_WALKED = frozenset({"sglang", "asyncio", "engine_side"})
"""Whose objects may keep something that is bound to a loop."""


class Shared:
    """Stands for the loop in `engine.loop`: what would run it waits for it."""

    def __init__(self, line: LoopLine) -> None:
        self._line = line

    def run_until_complete(self, future: Awaitable[T]) -> T:
        return self._line.run(_awaited(future))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._line.loop, name)


class LoopLine:
    """One per engine object, by `LoopLine.of`; `users` adapters keep it up."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._manager = engine.tokenizer_manager
        self.loop = _bound(engine)
        self._relay = Relay(self._manager, self)
        self._users = 0
        self._keeper: threading.Thread | None = None
        self._former: Any = None
        self._own = False
        self._moving = threading.Lock()

    @classmethod
    def of(cls, engine: Any) -> LoopLine:
        found = vars(engine).get(_KEY)
        if not isinstance(found, LoopLine):
            found = vars(engine)[_KEY] = cls(engine)
        return found

    def take(self) -> None:
        """One adapter more. The first sees to it that the loop runs: a caller's own that does is left to it."""
        self._users += 1
        if self._users > 1:
            return
        self._former, self._engine.loop = self._engine.loop, Shared(self)
        self._relay.put_up()
        self.home()

    def give_up(self) -> None:
        """One less; with the last the engine has its loop back. Whoever waits in it from another loop is told."""
        self._users -= 1
        if self._users:
            return
        self._relay.take_down()
        try:
            if self._keeper is not None:
                self._end_keeper()
        finally:
            self._engine.loop = self._former
            vars(self._engine).pop(_KEY, None)

    def home(self) -> asyncio.AbstractEventLoop:
        """The loop in which the manager runs, running. A loop of the caller's that was closed meanwhile
        (`asyncio.run` does) is given up for another one, one that has stopped is kept running."""
        with self._moving:
            if self._keeper is not None or self.loop.is_running():
                return self.loop
            if self.loop.is_closed():
                self._own = not _usable(self._former)
                self.loop = asyncio.new_event_loop() if self._own else self._former
                unbind(self._manager)
            started = threading.Event()
            self.loop.call_soon(started.set)
            self._keeper = threading.Thread(target=self._keep, name="weighbridge-sglang", daemon=True)
            self._keeper.start()
            started.wait()
            return self.loop

    def _keep(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        if self._own:  # nobody else knows it: who calls next brings a loop
            self.loop.run_until_complete(_end_tasks(self._manager))
            self.loop.close()
            unbind(self._manager)

    def _end_keeper(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is None or self.loop.is_closed():
            return
        if keeper.is_alive():
            wait([asyncio.run_coroutine_threadsafe(self._relay.end(), self.loop)], timeout=_END_S)
            self.loop.call_soon_threadsafe(self.loop.stop)
            keeper.join()

    def refuse_caller(self) -> None:
        """Raises ConfigError when this thread runs the engine's loop."""
        if _running() is self.home():
            raise ConfigError(
                "a call of the bridge blocks, and this thread runs the engine's event loop",
                where="sglang.Engine",
                remedy="call it from another thread: await asyncio.to_thread(b.push, ...)",
            )

    def run(
        self, work: Coroutine[Any, Any, T], deadline: Deadline | None = None, what: str = "a call", *, end: bool = True
    ) -> T:
        """Run in the loop and wait. Raises what `work` raises, DeadlineExceeded (`end`: which ends the work), PeerLost
        when the engine's processes are gone, ConfigError when called from the loop's own thread, which would wait for
        itself."""
        try:
            self.refuse_caller()
        except ConfigError:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, self.home())
        self._wait(future, deadline, what, end)
        return future.result()

    # ---- what `remote.Line` asks for -----------------------------------------------------------------------------

    def ask(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        what, end = f"{type(request).__name__} of SGLang's front", not isinstance(request, msg.Refuse)
        return self.run(self._asked(request), deadline, what, end=end)

    async def _asked(self, request: msg.FrontendRequest) -> msg.FrontendReply:
        from engine_side.engines.sglang.frontend import Front

        return await Front.of(self._manager).handle(request)

    def call(self, method: str, deadline: Deadline, **arguments: Any) -> Any:
        return self.run(self._called(method, arguments), deadline, method)

    async def _called(self, method: str, arguments: dict[str, Any]) -> Any:
        from sglang.srt.managers import io_struct

        manager = self._manager
        manager.auto_create_handle_loop()
        match method:
            case "pause_generation":
                await manager.pause_generation(io_struct.PauseGenerationReqInput(**arguments))
            case "continue_generation":
                await manager.continue_generation(io_struct.ContinueGenerationReqInput(**arguments))
            case "update_weight_version":
                await manager.update_weight_version(io_struct.UpdateWeightVersionReqInput(**arguments))
            case "abort_request":
                manager.abort_request(**arguments)
            case "flush_cache":
                return bool((await manager.flush_cache()).success)
            case _:
                raise ProtocolError("no such call", where="sglang.Engine", got=method)
        return True

    def check_weights(self, words: list[str], deadline: Deadline) -> tuple[bool, str]:
        return self.run(self._checked(words), deadline, f"{words[0]!r} of SGLang's schedulers")

    async def _checked(self, words: list[str]) -> tuple[bool, str]:
        from sglang.srt.managers.io_struct import CheckWeightsReqInput

        asked = CheckWeightsReqInput(action=ACTION, skip_tensor_list=words)
        ok, message, *_ = await self._manager.check_weights(asked)
        return bool(ok), str(message)

    def _wait(self, future: Future[Any], deadline: Deadline | None, what: str, end: bool) -> None:
        while True:
            left = _LOOK_S if deadline is None else min(_LOOK_S, deadline.remaining_s)
            if wait([future], timeout=left).done:
                return
            if deadline is not None and deadline.expired:
                if end:
                    future.cancel()
                raise DeadlineExceeded(f"{what} outlasted its deadline", where="sglang.Engine")
            if not self.loop.is_running() or not _alive(self._engine):
                future.cancel()
                raise PeerLost("SGLang's processes cannot be reached", where="sglang.Engine", got=f"{what} unanswered")


def _bound(engine: Any) -> asyncio.AbstractEventLoop:
    """The loop that the manager's tasks and events belong to; before its first call the one that it would take."""
    loop: asyncio.AbstractEventLoop = engine.tokenizer_manager.event_loop or engine.loop
    return loop


def _usable(loop: asyncio.AbstractEventLoop) -> bool:
    return not loop.is_closed() and not loop.is_running()


async def _end_tasks(manager: Any) -> None:
    tasks = list(manager.asyncio_tasks)
    manager.asyncio_tasks.clear()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def unbind(manager: Any) -> None:
    """Let a manager whose loop was closed begin anew in the next: with what it waits on there, and tasks of its own.
    What waited in the closed loop has ended with it."""
    manager.event_loop = None
    manager.asyncio_tasks.clear()
    seen: set[int] = set()
    todo: list[Any] = [manager]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _LoopBoundMixin):
            vars(value)["_loop"] = None
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple | set):
            todo += value
        elif type(value).__module__.partition(".")[0] in _WALKED and hasattr(value, "__dict__"):
            todo += vars(value).values()


async def _awaited(future: Awaitable[T]) -> T:
    return await future


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _alive(engine: Any) -> bool:
    """Do all schedulers of this engine run?"""
    import psutil

    for pid in engine.get_all_child_pids():
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            return False
    return True
