"""Stand before an SGLang engine in the process where its requests come in, on its event loop.

The frontend hangs on the tokenizer manager, through which every request goes, whether it came over HTTP or from a call:
all wait there on one condition, `is_pause_cond`, whose place the frontend's gate takes before they leave for the
scheduler. A bridge in that process calls it directly; one in another process reaches it through the server's
`/weights_checker` route, whose requests `answer_check_weights` hands over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from contextvars import ContextVar
from typing import Any

from fastapi import HTTPException

from bridge.errors import DeadlineExceeded, EngineQuarantined, ProtocolError
from bridge.protocol.codec import Completion
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.frontend import Frontend, answer, quarantine_error
from engine_side.engines.common.published_state import CURRENT, asleep_error, lora_not_loaded, parse_version
from engine_side.engines.sglang.remote import RESUME
from engine_side.engines.sglang.scheduler_messages import (
    ACTION,
    FRONT,
    JOB,
    LORAS,
    call_manager,
    check_weights,
    read_answer,
)

log = logging.getLogger(__name__)

PASSES_GATE: ContextVar[bool] = ContextVar("weighbridge_passes_gate", default=False)
"""Set in tasks whose requests are the bridge's own: they pass the gate of a paused engine."""
_TURN = "_weighbridge_turn"
_POLL_S = 0.02
_TURN_S = 600.0
"""Seconds that a request to the schedulers waits for the one before it."""
_END_S = 20.0
"""Seconds in which requests of a refusing engine have to end, and an idle LoRA has to be unloaded."""


class QuarantinedRequest(EngineQuarantined, HTTPException):  # type: ignore[misc]  # fastapi is not looked into
    """The refusal of a request by a quarantined engine; SGLang's server answers it with status 503."""

    def __init__(self, where: str, reason: str) -> None:
        error = quarantine_error(where, reason)
        super().__init__(error.what, where=error.where, got=error.got, remedy=error.remedy)
        self.status_code, self.detail, self.headers = 503, self._message(), None

    def __str__(self) -> str:
        return self._message()


class SglangGate(asyncio.Condition):
    """Stands in for `is_pause_cond` of one tokenizer manager. Used in the manager's event loop only.

    Attributes:
        shut: requests wait, whether the engine is paused or not.
    """

    def __init__(self, passes: Callable[[bool], bool]) -> None:
        """Make an open gate.

        Args:
            passes: called with whether the engine runs; returns whether the request passes, or raises to refuse it.
        """
        super().__init__()
        self._passes = passes
        self.shut = False

    async def wait_for(self, predicate: Callable[[], bool]) -> bool:  # type: ignore[override]
        """Wait until the request passes. Raises QuarantinedRequest while the engine refuses, also for requests that
        waited before."""
        return await super().wait_for(lambda: self._passes(predicate()))


