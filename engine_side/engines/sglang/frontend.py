"""What stands in front of an SGLang engine: in the process where its requests come in, on its event loop.

It hangs on the tokenizer manager, through which every request goes, whether it came over HTTP or from a call. A bridge
in that process calls it; that of another process reaches it through the server's own `/weights_checker`, of which
`door` gives it what is for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

from bridge.errors import ConfigError, DeadlineExceeded, ProtocolError
from bridge.protocol.codec import Completion
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.frontend import Frontend, pack_error, quarantine_error
from engine_side.engines.common.published_state import CURRENT, lora_not_loaded
from engine_side.engines.sglang.common import Books, read_answer
from engine_side.engines.sglang.gate import Gate, Refused
from engine_side.engines.sglang.requests import completion, request
from engine_side.engines.sglang.scheduler import ACTION, ADAPTERS, FRONT, JOB

log = logging.getLogger(__name__)

OURS: ContextVar[bool] = ContextVar("weighbridge_ours", default=False)
"""Set in tasks whose requests are the bridge's own: they pass the gate."""
_KEY = "_weighbridge_front"
_TURN = "_weighbridge_turn"
_POLL_S = 0.02
_END_S = 20.0


class Front(Frontend):
    """One per tokenizer manager. Every method runs in its event loop."""

    name = "SGLang"
    published: Books

    def __init__(self, manager: Any) -> None:
        """Raises ConfigError for an engine that somebody has paused: callers who wait could not be told."""
        super().__init__()
        if manager.is_pause:
            raise ConfigError(
                "the engine is paused",
                where="SGLang",
                got="pause_generation by somebody else",
                remedy="continue_generation, then try again",
            )
        self._manager = manager
        self.published = Books()
        self._gate = manager.is_pause_cond = Gate(self._passes)
        self._resolve = manager._validate_and_resolve_lora
        manager._validate_and_resolve_lora = self._resolved
        self._retiring: set[asyncio.Task[None]] = set()

    @classmethod
    def of(cls, manager: Any) -> Front:
        """The front of this tokenizer manager, hung there if it has none. Raises ConfigError for a paused one."""
        found = vars(manager).get(_KEY)
        if not isinstance(found, Front):
            found = vars(manager)[_KEY] = cls(manager)
        return found

    def _passes(self, runs: bool) -> bool:
        """May a request pass that waits for the engine to run? Raises EngineQuarantined while the engine refuses."""
        if OURS.get():
            return True
        if self.reason is not None:
            raise Refused(self.name, self.reason)
        return runs and not self._gate.shut

    # ---- the engine's part of what a bridge asks -----------------------------------------------------------------

    def _facts(self) -> tuple[str, bytes, int]:
        import sglang

        return str(sglang.__version__), b"", int(self._manager.server_args.tokenizer_worker_num)

    @property
    def _held(self) -> bool:
        return self._gate.shut

    async def _list_loras(self) -> tuple[str, ...]:
        return tuple(await self._loaded())

    async def _loaded(self) -> dict[str, str]:
        """Name -> SGLang's id of the adapters that the ranks hold."""
        if not self._manager.server_args.enable_lora:
            return {}
        return read_answer(self.name, *await self._ask_ranks(ADAPTERS)).adapters

    async def _ask_ranks(self, verb: str) -> tuple[bool, str]:
        from sglang.srt.managers.io_struct import CheckWeightsReqInput

        words = CheckWeightsReqInput(action=ACTION, skip_tensor_list=[verb, ""])
        ok, message, *_ = await self._manager.check_weights(words)
        return bool(ok), str(message)

    def _count_unfinished(self) -> int:
        """Requests that have passed the gate."""
        return int(self._manager.model_update_lock._readers)

    def _require_running(self) -> None:
        """Raises ConfigError while somebody else has the engine paused: what is asked of it would wait for them."""
        if self._manager.is_pause and not self.published.paused and self.reason is None:
            raise ConfigError(
                "the engine is paused",
                where=self.name,
                got="pause_generation by somebody else",
                remedy="continue_generation first, then try again",
            )

    async def _close_gate(self) -> None:
        self._require_running()
        async with self._gate:
            self._gate.shut = True

    async def _open_gate(self) -> None:
        async with self._gate:
            self._gate.shut = False
            self._gate.notify_all()

    async def _stop_engine(self) -> None:
        """Also what passed the gate and has not reached the scheduler yet."""
        from sglang.srt.managers.io_struct import PauseGenerationReqInput, UpdateWeightVersionReqInput

        self._manager.auto_create_handle_loop()
        await self._manager.pause_generation(PauseGenerationReqInput(mode="retract"))
        label = UpdateWeightVersionReqInput(new_version="quarantined", abort_all_requests=False)
        await self._manager.update_weight_version(label)
        try:
            async with asyncio.timeout(_END_S):
                self._manager.abort_request(abort_all=True)
                while await self._manager.model_update_lock.is_locked():
                    await asyncio.sleep(_POLL_S)
                    self._manager.abort_request(abort_all=True)
        except TimeoutError:
            log.error("requests of an engine that is to serve nothing did not end in %s s", _END_S)

    async def _resume_engine(self) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        await self._manager.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))

    # ---- generation ----------------------------------------------------------------------------------------------

    async def _generate(self, asked: msg.Generate) -> list[Completion]:
        """`past_gate` passes; all others wait as callers do. "current" is what is published when the request begins."""
        if not asked.prompts:
            return []
        if asked.past_gate:
            self._require_running()
        OURS.set(asked.past_gate)
        ids = [f"weighbridge-{uuid4().hex}" for _ in asked.prompts]
        try:
            async with asyncio.timeout(asked.timeout_s):
                async with self._gate:
                    await self._gate.wait_for(lambda: not self._manager.is_pause)
                name = await self._asked_for(asked)
                stream = self._manager.generate_request(request(asked.prompts, asked.sampling, name, ids), None)
                return [completion(output) for output in await anext(stream)]
        except TimeoutError:
            raise DeadlineExceeded("requests of the bridge did not finish", where=self.name) from None
        except Refused as error:
            raise quarantine_error(self.name, error.got or "") from None

    async def _resolved(self, asked: Any) -> None:
        """In place of SGLang's own: a request may name "current" or "base" as its `lora_path`."""
        known = self._manager.lora_registry.get_all_adapters() if asked.lora_path else {}

        def meant(word: str | None) -> str | None:
            return word if word is None or word in known else self.published.resolve_lora(word)

        if isinstance(asked.lora_path, list):
            named = [meant(word) for word in asked.lora_path]
            asked.lora_path = named if any(named) else None
        else:
            asked.lora_path = meant(asked.lora_path)
        await self._resolve(asked)

    async def _asked_for(self, asked: msg.Generate) -> str | None:
        if asked.lora == CURRENT and not asked.past_gate and self._manager.server_args.enable_lora:
            return CURRENT  # resolved behind the gate: a push may begin before the request is there
        name = self.published.resolve_lora(asked.lora)
        if name is None:
            return None
        if asked.past_gate:
            await self._make_known(name)
        elif name not in self._manager.lora_registry.get_all_adapters():
            raise lora_not_loaded(name)
        return name

    # ---- adapters ------------------------------------------------------------------------------------------------

    async def _publish(self, version: int, adapter: str | None) -> None:
        await self._settle()
        if adapter is not None:
            await self._make_known(adapter)
        await super()._publish(version, adapter)

    async def _make_known(self, name: str) -> None:
        """Let requests ask for an adapter that the ranks hold: SGLang's front end knows only what it loaded itself."""
        from sglang.srt.lora.lora_registry import LoRARef

        registry = self._manager.lora_registry
        if name in self.published.known or name in registry.get_all_adapters():
            return
        held = await self._loaded()
        if name not in held:
            raise lora_not_loaded(name)
        await registry.register(LoRARef(lora_id=held[name], lora_name=name, lora_path="memory", pinned=True))
        self.published.known.add(name)

    async def _settle(self) -> None:
        """Forget adapters that were dropped in the ranks before they served."""
        if self.published.known:
            for name in self.published.known.difference(await self._loaded()):
                self.published.known.discard(name)
                if name in self._manager.lora_registry.get_all_adapters():  # its user may have unloaded it
                    await self._manager.lora_registry.unregister(name)

    async def _end_requests(self, adapters: Iterable[str]) -> None:
        names = frozenset(adapters)
        for rid, state in list(self._manager.rid_to_state.items()):
            if getattr(state.obj, "lora_path", None) in names:
                self._manager.abort_request(rid)

    async def _retire_loras(self, adapters: Iterable[str]) -> None:
        """SGLang drops an adapter when its last request has ended; waited for only where there is none."""
        held = await self._loaded()
        for name in adapters:
            if name not in held:
                continue
            await self._make_known(name)
            self.published.known.discard(name)
            counter = self._manager.lora_registry._counters.get(held[name])
            task = asyncio.create_task(self._unload(name))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
            if counter is None or counter.value == 0:
                await task

    async def _unload(self, name: str) -> None:
        from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

        answer = await self._manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=name))
        if not answer.success:
            raise ProtocolError("SGLang did not unload an adapter", where=name, got=str(answer.error_message))


