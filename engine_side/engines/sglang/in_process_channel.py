"""Call a `sglang.Engine` of this process from every thread and event loop while a bridge is attached.

SGLang runs `engine.loop` only inside its own blocking calls, and a thread that calls the engine during another thread's
call gets "This event loop is already running". While the channel is open, a thread of its own keeps that loop running,
and the engine's blocking calls wait for it.

Users also await `engine.async_generate` in loops of their own, and an asyncio event that is set in one loop wakes
nobody in another: such a caller would hang (https://github.com/sgl-project/sglang/pull/5162). So the work runs in the
manager's loop, and the caller waits in the loop where it is.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from asyncio.mixins import _LoopBoundMixin
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import wait
from contextlib import suppress
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakSet

from bridge.errors import BridgeError, Closed, ConfigError, DeadlineExceeded, PeerLost
from bridge.protocol.deadline import Deadline

T = TypeVar("T")
_KEY = "_weighbridge_channel"
_END = object()
_LOOK_S = 0.5
"""Seconds between two looks at the engine's processes during a wait."""
_LOOP_S = 10.0
"""Seconds that the event loop is given to start, and to stop."""
_WALKED = frozenset({"sglang", "asyncio", "engine_side"})
"""Packages whose objects are searched for what is bound to an event loop."""


class BlockingLoop:
    """Takes the place of `engine.loop`: `run_until_complete` waits for the running loop instead of running it."""

    def __init__(self, channel: InProcessChannel) -> None:
        self._channel = channel

    def run_until_complete(self, future: Awaitable[T]) -> T:
        """Block until `future` is done in the engine's loop. Raises as `InProcessChannel.run`."""
        return self._channel.run(_wait_for(future), None, "a blocking call of the engine")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel.loop, name)