class SglangFrontend(Frontend):
    """The frontend of one tokenizer manager, made by `SglangFrontend.of`. Every method runs in the manager's loop."""

    name = "SGLang"

    def __init__(self, manager: Any) -> None:
        """Raises ConfigError for a paused engine."""
        super().__init__()
        if manager.is_pause:  # requests that wait already could not be refused
            raise asleep_error(self.name, RESUME)
        self._manager = manager
        self._known: set[str] = set()
        """LoRAs that the bridge registered with SGLang's tokenizer manager."""
        self._gate = manager.is_pause_cond = SglangGate(self._passes)
        self._sglang_resolve = manager._validate_and_resolve_lora
        manager._validate_and_resolve_lora = self._resolve_lora
        self._retiring: set[asyncio.Task[None]] = set()

    def _passes(self, runs: bool) -> bool:
        """Return whether a request passes that waits until the engine `runs`; raises to refuse it."""
        if PASSES_GATE.get():
            return True
        if self.reason is not None:
            raise QuarantinedRequest(self.name, self.reason)
        return runs and not self._gate.shut

    # ---- SGLang's part of the frontend -------------------------------------------------------------------------

    def _facts(self) -> tuple[bytes, int]:
        return b"", int(self._manager.server_args.tokenizer_worker_num)

    @property
    def _held(self) -> bool:
        return self._gate.shut

    async def _list_loras(self) -> tuple[str, ...]:
        return tuple(await self._loaded())

    async def _loaded(self) -> dict[str, str]:
        """Ask the ranks for the LoRAs that they hold: SGLang's id by name."""
        if not self._manager.server_args.enable_lora:
            return {}
        return read_answer(self.name, *await check_weights(self._manager, [LORAS, ""])).loras

    def _count_unfinished(self) -> int:
        return int(self._manager.model_update_lock._readers)  # requests that have passed the gate

    def _require_running(self) -> None:
        if self._manager.is_pause and not self.published.paused and self.reason is None:
            raise asleep_error(self.name, RESUME)

    async def _close_gate(self) -> None:
        self._require_running()
        async with self._gate:
            self._gate.shut = True

    async def _open_gate(self) -> None:
        async with self._gate:
            self._gate.shut = False
            self._gate.notify_all()

    async def _stop_engine(self) -> None:
        await call_manager(self._manager, "pause_generation", mode="retract")
        await call_manager(self._manager, "update_weight_version", new_version="quarantined", abort_all_requests=False)
        try:
            async with asyncio.timeout(_END_S):
                self._manager.abort_request(abort_all=True)
                # again and again: a request may have passed the gate and not have reached the scheduler yet
                while await self._manager.model_update_lock.is_locked():
                    await asyncio.sleep(_POLL_S)
                    self._manager.abort_request(abort_all=True)
        except TimeoutError:
            log.error("requests inside a quarantined SGLang engine did not end within %s s after abort_request", _END_S)

    async def _resume_engine(self) -> None:
        await call_manager(self._manager, "continue_generation", torch_empty_cache=False)

    # ---- generation ----------------------------------------------------------------------------------------------

    async def _generate(self, asked: msg.Generate) -> list[Completion]:
        if not asked.prompts:
            return []
        if asked.past_gate:
            self._require_running()
        PASSES_GATE.set(asked.past_gate)
        try:
            async with self._gate:
                await self._gate.wait_for(lambda: not self._manager.is_pause)
            request = _generate_request(asked, await self._lora_of(asked))
            outputs = await anext(self._manager.generate_request(request, None))
        except QuarantinedRequest as error:
            raise quarantine_error(self.name, error.got or "") from None
        return [_read_completion(output) for output in outputs]

    async def _lora_of(self, asked: msg.Generate) -> str | None:
        if asked.lora == CURRENT and not asked.past_gate and self._manager.server_args.enable_lora:
            return CURRENT  # resolved behind the gate: a push may begin before the request is there
        name = self.published.resolve_lora(asked.lora)
        if name is None:
            return None
        if asked.past_gate:
            await self._register(name)
        elif name not in self._manager.lora_registry.get_all_adapters():
            raise lora_not_loaded(name)
        return name

    async def _resolve_lora(self, asked: Any) -> None:
        """Wraps SGLang's `_validate_and_resolve_lora`: a request may name "current" or "base" as its `lora_path`."""
        loaded = self._manager.lora_registry.get_all_adapters() if asked.lora_path else {}
        several = isinstance(asked.lora_path, list)
        names = [
            name if name is None or name in loaded else self.published.resolve_lora(name)
            for name in (asked.lora_path if several else [asked.lora_path])
        ]
        asked.lora_path = names[0] if not several else names if any(names) else None
        await self._sglang_resolve(asked)

    # ---- LoRAs ---------------------------------------------------------------------------------------------------

    async def _publish(self, version: int, lora: str | None) -> None:
        for name in self._known.difference(await self._loaded()) if self._known else ():
            self._known.discard(name)  # it was dropped in the ranks before it served
            if name in self._manager.lora_registry.get_all_adapters():  # its user may have unloaded it
                await self._manager.lora_registry.unregister(name)
        if lora is not None:
            await self._register(lora)
        await super()._publish(version, lora)

    async def _register(self, name: str) -> None:
        """Let requests name a LoRA that the ranks hold: SGLang's registry knows only those that it loaded itself."""
        from sglang.srt.lora.lora_registry import LoRARef

        registry = self._manager.lora_registry
        if name in self._known or name in registry.get_all_adapters():
            return
        loaded = await self._loaded()
        if name not in loaded:
            raise lora_not_loaded(name)
        await registry.register(LoRARef(lora_id=loaded[name], lora_name=name, lora_path="memory", pinned=True))
        self._known.add(name)

    async def _end_requests(self, loras: Iterable[str]) -> None:
        names = frozenset(loras)
        for rid, state in list(self._manager.rid_to_state.items()):
            if getattr(state.obj, "lora_path", None) in names:
                self._manager.abort_request(rid)

    async def _retire_loras(self, loras: Iterable[str]) -> None:
        """Unload LoRAs, each as soon as its last request has ended. Waits only for LoRAs without requests; raises
        DeadlineExceeded when the schedulers do not drop one of these within 20 s."""
        loaded = await self._loaded()
        for name in loras:
            if name not in loaded:
                continue
            await self._register(name)
            self._known.discard(name)
            counter = self._manager.lora_registry._counters.get(loaded[name])
            task = asyncio.create_task(self._unload(name))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
            if (counter is None or counter.value == 0) and not self._manager.lora_update_lock.locked():
                try:
                    async with asyncio.timeout(_END_S):
                        await asyncio.shield(task)
                except TimeoutError:
                    raise DeadlineExceeded(
                        "SGLang's schedulers did not unload an adapter that no request uses",
                        where=name,
                        expected=f"an answer to unload_lora_adapter within {_END_S:g} s",
                        got="none",
                        remedy="look in SGLang's log for a scheduler that hangs",
                    ) from None

    async def _unload(self, name: str) -> None:
        from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

        answer = await self._manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=name))
        if not answer.success:
            raise ProtocolError(
                "SGLang did not unload an adapter",
                where=name,
                expected="success",
                got=str(answer.error_message),
                remedy=f"unload it with engine.unload_lora_adapter({name!r}) to free its slot",
            )


