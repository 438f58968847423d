"""The event loop of one `sglang.Engine`, usable from every thread while a bridge is attached.

An Engine runs its loop only inside its own blocking calls, and two threads that call it at once fail. While the line
stands, a thread keeps the loop running and the engine's blocking calls wait for it instead.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from bridge.deadline import Deadline
from bridge.errors import ConfigError, DeadlineExceeded, PeerLost

T = TypeVar("T")
_KEY = "_weighbridge_line"
_LOOK_S = 0.5
"""How often a wait looks whether the other side is still there."""


class Shared:
    """Stands for the loop in `engine.loop`: what would run it waits for it."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def run_until_complete(self, future: Awaitable[T]) -> T:
        return self._line.run(_awaited(future))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._line.loop, name)


class Line:
    """One per engine object, by `Line.of`; `users` adapters keep it up."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.loop: asyncio.AbstractEventLoop = engine.tokenizer_manager.event_loop or engine.loop
        self._users = 0
        self._keeper: threading.Thread | None = None
        self._former: Any = None

    @classmethod
    def of(cls, engine: Any) -> Line:
        found = vars(engine).get(_KEY)
        if not isinstance(found, Line):
            found = vars(engine)[_KEY] = cls(engine)
        return found

    def take(self) -> None:
        """One adapter more. The first starts the keeper, unless the loop runs already: it is the caller's own then."""
        self._users += 1
        if self._users > 1:
            return
        self._former, self._engine.loop = self._engine.loop, Shared(self)
        if not self.loop.is_running():
            self._keeper = threading.Thread(target=self._keep, name="weighbridge-sglang", daemon=True)
            self._keeper.start()

    def give_up(self) -> None:
        """One less; with the last the engine has its loop back."""
        self._users -= 1
        if self._users:
            return
        if self._keeper is not None:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._keeper.join()
            self._keeper = None
        self._engine.loop = self._former
        vars(self._engine).pop(_KEY, None)

    def _keep(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def run(self, work: Coroutine[Any, Any, T], deadline: Deadline | None = None, what: str = "a call") -> T:
        """Run in the loop and wait. Raises what `work` raises, DeadlineExceeded, PeerLost when the engine's processes
        are gone, ConfigError when called from the loop's own thread, which would wait for itself."""
        if _running() is self.loop:
            work.close()
            raise ConfigError(
                "a call of the bridge blocks, and this thread runs the engine's event loop",
                where="sglang.Engine",
                remedy="call it from another thread: await asyncio.to_thread(b.push, ...)",
            )
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        self._wait(future, deadline, what)
        return future.result()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run in the loop and do not wait."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def _wait(self, future: Future[Any], deadline: Deadline | None, what: str) -> None:
        while True:
            left = _LOOK_S if deadline is None else min(_LOOK_S, deadline.remaining_s)
            if wait([future], timeout=left).done:
                return
            if deadline is not None and deadline.expired:
                future.cancel()
                raise DeadlineExceeded(f"{what} outlasted its deadline", where="sglang.Engine")
            if not self.loop.is_running() or not _alive(self._engine):
                future.cancel()
                raise PeerLost("SGLang's processes cannot be reached", where="sglang.Engine", got=f"{what} unanswered")


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
