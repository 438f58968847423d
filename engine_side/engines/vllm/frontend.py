"""What stands in front of an `AsyncLLM`, in its own process: holds requests during a push, refuses them afterwards if
need be, lets the bridge's own through, and keeps the books for whichever bridge comes next.

It hangs on the engine object and runs on its event loop. A hosted engine's adapter calls it; behind `vllm serve` it is
reached through the server's own `/collective_rpc`, of which `plugin` gives it the calls that are for it.
"""

from __future__ import annotations

import asyncio
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

from bridge.errors import BridgeError, DeadlineExceeded, EngineQuarantined, PeerLost
from bridge.protocol.codec import Completion, pack
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.frontend import Frontend
from engine_side.engines.common.published_state import lora_not_loaded, number
from engine_side.engines.vllm.common import VllmPublishedState, asleep, completion, parameters
from engine_side.engines.vllm.facts import facts_of
from engine_side.engines.vllm.plugin import ADAPTERS, FRONT, METHOD

_KEY = "_weighbridge_front"
XARG = "weighbridge_adapter"
"""Sampling argument by which an HTTP client asks for an adapter: `"vllm_xargs": {"weighbridge_adapter": "current"}`."""


class VllmFrontend(Frontend):
    """One per AsyncLLM. Every method runs on its event loop."""

    name = "vLLM"
    books: VllmPublishedState

    def __init__(self, engine: AsyncLLM) -> None:
        super().__init__()
        self._engine = ref(engine)
        self.books = VllmPublishedState()
        self._opened = asyncio.Event()
        self._opened.set()
        self._entering = 0
        self._ours: set[str] = set()
        self._privileged: set[str] = set()

    @classmethod
    def of(cls, engine: AsyncLLM) -> VllmFrontend:
        """The front of this engine, hung there if it has none."""
        found = vars(engine).get(_KEY)
        if not isinstance(found, VllmFrontend):
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
        while not self._opened.is_set():
            await self._opened.wait()
        self.check_open()
        self._entering += 1

    async def lora_request(self, adapter: str) -> Any:
        """vLLM's request for "current", "base" or a loaded adapter. Raises NotFound."""
        name = self.books.meant(adapter)
        if name is None:
            return None
        from engine_side.engines.vllm.lora_slots import lora_request

        held = await self._loaded()
        if name not in held:
            raise lora_not_loaded(name)
        return lora_request(name, held[name])

    # ---- what a bridge asks --------------------------------------------------------------------------------------

    async def handle(self, request: msg.FrontendRequest) -> msg.FrontendReply:
        """As of every front. Raises PeerLost for an engine that died."""
        try:
            return await super().handle(request)
        except EngineDeadError as error:
            raise PeerLost("vLLM's engine has died", where="vLLM", got=str(error), remedy="start it again") from error

    def _facts(self) -> tuple[str, bytes, int]:
        import vllm

        engine = self._live()
        return str(vllm.__version__), pack(facts_of(engine.vllm_config)), int(getattr(engine, "_client_count", 1))

    @property
    def _held(self) -> bool:
        return not self._opened.is_set()

    async def _adapters(self) -> tuple[str, ...]:
        engine = self._live()
        if engine.vllm_config.lora_config is None:
            return ()
        loaded = await self._loaded()
        others = sorted(set(await engine.list_loras()) - set(loaded.values()))
        return (*loaded, *(f"#{adapter_id}" for adapter_id in others))

    def _unfinished(self) -> int:
        return int(self._live().output_processor.get_num_unfinished_requests())

    async def _close(self) -> None:
        self._opened.clear()
        while self._entering:
            await asyncio.sleep(0.001)

    async def _open(self) -> None:
        self._opened.set()

    async def _stop(self) -> None:
        engine = self._live()
        await engine.pause_generation(mode="abort", clear_cache=False)
        await engine.update_weight_version("quarantined")

    async def _go_on(self) -> None:
        await self._live().resume_generation()

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
        held = await self._loaded()
        used = {state.lora_name for state in engine.output_processor.request_states.values()}
        for name in sorted(retiring - used):
            if name in held:
                await engine.remove_lora(held[name])
            retiring.discard(name)

    async def _loaded(self) -> dict[str, int]:
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
            await self._require_awake()
            lora = await self.lora_request(request.adapter)
            sampling = parameters(request.sampling)
            sampling.output_kind = RequestOutputKind.FINAL_ONLY
            for name, ids in zip(names, request.prompts, strict=True):
                prompt = {"prompt_token_ids": list(ids)}
                queues.append(await self._live().add_request(name, prompt, sampling, lora_request=lora))
        finally:
            self._entering -= 1

    async def _require_awake(self) -> None:
        """No push can begin before whoever asks has entered, and none is under way: its owner put it to sleep."""
        if not self.books.paused and await self._live().is_sleeping():
            raise asleep(self.name, "resume it or wake it up, then try again")

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
        front = VllmFrontend.of(self)
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
            return [await VllmFrontend.of(self).answer(*args)]
        if method == METHOD:
            VllmFrontend.of(self).jobs += 1
        return await collective_rpc(self, method, timeout, args, kwargs)

    return call
