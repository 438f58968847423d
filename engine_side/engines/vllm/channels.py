"""Two channels to an AsyncLLM: its event loop in this process, or the endpoints of the server that it runs in."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from bridge.errors import ConfigError, PeerLost, ProtocolError
from bridge.protocol.codec import pack
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.http import HttpClient, HttpStatus
from engine_side.engines.vllm.liveness import died_error, wait_for
from engine_side.engines.vllm.plugin import FRONT

T = TypeVar("T")
END_S = 10.0
"""Time for the tasks of an event loop to end."""


class VllmChannel(Protocol):
    """A way to an AsyncLLM. Every call blocks until it is answered; raises PeerLost for an engine that is gone, and
    DeadlineExceeded."""

    def ask(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        """Send a request to the frontend. Raises the error that it answers with."""
        ...

    def call(self, name: str, deadline: Deadline, **arguments: Any) -> Any:
        """Call a method of AsyncLLM by name. `collective_rpc` returns what each worker answered; bytes among its `args`
        reach the workers as bytes, or in base64 over HTTP."""
        ...


class VllmLoopChannel:
    """An event loop on a thread of its own, and the AsyncLLM that lives on it.

    Attributes:
        engine: the AsyncLLM; None before it was made and after it was ended.
        front: its VllmFrontend.
    """

    def __init__(self) -> None:
        self.engine: Any = None
        self.front: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="weighbridge-vllm", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], deadline: Deadline | None) -> T:
        """Run a coroutine on the loop and wait for its result. Without a deadline this waits for as long as the engine
        core lives.

        Raises:
            DeadlineExceeded: the coroutine was cancelled at the deadline.
            PeerLost: the engine core has ended, or the loop was stopped.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return wait_for(future, getattr(self.engine, "engine_core", None), deadline, "AsyncLLM")
        except CancelledError as error:
            raise PeerLost(
                "vLLM's engine was stopped", where="AsyncLLM", got="closed", remedy="start it again"
            ) from error

    def stop(self) -> None:
        """End the loop and what still waits on it. Blocks for at most twice END_S. Idempotent."""
        if self._loop.is_closed():
            return
        wait((asyncio.run_coroutine_threadsafe(_end_all(), self._loop),), END_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(END_S)
        if not self._thread.is_alive():  # else something on it blocks, and it cannot be closed
            self._loop.close()

    def ask(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        """Have the frontend handle a request on the loop."""
        answer: msg.FrontendReply = self.run(self.front.handle(request), deadline)
        return answer

    def call(self, name: str, deadline: Deadline, **arguments: Any) -> Any:
        """Call a method of the AsyncLLM on the loop."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return self.run(getattr(self.engine, name)(**arguments), deadline)
        except EngineDeadError as error:
            raise died_error("AsyncLLM", str(error)) from error


async def _end_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class Route:
    """The endpoint of a method of AsyncLLM.

    Attributes:
        answer, kind: key and type of its result in the answer; None for a method without one.
        get: a GET; else a POST, with the arguments in the query or, if `body`, in the body.
    """

    path: str
    answer: str | None = None
    kind: type = object
    get: bool = False
    body: bool = False


ROUTES: Mapping[str, Route] = {
    "pause_generation": Route("/pause"),
    "resume_generation": Route("/resume"),
    "is_sleeping": Route("/is_sleeping", "is_sleeping", bool, get=True),
    "reset_prefix_cache": Route("/reset_prefix_cache", "success", bool),
    "reset_mm_cache": Route("/reset_mm_cache"),
    "reset_encoder_cache": Route("/reset_encoder_cache"),
    "update_weight_version": Route("/update_weight_version", body=True),
    "get_weight_version": Route("/weight_info", "weight_version", str, get=True),
    "collective_rpc": Route("/collective_rpc", "results", list, body=True),
}


class VllmHttpChannel:
    """The endpoints that `vllm serve` opens with VLLM_SERVER_DEV_MODE=1."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def ask(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        """Send a request through the server's `/collective_rpc`. Raises ConfigError where no frontend answers."""
        (text,) = self.call("collective_rpc", deadline, method=FRONT, args=(pack(request),))[:1] or ("",)
        if not text:
            raise ConfigError(
                "the server was started without weighbridge's plugin in its frontend",
                where=self._client.url,
                expected="one API server process, with weighbridge installed beside vLLM",
                got="an answer from a worker",
                remedy="install weighbridge in the server's environment and start it with --api-server-count 1",
            )
        return msg.read_reply(base64.b64decode(text), self._client.url)

    def call(self, name: str, deadline: Deadline, **arguments: Any) -> Any:
        """Call the endpoint of a method of AsyncLLM. Raises ProtocolError for an answer of another form."""
        route = ROUTES[name]
        try:
            if route.get:
                answer = self._client.get(route.path, deadline)
            elif route.body:
                answer = self._client.post(route.path, deadline, body=msgspec.to_builtins(arguments))
            else:
                answer = self._client.post(route.path, deadline, query=arguments)
        except HttpStatus as error:
            raise error.as_error() from error
        if route.answer is None:
            return None
        found = answer.get(route.answer) if isinstance(answer, dict) else None
        if not isinstance(found, route.kind):
            raise ProtocolError(
                "the server's answer has another form",
                where=f"{self._client.url}{route.path}",
                expected=f"an object in which {route.answer!r} is of type {route.kind.__name__}",
                got=str(answer)[:200],
                remedy="give the address of the engine's own server, not of a router before it",
            )
        return found
