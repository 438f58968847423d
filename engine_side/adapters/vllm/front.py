"""What stands in front of an `AsyncLLM`, in its own process: holds requests during a push, refuses them afterwards if
need be, lets the bridge's own through, and keeps the books for whichever bridge comes next.

It hangs on the engine object and runs on its event loop. A hosted engine's adapter calls it; behind `vllm serve` it is
reached through the server's own `/collective_rpc`, of which `plugin` gives it the calls that are for it.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import wraps
from http import HTTPStatus
from typing import Any
from uuid import uuid4
from weakref import ref

from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from bridge.errors import BridgeError, Busy, DeadlineExceeded, EngineQuarantined, PeerLost
from bridge.procs import started_at
from bridge.wire import Completion, ErrorInfo, pack, unpack
from engine_side.adapters.vllm import front_messages as msg
from engine_side.adapters.vllm.common import Books, completion, not_held, number, parameters
from engine_side.adapters.vllm.facts import facts_of
from engine_side.adapters.vllm.plugin import ADAPTERS, FRONT, METHOD

log = logging.getLogger(__name__)

_KEY = "_weighbridge_front"
_WATCH_S = 0.5
XARG = "weighbridge_adapter"
"""Sampling argument by which an HTTP client asks for an adapter: `"vllm_xargs": {"weighbridge_adapter": "current"}`."""


class Front:
    """One per AsyncLLM. Every method runs on its event loop."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = ref(engine)
        self.books = Books()
        self.reason: str | None = None
        self.jobs = 0
        self._open = asyncio.Event()
        self._open.set()
        self._entering = 0
        self._ours: set[str] = set()
        self._privileged: set[str] = set()
        self._holder: msg.Claim | None = None
        self._visible = False
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, engine: AsyncLLM) -> Front:
        """The front of this engine, hung there if it has none."""
        found = vars(engine).get(_KEY)
        if not isinstance(found, Front):
            found = vars(engine)[_KEY] = cls(engine)
        return found

    # ---- what the engine's callers meet --------------------------------------------------------------------------

    @asynccontextmanager
    async def admitted(self, request_id: str) -> AsyncIterator[None]:
        """Inside, a request is handed to the engine. Waits during a push; raises EngineQuarantined while the engine
        refuses."""
        if request_id in self._ours:
            yield
            return
        await self._enter()
        try:
            yield
        finally:
            self._entering -= 1

    async def _enter(self) -> None:
        """The caller counts as entering until it takes itself off again."""
        while not self._open.is_set():
            await self._open.wait()
        if self.reason is not None:
            raise EngineQuarantined(
                "this engine holds weights that nobody verified and serves nothing",
                where="vLLM",
                got=self.reason,
                remedy="push a version that verifies",
            )
        self._entering += 1

    async def lora_request(self, adapter: str) -> Any:
        """vLLM's request for "current", "base" or a loaded adapter. Raises NotFound."""
        name = self.books.meant(adapter)
        if name is None:
            return None
        from engine_side.adapters.vllm.loras import lora_request

        held = await self._held()
        if name not in held:
            raise not_held(name)
        return lora_request(name, held[name])

    # ---- what a bridge asks --------------------------------------------------------------------------------------

    async def answer(self, frame: str) -> str:
        """`handle` for a frame in base64, as it comes through HTTP. Never raises."""
        try:
            reply = await self.handle(unpack(base64.b64decode(frame), msg.ToFront))
        except Exception as error:  # process boundary: the asker is told, whatever broke
            if not isinstance(error, BridgeError):
                log.exception("a call of the bridge failed")
            reply = msg.Failed(ErrorInfo.of(error))
        return base64.b64encode(pack(reply)).decode()

    async def handle(self, request: msg.ToFront) -> msg.FromFront:
        """Answer one request. Raises our errors; PeerLost for an engine that died."""
        try:
            match request:
                case msg.Hello():
                    return self._hello(request)
                case msg.Ask():
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
                    self._release()
                case msg.Refuse():
                    await self._refuse(request.reason)
                case msg.End():
                    await self._end(request.adapters)
                case msg.Note():
                    self.books.paused = request.paused
                case msg.Published():
                    self.books.version, self.books.adapter = request.version, request.adapter
                case msg.Retire():
                    await self._retire(request.adapters)
        except EngineDeadError as error:
            raise PeerLost("vLLM's engine has died", where="vLLM", got=str(error), remedy="start it again") from error
        return msg.Done()

    def _hello(self, request: msg.Hello) -> msg.FrontIs:
        import vllm

        try:
            found = os.stat(request.file)
            sees = (found.st_dev, found.st_ino) == (request.device, request.inode)
        except OSError:
            sees = False
        engine = self._live()
        clients = int(getattr(engine, "_client_count", 1))
        return msg.FrontIs(facts_of(engine.vllm_config), str(vllm.__version__), clients, sees, socket.gethostname())

    async def _state(self) -> msg.State:
        engine, books = self._live(), self.books
        names: list[str] = []
        if engine.vllm_config.lora_config is not None:
            held = await self._held()
            others = sorted(set(await engine.list_loras()) - set(held.values()))
            names = [*held, *(f"#{adapter_id}" for adapter_id in others)]
        holder = self._holder
        driven = holder is not None and self._alive(holder)
        return msg.State(
            version=books.version,
            adapter=books.adapter,
            paused=books.paused,
            held=not self._open.is_set(),
            refusal=self.reason,
            adapters=tuple(names),
            owner=holder.owner if holder is not None and driven else "",
            unfinished=int(engine.output_processor.get_num_unfinished_requests()),
        )

    def _claim(self, request: msg.Claim) -> None:
        holder = self._holder
        if holder is not None and holder.token != request.token and self._alive(holder):
            raise Busy(
                "another bridge drives this engine",
                where=f"vLLM, asked for by bridge {request.owner!r}",
                expected="one bridge per engine: two of them would weigh one engine against two arenas",
                got=f"it is attached to bridge {holder.owner!r} of process {holder.pid}",
                remedy=f"close bridge {holder.owner!r} first",
            )
        self._holder, self._visible = request, started_at(request.pid) == request.started

    def _alive(self, holder: msg.Claim) -> bool:
        """A process that cannot be seen from here was never seen: then the last one to come drives."""
        return self._visible and started_at(holder.pid) == holder.started

    async def _hold(self) -> None:
        """From now on callers wait, and whoever was on the way in has arrived. What is in flight goes on until the
        engine itself is paused. Idempotent."""
        self._open.clear()
        while self._entering:
            await asyncio.sleep(0.001)
        if self._watch is None and self._holder is not None and self._alive(self._holder):
            self._watch = asyncio.create_task(self._guard(self._holder, self.jobs))

    def _release(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._open.set()

    async def _refuse(self, reason: str | None) -> None:
        """What runs or waits inside the engine is ended too, and the engine stays paused."""
        self.reason = reason
        if reason is None:
            return
        engine = self._live()
        self._release()
        self.books.paused = True
        await engine.pause_generation(mode="abort", clear_cache=False)
        await engine.update_weight_version("quarantined")

    async def _guard(self, holder: msg.Claim, jobs: int) -> None:
        """While requests are held: a bridge whose process dies leaves nobody who knows what the weights are."""
        while self._alive(holder):
            await asyncio.sleep(_WATCH_S)
        self._watch = None
        engine = self._live()
        if self.jobs == jobs:
            log.warning("bridge %r died before it touched the weights; serving goes on", holder.owner)
            await engine.resume_generation()
            self.books.paused = False
            self._release()
            return
        log.error("bridge %r died in the middle of a push", holder.owner)
        await self._refuse(f"bridge {holder.owner!r} (process {holder.pid}) died in the middle of a push")

    async def _end(self, adapters: Iterable[str]) -> None:
        names = set(adapters)
        states = self._live().output_processor.request_states
        ids = [
            name
            for name, state in states.items()
            if state.lora_name in names and state.external_req_id not in self._privileged
        ]
        if ids:
            await self._live().abort(ids, internal=True)

    async def _retire(self, adapters: Iterable[str]) -> None:
        """Those still in use go at the next call."""
        retiring = self.books.retiring
        retiring |= set(adapters)
        if not retiring:
            return
        engine = self._live()
        held = await self._held()
        used = {state.lora_name for state in engine.output_processor.request_states.values()}
        for name in sorted(retiring - used):
            if name in held:
                await engine.remove_lora(held[name])
            retiring.discard(name)

    async def _held(self) -> dict[str, int]:
        engine = self._live()
        if engine.vllm_config.lora_config is None:
            return {}
        found: dict[str, int] = (await engine.collective_rpc(ADAPTERS))[0]
        return found

    # ---- generation ----------------------------------------------------------------------------------------------

    async def _generate(self, request: msg.Generate) -> list[Completion]:
        engine = self._live()
        if request.sampling.max_tokens == 0:
            served = number(await engine.get_weight_version())
            return [Completion((), (), "length", served) for _ in request.prompts]
        queues: list[Any] = []
        names = [f"bridge-{uuid4().hex}" for _ in request.prompts]
        self._ours.update(names)
        if request.past_gate:
            self._privileged.update(names)
        try:
            async with asyncio.timeout(request.timeout_s):
                await self._add(request, names, queues)
                return [completion(await _final(queue)) for queue in queues]
        except TimeoutError:
            raise DeadlineExceeded("requests of the bridge did not finish", where="vLLM") from None
        finally:
            self._ours.difference_update(names)
            self._privileged.difference_update(names)
            unfinished = [q.request_id for q in queues if engine.output_processor.has_request(q.request_id)]
            if unfinished:
                await asyncio.shield(engine.abort(unfinished, internal=True))
            for queue in queues:
                queue.close()

    async def _add(self, request: msg.Generate, names: list[str], queues: list[Any]) -> None:
        if request.past_gate:
            self._entering += 1
        else:
            await self._enter()
        try:
            lora = await self.lora_request(request.adapter)
            sampling = parameters(request.sampling)
            sampling.output_kind = RequestOutputKind.FINAL_ONLY
            for name, ids in zip(names, request.prompts, strict=True):
                prompt = {"prompt_token_ids": list(ids)}
                queues.append(await self._live().add_request(name, prompt, sampling, lora_request=lora))
        finally:
            self._entering -= 1

    def _live(self) -> Any:
        engine = self._engine()
        if engine is None:
            raise PeerLost("the engine is gone", where="vLLM", got="it was deleted")
        return engine


async def _final(queue: Any) -> Any:
    while True:
        output = queue.get_nowait() or await queue.get()
        if output.finished:
            return output


Coroutine = Callable[..., Awaitable[Any]]


def gated(add_request: Coroutine) -> Coroutine:
    """`AsyncLLM.add_request`, behind its front. What refuses becomes the 503 that vLLM's servers know."""

    @wraps(add_request)
    async def call(self: AsyncLLM, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        front = Front.of(self)
        try:
            async with front.admitted(request_id):
                wanted = (getattr(params, "extra_args", None) or {}).get(XARG)
                if wanted is not None:
                    kwargs["lora_request"] = await front.lora_request(str(wanted))
                return await add_request(self, request_id, prompt, params, *args, **kwargs)
        except EngineQuarantined as error:
            raise GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from error
        except BridgeError as error:
            raise GracefulHTTPError(str(error), HTTPStatus.BAD_REQUEST) from error

    return call


def answering(collective_rpc: Coroutine) -> Coroutine:
    """`AsyncLLM.collective_rpc`, where calls of the method `plugin.FRONT` are answered by the front."""

    @wraps(collective_rpc)
    async def call(
        self: AsyncLLM, method: str, timeout: float | None = None, args: Any = (), kwargs: Any = None
    ) -> Any:
        if method == FRONT:
            return [await Front.of(self).answer(*args)]
        if method == METHOD:
            Front.of(self).jobs += 1
        return await collective_rpc(self, method, timeout, args, kwargs)

    return call