async def door(original: Callable[..., Any], self: Any, obj: Any, request: Any = None) -> Any:
    """AROUND `TokenizerControlMixin.check_weights`, in the process where requests come in: what is for the front stays
    there, the rest goes on to the schedulers."""
    if obj.action == ACTION and obj.skip_tensor_list:
        verb, text = obj.skip_tensor_list
        if verb == FRONT:
            return True, await _answered(self, text), None, None
        if verb == JOB:
            Front.of(self).jobs += 1
        return await _in_turn(self, original(self, obj, request))
    return await original(self, obj, request)


async def _in_turn(manager: Any, asking: Coroutine[Any, Any, Any]) -> Any:
    """One request of the bridge at a time, each until it is answered, even when nobody waits any more: SGLang takes the
    next answer that comes for the answer to the last question. Who stops waiting before his turn has asked nothing."""
    turn: asyncio.Lock = vars(manager).setdefault(_TURN, asyncio.Lock())
    try:
        await turn.acquire()
    except BaseException:
        asking.close()
        raise
    task = asyncio.ensure_future(asking)
    task.add_done_callback(lambda done: turn.release())
    return await asyncio.shield(task)


async def _answered(manager: Any, frame: str) -> str:
    try:
        front = Front.of(manager)
    except ConfigError as error:
        return pack_error(error)
    return await front.answer(frame)
