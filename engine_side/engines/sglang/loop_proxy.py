"""Calls of a tokenizer manager's coroutines from other event loops than its own.

SGLang's users await `engine.async_generate` in whatever loop they run. While a line keeps the manager on its own loop,
these coroutines run there, and their callers wait where they are: events of one loop do not wake another.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import suppress
from functools import wraps
from typing import Any, Protocol

from bridge.errors import Closed


class Home(Protocol):
    def home(self) -> asyncio.AbstractEventLoop:
        """The manager's loop, which runs."""
        ...


class Relay:
    """Stands in front of the public coroutines and streams of one manager, from `put_up` to `take_down`."""

    def __init__(self, manager: Any, home: Home) -> None:
        self._manager, self._home = manager, home
        self._names: list[str] = []
        self._running: set[asyncio.Task[Any]] = set()
        self._ending = False

    def put_up(self) -> None:
        for name, function in _public(type(self._manager)):
            if name in vars(self._manager):
                continue
            original = getattr(self._manager, name)
            stands_in = self._stream if inspect.isasyncgenfunction(function) else self._coroutine
            setattr(self._manager, name, stands_in(original))
            self._names.append(name)

    def take_down(self) -> None:
        """Calls from now on go to the manager itself."""
        for name in self._names:
            vars(self._manager).pop(name, None)
        self._names.clear()

    async def end(self) -> None:
        """In the home loop: whoever still waits is told."""
        self._ending = True
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _coroutine(self, original: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
        @wraps(original)
        async def called(*args: Any, **kwargs: Any) -> Any:
            home = self._elsewhere()
            return await (original(*args, **kwargs) if home is None else self._there(home, original(*args, **kwargs)))

        return called

    def _stream(self, original: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        @wraps(original)
        async def streamed(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            home, chunks = self._elsewhere(), original(*args, **kwargs)
            if home is None:
                async for chunk in chunks:
                    yield chunk
                return
            try:
                while True:
                    found, chunk = await self._there(home, _next(chunks))
                    if not found:
                        return
                    yield chunk
            finally:
                if home.is_running():
                    asyncio.run_coroutine_threadsafe(_closed(chunks), home)

        return streamed

    def _elsewhere(self) -> asyncio.AbstractEventLoop | None:
        """The manager's loop, if the caller runs in another. None once this was taken down."""
        home = self._home.home() if self._names else None
        return None if home is asyncio.get_running_loop() else home

    async def _there(self, home: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any]) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._kept(work), home))

    async def _kept(self, work: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.current_task()
        if task is None or self._ending:
            work.close()
            raise _closing()
        self._running.add(task)
        try:
            return await work
        except asyncio.CancelledError:
            if self._ending:
                raise _closing() from None
            raise
        finally:
            self._running.discard(task)


def _closing() -> Closed:
    return Closed(
        "the bridge was closed while this call ran in its event loop", where="sglang.Engine", remedy="call it again"
    )


async def _next(chunks: AsyncIterator[Any]) -> tuple[bool, Any]:
    """StopAsyncIteration does not travel through a future."""
    try:
        return True, await anext(chunks)
    except StopAsyncIteration:
        return False, None


async def _closed(chunks: Any) -> None:
    with suppress(RuntimeError):  # it is being cancelled already
        await chunks.aclose()


def _public(kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in dir(kind):
        function = inspect.getattr_static(kind, name)
        if not name.startswith("_") and (inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)):
            yield name, function
