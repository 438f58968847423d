"""Send calls of a `sglang.Engine` to the event loop that its channel keeps running, from whatever loop or thread.

Users await `engine.async_generate` in loops of their own, and an asyncio event that is set in one loop wakes nobody in
another: such a caller would hang (https://github.com/sgl-project/sglang/pull/5162). So the work runs in the manager's
loop, and the caller waits in the loop where it is.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from bridge.errors import Closed

if TYPE_CHECKING:
    from engine_side.engines.sglang.in_process_channel import InProcessChannel

T = TypeVar("T")
_END = object()


class BlockingLoop:
    """Takes the place of `engine.loop`: `run_until_complete` waits for the running loop instead of running it."""

    def __init__(self, channel: InProcessChannel) -> None:
        self._channel = channel

    def run_until_complete(self, future: Awaitable[T]) -> T:
        """Block until `future` is done in the engine's loop. Raises as `InProcessChannel.run`."""
        return self._channel.run(_wait_for(future), None, "a blocking call of the engine")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel.loop, name)


class LoopProxy:
    """Takes the place of a tokenizer manager's public coroutines and streams from `install` to `remove`."""

    def __init__(self, manager: Any, channel: InProcessChannel) -> None:
        self._manager, self._channel = manager, channel
        self._names: list[str] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending = False

    def install(self) -> None:
        """Wrap every public coroutine and async generator, on this instance alone."""
        for name, function in inspect.getmembers(type(self._manager)):
            if name.startswith("_") or name in vars(self._manager):
                continue
            if inspect.iscoroutinefunction(function):
                setattr(self._manager, name, self._coroutine(getattr(self._manager, name)))
            elif inspect.isasyncgenfunction(function):
                setattr(self._manager, name, self._stream(getattr(self._manager, name)))
            else:
                continue
            self._names.append(name)

    def remove(self) -> None:
        """Let calls from now on reach the manager itself."""
        for name in self._names:
            vars(self._manager).pop(name, None)
        self._names.clear()

    async def end(self) -> None:
        """End the calls that callers in other loops still wait for: each raises Closed. Runs in the manager's loop."""
        self._ending = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _coroutine(self, original: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
        @wraps(original)
        async def call(*args: Any, **kwargs: Any) -> Any:
            loop = self._other_loop()
            work = original(*args, **kwargs)
            return await (work if loop is None else self._run_in(loop, work))

        return call

    def _stream(self, original: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        @wraps(original)
        async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            loop, chunks = self._other_loop(), original(*args, **kwargs)
            if loop is None:
                async for chunk in chunks:
                    yield chunk
                return
            try:
                while (chunk := await self._run_in(loop, anext(chunks, _END))) is not _END:
                    yield chunk
            finally:
                if loop.is_running():
                    asyncio.run_coroutine_threadsafe(_close(chunks), loop)

        return stream

    def _other_loop(self) -> asyncio.AbstractEventLoop | None:
        """Return the manager's loop if the caller runs in another one; None after `remove`."""
        loop = self._channel.running_loop() if self._names else None
        return None if loop is asyncio.get_running_loop() else loop

    async def _run_in(self, loop: asyncio.AbstractEventLoop, work: Awaitable[T]) -> T:
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
                remedy="call it again",
            ) from None
        finally:
            self._tasks.discard(task)


async def _wait_for(future: Awaitable[T]) -> T:
    return await future


async def _close(chunks: Any) -> None:
    with suppress(RuntimeError):  # it is being cancelled already
        await chunks.aclose()
