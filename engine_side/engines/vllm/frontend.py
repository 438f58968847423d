"""The frontend of an `AsyncLLM`, in the AsyncLLM's own process.

It hangs on the engine object and runs on its event loop. The driver of a hosted engine calls it directly; behind
`vllm serve` it is reached through the server's own `/collective_rpc`, from which `plugin` takes the calls that are for
it.
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

from bridge.errors import BridgeError, EngineQuarantined, PeerLost
from bridge.protocol.codec import Completion, pack
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.frontend import Frontend, answer, quarantine_error
from engine_side.engines.common.published_state import asleep_error, parse_version
from engine_side.engines.vllm.common import (
    list_loras,
    read_completion,
    request_lora,
    sampling_parameters,
)
from engine_side.engines.vllm.facts import facts_of
from engine_side.engines.vllm.liveness import died_error
from engine_side.engines.vllm.plugin import FRONT, LORAS, METHOD

XARG = "weighbridge_adapter"
"""Sampling argument by which an HTTP client asks for a LoRA: `"vllm_xargs": {"weighbridge_adapter": "current"}`."""


class VllmFrontend(Frontend):
    """One per AsyncLLM. Every method runs on its event loop."""

    name = "vLLM"

    def __init__(self, engine: AsyncLLM) -> None:
        super().__init__()
        self._engine = ref(engine)
        self._opened = asyncio.Event()
        self._opened.set()
        self._entering = 0
        self._ours: set[str] = set()
        self._privileged: set[str] = set()

    # ---- requests of the engine's users --------------------------------------------------------------------------

    @asynccontextmanager
    async def entered(self, past: bool) -> AsyncIterator[None]:
        """Inside, requests may be handed to the engine; no push begins before they are there. Unless `past` this waits
        during a push, and raises EngineQuarantined while the engine refuses."""
        while not past and not self._opened.is_set():
            await self._opened.wait()
        if not past and self.reason is not None:
            raise quarantine_error(self.name, self.reason)
        self._entering += 1
        try:
            yield
        finally:
            self._entering -= 1

    def is_ours(self, request_id: str) -> bool:
        """True for a request of the bridge, which has waited already."""
        return request_id in self._ours

    async def lora_request(self, name: str) -> Any:
        """vLLM's request for "current", "base" or a loaded LoRA; None for the base model. Raises NotFound."""
        lora = self.published.resolve_lora(name)
        return None if lora is None else request_lora(lora, await self._loaded())

    # ---- requests of a bridge ------------------------------------------------------------------------------------

    async def handle(self, request: msg.FrontendRequest) -> msg.FrontendReply:
        """Carry out one request of a driver. Raises `bridge.errors`, PeerLost when the core has ended."""
        try:
            return await super().handle(request)
        except EngineDeadError as error:
            raise died_error(self.name, str(error)) from error

    def _facts(self) -> tuple[bytes, int]:
        engine = self._live()
        return pack(facts_of(engine.vllm_config)), int(getattr(engine, "_client_count", 1))

    @property
    def _held(self) -> bool:
        return not self._opened.is_set()

    async def _list_loras(self) -> tuple[str, ...]:
        engine = self._live()
        if engine.vllm_config.lora_config is None:
            return ()
        return list_loras(await self._loaded(), await engine.list_loras())

    def _count_unfinished(self) -> int:
        return int(self._live().output_processor.get_num_unfinished_requests())

    async def _close_gate(self) -> None:
        self._opened.clear()
        while self._entering:
            await asyncio.sleep(0.001)

    async def _open_gate(self) -> None:
        self._opened.set()

    async def _stop_engine(self) -> None:
        engine = self._live()
        await engine.pause_generation(mode="abort", clear_cache=False)
        await engine.update_weight_version("quarantined")

    async def _resume_engine(self) -> None:
        await self._live().resume_generation()

    async def _end_requests(self, loras: Iterable[str]) -> None:
        names = set(loras)
        states = self._live().output_processor.request_states
        ids = [
            name
            for name, state in states.items()
            if state.lora_name in names and state.external_req_id not in self._privileged
        ]
        if ids:
            await self._live().abort(ids, internal=True)

    async def _retire_loras(self, loras: Iterable[str]) -> None:
        """LoRAs that are still in use are dropped at a later call."""
        retiring = self.published.retiring
        retiring |= set(loras)
        if not retiring:
            return
        engine, loaded = self._live(), await self._loaded()
        used = {state.lora_name for state in engine.output_processor.request_states.values()}
        for name in sorted(retiring - used):
            if name in loaded:
                await engine.remove_lora(loaded[name])
            retiring.discard(name)

    async def _loaded(self) -> dict[str, int]:
        """Name -> id of the LoRAs that the bridge has loaded. Without vLLM's own timeout: it would leave the replies of
        slow workers to be paired with later calls. The driver's deadline ends the wait."""
        engine = self._live()
        if engine.vllm_config.lora_config is None:
            return {}
        found: dict[str, int] = (await engine.collective_rpc(LORAS))[0]
        return found

    # ---- generation ----------------------------------------------------------------------------------------------

    async def _generate(self, request: msg.Generate) -> list[Completion]:
        engine = self._live()
        if request.sampling.max_tokens == 0:
            served = parse_version(await engine.get_weight_version())
            return [Completion((), (), "length", served) for _ in request.prompts]
        queues: list[Any] = []
        names = [f"bridge-{uuid4().hex}" for _ in request.prompts]
        self._ours.update(names)
        if request.past_gate:
            self._privileged.update(names)
        try:
            async with self.entered(request.past_gate):
                # no push can begin any more, and none is under way: if the engine sleeps, its owner has put it to sleep
                if not self.published.paused and await engine.is_sleeping():
                    raise asleep_error(self.name, "resume it or wake it up, then try again")
                lora = await self.lora_request(request.lora)
                sampling = sampling_parameters(request.sampling)
                sampling.output_kind = RequestOutputKind.FINAL_ONLY
                for name, ids in zip(names, request.prompts, strict=True):
                    prompt = {"prompt_token_ids": list(ids)}
                    queues.append(await engine.add_request(name, prompt, sampling, lora_request=lora))
            return [read_completion(await _final_output(queue)) for queue in queues]
        finally:
            self._ours.difference_update(names)
            self._privileged.difference_update(names)
            unfinished = [q.request_id for q in queues if engine.output_processor.has_request(q.request_id)]
            if unfinished:
                await asyncio.shield(engine.abort(unfinished, internal=True))
            for queue in queues:
                queue.close()

    def _live(self) -> Any:
        engine = self._engine()
        if engine is None:
            raise PeerLost(
                "the engine is gone",
                where=self.name,
                expected="an engine that runs",
                got="it was deleted",
                remedy="start it again",
            )
        return engine


