"""Two lines to an AsyncLLM: by its event loop in this process, or through the endpoints of the server it stands in."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from bridge.errors import ConfigError, DeadlineExceeded, PeerLost, ProtocolError
from bridge.protocol.codec import pack, unpack
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.http import HttpClient, HttpStatus
from engine_side.engines.vllm.liveness import LOOK_S, has_died, lost
from engine_side.engines.vllm.plugin import FRONT

T = TypeVar("T")
GRACE_S = 1.0
"""For what vLLM itself says of a dead engine core."""


class VllmChannel(Protocol):
    """Blocks until answered. Every call raises PeerLost for an engine that is gone, and DeadlineExceeded."""

    def ask(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        """The front's answer; its errors are raised."""
        ...

    def call(self, method: str, deadline: Deadline, **arguments: Any) -> Any:
        """A method of AsyncLLM, by name."""
        ...

    def rpc(self, method: str, frame: bytes, deadline: Deadline) -> Sequence[Any]:
        """A method of the workers, with one frame; what each answered."""
        ...


class VllmLoopChannel:
    """An event loop on a thread of its own, and the AsyncLLM that lives on it."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.front: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="weighbridge-vllm", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], deadline: Deadline | None) -> T:
        """Run a coroutine on the loop and wait for it; one that is too late is cancelled."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while not wait((future,), LOOK_S if deadline is None else min(LOOK_S, deadline.remaining_s)).done:
                if deadline is not None and deadline.expired:
                    future.cancel()
                    raise DeadlineExceeded("vLLM did not answer in time", where="AsyncLLM")
                engine = self.engine
                if engine is not None and has_died(engine.engine_core) and not wait((future,), GRACE_S).done:
                    future.cancel()
                    raise lost("AsyncLLM")
            return future.result()
        except CancelledError as error:
            raise PeerLost("vLLM's engine was stopped", where="AsyncLLM") from error

    def stop(self) -> None:
        """EndRequests the loop and what still waits on it. Idempotent."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(_end_all(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def ask(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        answer: msg.FrontendReply = self.run(self.front.handle(request), deadline)
        return answer

    def call(self, method: str, deadline: Deadline, **arguments: Any) -> Any:
        return self._engine_call(getattr(self.engine, method)(**arguments), deadline)

    def rpc(self, method: str, frame: bytes, deadline: Deadline) -> Sequence[Any]:
        answers: Sequence[Any] = self._engine_call(self.engine.collective_rpc(method, args=(frame,)), deadline)
        return answers

    def _engine_call(self, work: Coroutine[Any, Any, Any], deadline: Deadline) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return self.run(work, deadline)
        except EngineDeadError as error:
            raise PeerLost("vLLM's engine has died", where="AsyncLLM", got=str(error)) from error


async def _end_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class Route:
    """Where a method of AsyncLLM is reached: `answer` is the key of what it returns; a `get`, or a post whose arguments
    travel in the query or, if `body`, in the body."""

    path: str
    answer: str | None = None
    get: bool = False
    body: bool = False


ROUTES: Mapping[str, Route] = {
    "pause_generation": Route("/pause"),
    "resume_generation": Route("/resume"),
    "is_sleeping": Route("/is_sleeping", "is_sleeping", get=True),
    "reset_prefix_cache": Route("/reset_prefix_cache", "success"),
    "reset_mm_cache": Route("/reset_mm_cache"),
    "reset_encoder_cache": Route("/reset_encoder_cache"),
    "update_weight_version": Route("/update_weight_version", body=True),
    "get_weight_version": Route("/weight_info", "weight_version", get=True),
}


class VllmHttpChannel:
    """Over the endpoints that `vllm serve` opens with VLLM_SERVER_DEV_MODE=1."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def ask(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        (text,) = self.rpc(FRONT, pack(request), deadline)[:1] or ("",)
        if not text:
            raise ConfigError(
                "the server was started without weighbridge's plugin in its front",
                where=self._client.url,
                expected="one API server process, with weighbridge installed beside vLLM",
                got="an answer from a worker",
                remedy="install weighbridge in the server's environment and start it with --api-server-count 1",
            )
        answer: msg.FrontendReply = unpack(base64.b64decode(text), msg.FrontendReply)
        if isinstance(answer, msg.FrontendFailed):
            raise answer.error.rebuild(self._client.url)
        return answer

    def call(self, method: str, deadline: Deadline, **arguments: Any) -> Any:
        route = ROUTES[method]
        try:
            if route.get:
                said = self._client.get(route.path, deadline)
            elif route.body:
                said = self._client.post(route.path, deadline, body=arguments)
            else:
                said = self._client.post(route.path, deadline, query=arguments)
        except HttpStatus as error:
            raise self._failed(error) from error
        if route.answer is None:
            return None
        if not isinstance(said, dict) or route.answer not in said:
            raise ProtocolError("an answer of another kind", where=f"{self._client.url}{route.path}", got=str(said))
        return said[route.answer]

    def rpc(self, method: str, frame: bytes, deadline: Deadline) -> Sequence[Any]:
        body = {"method": method, "args": [base64.b64encode(frame).decode()]}
        try:
            said = self._client.post("/collective_rpc", deadline, body=body)
        except HttpStatus as error:
            raise self._failed(error) from error
        if not isinstance(said, dict) or not isinstance(said.get("results"), list):
            raise ProtocolError("an answer of another kind", where=f"{self._client.url}/collective_rpc", got=str(said))
        results: list[Any] = said["results"]
        return results

    def _failed(self, error: HttpStatus) -> PeerLost | ProtocolError:
        kind = PeerLost if error.status >= 500 else ProtocolError
        return kind("the server could not do what was asked", where=self._client.url, got=str(error))