def _generate_request(asked: msg.Generate, lora: str | None) -> Any:
    """Make one `GenerateReqInput` for a batch of prompts."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    sampling = asked.sampling
    parameters: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop_token_ids": list(sampling.stop_token_ids),
    }
    if sampling.seed is not None:
        parameters["sampling_seed"] = sampling.seed
    return GenerateReqInput(
        input_ids=[list(prompt) for prompt in asked.prompts],
        sampling_params=[dict(parameters) for _ in asked.prompts],
        return_logprob=True,
        lora_path=[lora] * len(asked.prompts) if lora is not None else None,
    )


def _read_completion(output: Any) -> Completion:
    """Read one of SGLang's outputs. Its version is the one that the first token was computed with."""
    meta = output["meta_info"]
    tokens = tuple(int(token) for token in output["output_ids"])
    rows = meta.get("output_token_logprobs") or ()
    spans = meta.get("weight_versions") or ()
    label = spans[0]["version"] if spans else meta.get("weight_version")
    reason = (meta.get("finish_reason") or {}).get("type", "abort")
    return Completion(tokens, tuple(float(row[0]) for row in rows[: len(tokens)]), reason, parse_version(label))


async def answer_check_weights(original: Callable[..., Any], self: Any, obj: Any, request: Any = None) -> Any:
    """AROUND hook of `TokenizerControlMixin.check_weights`: answer requests for the frontend here, and send the
    bridge's requests for the ranks to the schedulers one at a time."""
    if obj.action == ACTION and obj.skip_tensor_list:
        verb, text = obj.skip_tensor_list
        if verb == FRONT:
            return True, await answer(lambda: SglangFrontend.of(self), text), None, None
        if verb == JOB:
            SglangFrontend.of(self).jobs += 1
        return await _in_turn(self, original(self, obj, request))
    return await original(self, obj, request)


async def _in_turn(manager: Any, asking: Coroutine[Any, Any, Any]) -> Any:
    """Wait until the request before this one is answered, even if nobody waits for that answer any more: SGLang takes
    the next answer that comes for the answer to its last question. A caller who stops waiting before his turn has asked
    nothing. Raises DeadlineExceeded when the request before is not answered within 600 s."""
    turn: asyncio.Lock = vars(manager).setdefault(_TURN, asyncio.Lock())
    try:
        async with asyncio.timeout(_TURN_S):
            await turn.acquire()
    except BaseException as error:
        asking.close()
        if not isinstance(error, TimeoutError):
            raise
        raise DeadlineExceeded(
            "SGLang's schedulers have not answered an earlier request of the bridge",
            where="check_weights",
            expected=f"an answer within {_TURN_S:g} s",
            got="none",
            remedy="look in SGLang's log for a scheduler that hangs, and start the engine again",
        ) from None
    task = asyncio.ensure_future(asking)
    task.add_done_callback(lambda done: turn.release())
    return await asyncio.shield(task)