async def _final_output(queue: Any) -> Any:
    while True:
        output = queue.get_nowait() or await queue.get()
        if output.finished:
            return output


Coroutine = Callable[..., Awaitable[Any]]


def wrap_add_request(add_request: Coroutine) -> Coroutine:
    """Put `AsyncLLM.add_request` behind the frontend. A refusal becomes the 503 that vLLM's servers answer."""

    @wraps(add_request)
    async def call(self: AsyncLLM, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        front = VllmFrontend.of(self)
        try:
            async with front.entered(past=front.is_ours(request_id)):
                wanted = (getattr(params, "extra_args", None) or {}).get(XARG)
                if wanted is not None:
                    kwargs["lora_request"] = await front.lora_request(str(wanted))
                return await add_request(self, request_id, prompt, params, *args, **kwargs)
        except EngineQuarantined as error:
            raise GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from error
        except BridgeError as error:
            raise GracefulHTTPError(str(error), HTTPStatus.BAD_REQUEST) from error

    return call


def wrap_collective_rpc(collective_rpc: Coroutine) -> Coroutine:
    """Let the frontend answer those calls of `AsyncLLM.collective_rpc` that name `plugin.FRONT`, and count the jobs
    that pass."""

    @wraps(collective_rpc)
    async def call(
        self: AsyncLLM, method: str, timeout: float | None = None, args: Any = (), kwargs: Any = None
    ) -> Any:
        if method == FRONT:
            return [await answer(lambda: VllmFrontend.of(self), *args)]
        if method == METHOD:
            VllmFrontend.of(self).jobs += 1
        return await collective_rpc(self, method, timeout, args, kwargs)

    return call