class InProcessChannel:
    """Runs calls on the event loop of one engine. Made by `InProcessChannel.open`, one per engine object.

    Attributes:
        loop: the event loop that SGLang's tokenizer manager is bound to.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._manager = engine, engine.tokenizer_manager
        # before its first call the manager is bound to no loop, and would take the engine's
        self.loop: asyncio.AbstractEventLoop = self._manager.event_loop or engine.loop
        self._engine_loop = engine.loop
        self._users: WeakSet[object] = WeakSet()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._own_loop = False
        self._tasks: set[asyncio.Task[Any]] = set()
        """Calls of the manager that callers in other loops wait for."""
        self._ending = False
        self._wrapped: list[str] = []
        """The manager's public coroutines and async generators, wrapped on this instance alone."""
        for name, function in inspect.getmembers(type(self._manager)):
            streams = inspect.isasyncgenfunction(function)
            if name.startswith("_") or name in vars(self._manager):
                continue
            if streams or inspect.iscoroutinefunction(function):
                wrap = self._stream if streams else self._coroutine
                setattr(self._manager, name, wrap(getattr(self._manager, name)))
                self._wrapped.append(name)
        engine.loop = BlockingLoop(self)

    @classmethod
    def open(cls, engine: Any, user: object) -> InProcessChannel:
        """Return the channel of `engine`, opened if there is none. It is closed by the last of its users; one that was
        collected without closing it does not count."""
        found = vars(engine).get(_KEY)
        if not isinstance(found, InProcessChannel):
            found = vars(engine)[_KEY] = cls(engine)
        found._users.add(user)
        return found

    def close(self, user: object) -> None:
        """Give the engine its own loop back once the last user closes. Idempotent. Blocks for at most 20 s.

        Raises DeadlineExceeded when something blocks the loop; the engine has its loop back all the same.
        """
        self._users.discard(user)
        if self._users or vars(self._engine).get(_KEY) is not self:
            return
        for name in self._wrapped:
            vars(self._manager).pop(name, None)
        self._wrapped.clear()
        try:
            with self._lock:
                self._stop_thread()
        finally:
            self._engine.loop = self._engine_loop
            del vars(self._engine)[_KEY]

    # ---- the loop and its thread ---------------------------------------------------------------------------------

    def running_loop(self) -> asyncio.AbstractEventLoop:
        """Return the manager's loop, and keep it running if its owner does not.

        A loop that was closed meanwhile, as `asyncio.run` does, is replaced. Raises DeadlineExceeded when the loop does
        not start within 10 s.
        """
        if self.loop.is_running():  # without the lock: also called in the loop itself, while `close` waits for it
            return self.loop
        with self._lock:
            if not self.loop.is_running():
                self._start_thread()
            return self.loop

    def _start_thread(self) -> None:
        if self.loop.is_closed():
            self._own_loop, self.loop = True, asyncio.new_event_loop()
            unbind(self._manager)
        started = threading.Event()
        self.loop.call_soon(started.set)
        self._thread = threading.Thread(target=self.loop.run_forever, name="weighbridge-sglang", daemon=True)
        self._thread.start()
        if not started.wait(_LOOP_S):
            raise _blocked(f"did not start within {_LOOP_S:g} s")

    def _stop_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            return
        ended = asyncio.run_coroutine_threadsafe(self._end_calls(), self.loop)
        finished = bool(wait([ended], timeout=_LOOP_S).done)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_LOOP_S)
        if self._thread.is_alive() or not finished:
            raise _blocked(f"did not stop within {_LOOP_S:g} s")
        if self._own_loop:
            self.loop.close()
            unbind(self._manager)

    async def _end_calls(self) -> None:
        """End the calls that callers in other loops still wait for: each raises Closed."""
        self._ending = True
        await _cancel(self._tasks)
        if self._own_loop:  # nobody else knows this loop: the manager has to begin anew in that of its next caller
            await _cancel(self._manager.asyncio_tasks)

    # ---- calls of the bridge, and blocking calls of users ----------------------------------------------------------

    def refuse_caller(self) -> None:
        """Raises ConfigError when this thread runs the engine's loop: it would wait for itself."""
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            return
        if here is self.running_loop():
            raise ConfigError(
                "a call of the bridge blocks, and this thread runs the engine's event loop",
                where="sglang.Engine",
                expected="a thread of its own",
                got="the thread of the loop",
                remedy="call it from another thread: await asyncio.to_thread(b.push, ...)",
            )

    def run(self, work: Coroutine[Any, Any, T], deadline: Deadline | None, what: str, *, cancel_late: bool = True) -> T:
        """Run a coroutine in the engine's loop and block until it is done.

        Args:
            deadline: None for a user's own blocking call of the engine, which waits as long as the engine lives.
            what: the call's name, for errors.
            cancel_late: cancel the coroutine when the deadline passes; False leaves it running.

        Raises what `work` raises; DeadlineExceeded; PeerLost when the loop or the engine's processes ended; ConfigError
        as `refuse_caller`.
        """
        try:
            self.refuse_caller()
            future = asyncio.run_coroutine_threadsafe(work, self.running_loop())
        except BridgeError:
            work.close()
            raise
        while not wait([future], _LOOK_S if deadline is None else min(_LOOK_S, deadline.remaining_s)).done:
            if deadline is not None and deadline.expired:
                if cancel_late:
                    future.cancel()
                raise DeadlineExceeded(
                    f"SGLang did not answer {what} before the deadline",
                    where="sglang.Engine",
                    expected="an answer",
                    got="none",
                    remedy="raise timeout_s, or look in SGLang's log for a scheduler that hangs",
                )
            if not self.loop.is_running() or not _processes_run(self._engine):
                future.cancel()
                raise PeerLost(
                    "SGLang's processes or its event loop have ended",
                    where="sglang.Engine",
                    expected="an engine that runs",
                    got=f"no answer to {what}",
                    remedy="SGLang's log says why; start the engine again and attach to it",
                )
        return future.result()

    # ---- in place of the manager's coroutines and streams --------------------------------------------------------

    def _coroutine(self, original: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
        @wraps(original)
        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self._run_in(self._other_loop(), original(*args, **kwargs))

        return call

    def _stream(self, original: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        @wraps(original)
        async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            loop, chunks = self._other_loop(), original(*args, **kwargs)
            try:
                while (chunk := await self._run_in(loop, anext(chunks, _END))) is not _END:
                    yield chunk
            finally:
                if loop is not None and loop.is_running():
                    asyncio.run_coroutine_threadsafe(_close(chunks), loop)

        return stream

    def _other_loop(self) -> asyncio.AbstractEventLoop | None:
        """Return the manager's loop if the caller runs in another one; None once the channel was closed."""
        loop = self.running_loop() if self._wrapped else None
        return None if loop is asyncio.get_running_loop() else loop

    async def _run_in(self, loop: asyncio.AbstractEventLoop | None, work: Awaitable[T]) -> T:
        if loop is None:
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._tracked(work), loop))

    async def _tracked(self, work: Awaitable[T]) -> T:
        task: Any = asyncio.current_task()
        self._tasks.add(task)
        try:
            if self._ending:
                task.cancel()
            return await work
        except asyncio.CancelledError:
            if not self._ending:
                raise
            raise Closed(
                "the bridge was closed while this call ran in its event loop",
                where="sglang.Engine",
                expected="an open Bridge",
                got="a closed one",
                remedy="call it again",
            ) from None
        finally:
            self._tasks.discard(task)


def unbind(manager: Any) -> None:
    """Let a tokenizer manager whose loop was closed begin anew in the loop of its next caller.

    Resets the loop of every asyncio lock, event and condition that the manager holds, and forgets its tasks, which
    ended with the closed loop.
    """
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


async def _wait_for(future: Awaitable[T]) -> T:
    return await future


async def _cancel(running: set[asyncio.Task[Any]]) -> None:
    tasks = list(running)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _close(chunks: Any) -> None:
    with suppress(RuntimeError):  # it is being cancelled already
        await chunks.aclose()


def _blocked(got: str) -> DeadlineExceeded:
    return DeadlineExceeded(
        "SGLang's event loop is blocked",
        where="sglang.Engine.loop",
        expected="a loop whose callbacks return at once",
        got=f"it {got}",
        remedy="move code that blocks out of coroutines that run in this loop (await asyncio.to_thread(...))",
    )


def _processes_run(engine: Any) -> bool:
    """Return whether all schedulers of this engine run."""
    import psutil

    try:
        return all(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in engine.get_all_child_pids())
    except psutil.NoSuchProcess:
        return False
