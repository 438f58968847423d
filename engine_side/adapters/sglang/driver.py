"""The driver half for a `sglang.Engine` of this process; its schedulers are processes of their own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any
from uuid import uuid4

from bridge.deadline import Deadline
from bridge.errors import ConfigError, DeadlineExceeded, NotFound, ProtocolError
from bridge.wire import Completion, Sampling
from engine_side.adapters import claim
from engine_side.adapters.base import Prompts
from engine_side.adapters.sglang.common import BASE, CALL_S, CURRENT, MODES, Arguments, Books, SglangAdapter
from engine_side.adapters.sglang.gate import OURS, Gate
from engine_side.adapters.sglang.line import Line
from engine_side.adapters.sglang.requests import completion, request
from engine_side.adapters.sglang.scheduler import ACTION, OPEN, SHUT
from engine_side.adapters.sglang.versions import check_version

_BOOKS = "_weighbridge_books"
_POLL_S = 0.005


class EngineAdapter(SglangAdapter):
    """Over one Engine, which stays its owner's unless `owned`."""

    def __init__(self, engine: Any, *, owned: bool = False) -> None:
        arguments = Arguments.read(partial(getattr, engine.server_args), "sglang.Engine")
        super().__init__(arguments, vars(engine).setdefault(_BOOKS, Books()), "sglang.Engine")
        self.engine = engine
        self._owned = owned
        self._manager = engine.tokenizer_manager
        self._gate = Gate.of(self._manager)
        self._line: Line | None = Line.of(engine)
        self._line.take()
        try:
            self.facts()
        except BaseException:
            self._hang_up()
            raise

    @property
    def line(self) -> Line:
        if self._line is None:
            raise ProtocolError("this adapter was closed", where="sglang.Engine")
        return self._line

    def _send(self, verb: str, text: str, deadline: Deadline) -> tuple[bool, str]:
        from sglang.srt.managers.io_struct import CheckWeightsReqInput

        words = CheckWeightsReqInput(action=ACTION, skip_tensor_list=[verb, text])
        ok, message, *_ = self.line.run(
            self._manager.check_weights(words), deadline, f"{verb!r} of SGLang's schedulers"
        )
        return bool(ok), str(message)

    # ---- pause and caches ----------------------------------------------------------------------------------------

    def pause(self, inflight: str, deadline: Deadline) -> None:
        """Callers wait, what runs is drained, aborted or taken back to be computed again."""
        if inflight not in MODES:
            raise ConfigError("no such mode", where="inflight", expected=" | ".join(MODES), got=repr(inflight))
        self.line.run(self._pause(inflight, deadline), deadline, "pausing")
        while not self.facts().paused:  # it has no answer of its own
            deadline.check("SGLang's pause")
        self.books.paused = True
        if inflight == "abort":
            self.line.run(self._call(self._manager.abort_request, abort_all=True), deadline, "aborting")

    async def _pause(self, inflight: str, deadline: Deadline) -> None:
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        self._manager.auto_create_handle_loop()
        if inflight == "drain" and not self.books.paused:
            async with self._gate:
                self._manager.is_pause = True
            try:
                while await self._manager.model_update_lock.is_locked():
                    deadline.check("requests in flight did not finish")
                    await asyncio.sleep(_POLL_S)
            except BaseException:
                async with self._gate:
                    self._manager.is_pause = False
                    self._gate.notify_all()
                raise
        await self._manager.pause_generation(PauseGenerationReqInput(mode="retract"))

    @staticmethod
    async def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def resume(self) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        if not self.books.paused:
            return
        empty = self.arguments.device != "cpu"
        go_on = self._manager.continue_generation(ContinueGenerationReqInput(torch_empty_cache=empty))
        self.books.paused = False
        self.line.run(go_on, Deadline.after(CALL_S), "resuming")

    def reset_caches(self) -> bool:
        answer = self.line.run(self._manager.flush_cache(), Deadline.after(CALL_S), "flushing caches")
        return bool(answer.success)

    # ---- claim, refusal, versions --------------------------------------------------------------------------------

    def claim(self, owner: str) -> None:
        """Raises Busy while another bridge drives the engine."""
        try:
            claim.take(self.engine, self, owner)
            self._warm()
        except BaseException:
            self._hang_up()
            raise

    def _warm(self) -> None:
        """Two tokens: the first forward of some of SGLang's models changes their module tree, which has to be over
        before anybody looks whether a push leaves it as it was."""
        if self.refusal is None and not self.books.paused:
            self._generated([[0, 0]], Sampling(max_tokens=2, temperature=0.0), BASE, Deadline.after(CALL_S), ours=True)

    @property
    def refusal(self) -> str | None:
        return self._gate.reason

    def refuse(self, reason: str | None) -> None:
        """Callers that wait in a push get the refusal as well."""
        self.line.run(self._gate.refuse(reason), Deadline.after(CALL_S), "closing the gate")

    def publish(self, version: int, adapter: str | None = None) -> None:
        """`meta_info["weight_version"]` shows the version from now on."""
        from sglang.srt.managers.io_struct import UpdateWeightVersionReqInput

        self._settle()
        if adapter is not None:
            self._make_known(adapter)
        label = UpdateWeightVersionReqInput(new_version=str(version), abort_all_requests=False)
        self.line.run(self._manager.update_weight_version(label), Deadline.after(CALL_S), "publishing")
        self.books.version, self.books.adapter = version, adapter

    # ---- generation ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling,
        adapter: str = CURRENT,
        *,
        past_gate: bool = False,
        deadline: Deadline | None = None,
    ) -> list[Completion]:
        """Past the gate of a paused engine scheduling is opened for these requests alone."""
        if not prompts:
            return []
        if not past_gate:
            return self._generated(prompts, sampling, adapter, deadline, ours=False)
        if adapter not in (CURRENT, BASE):
            self._make_known(adapter)
        if not self.books.paused:
            return self._generated(prompts, sampling, adapter, deadline, ours=True)
        self.ask(OPEN, deadline=deadline)
        try:
            return self._generated(prompts, sampling, adapter, deadline, ours=True)
        finally:
            self.ask(SHUT)

    def _generated(
        self, prompts: Prompts, sampling: Sampling, adapter: str, deadline: Deadline | None, *, ours: bool
    ) -> list[Completion]:
        ids = [f"weighbridge-{uuid4().hex}" for _ in prompts]
        work = self._generate(prompts, sampling, adapter, ids, ours)
        try:
            outputs = self.line.run(work, deadline, "generation")
        except DeadlineExceeded:
            for name in ids:
                self.line.run(self._call(self._manager.abort_request, name), Deadline.after(CALL_S), "aborting")
            raise
        return [completion(output) for output in outputs]

    async def _generate(
        self, prompts: Prompts, sampling: Sampling, adapter: str, ids: list[str], ours: bool
    ) -> list[Any]:
        OURS.set(ours)
        async with self._gate:  # "current" is what is published when the request begins, not when it was asked for
            await self._gate.wait_for(lambda: not self._manager.is_pause)
        name = self.books.meant(adapter)
        if name is not None and name not in self._manager.lora_registry.get_all_adapters():
            raise NotFound("this engine holds no such adapter", where="adapter", got=repr(name))
        stream = self._manager.generate_request(request(prompts, sampling, name, ids), None)
        found: list[Any] = await stream.__anext__()
        return found

    # ---- adapters ------------------------------------------------------------------------------------------------

    def _make_known(self, name: str) -> None:
        """Let requests ask for an adapter that the ranks hold: SGLang's front end knows only what it loaded itself."""
        if name in self.books.known:
            return
        held = self.held()
        if name not in held:
            raise NotFound("this engine holds no such adapter", where="adapter", got=repr(name))
        self.line.run(self._register(name, held[name]), Deadline.after(CALL_S), "registering an adapter")

    async def _register(self, name: str, lora_id: str) -> None:
        from sglang.srt.lora.lora_registry import LoRARef

        registry = self._manager.lora_registry
        if name not in registry.get_all_adapters():
            await registry.register(LoRARef(lora_id=lora_id, lora_name=name, lora_path="memory", pinned=True))
            self.books.known.add(name)

    def _settle(self) -> None:
        """Forget adapters that were dropped in the ranks before they served."""
        if self.books.known:
            for name in self.books.known.difference(self.held()):
                self.books.known.discard(name)
                self.line.run(self._manager.lora_registry.unregister(name), Deadline.after(CALL_S), "unregistering")

    def end_users(self, names: Iterable[str]) -> None:
        self.line.run(self._end_users(frozenset(names)), Deadline.after(CALL_S), "ending requests")

    async def _end_users(self, names: frozenset[str]) -> None:
        for rid, state in list(self._manager.rid_to_state.items()):
            if getattr(state.obj, "lora_path", None) in names:
                self._manager.abort_request(rid)

    def retire(self, names: Iterable[str]) -> None:
        """SGLang drops an adapter when its last request has ended; waited for only where there is none."""
        held = self.held()
        for name in names:
            if name in held:
                self._make_known(name)
                self.books.known.discard(name)
                idle = self.line.run(self._unused(held[name]), Deadline.after(CALL_S), "retiring an adapter")
                done = self.line.start(self._unload(name))
                if idle:
                    self.line._wait(done, Deadline.after(CALL_S), "unloading an adapter")

    async def _unused(self, lora_id: str) -> bool:
        counter = self._manager.lora_registry._counters.get(lora_id)
        return counter is None or counter.value == 0

    async def _unload(self, name: str) -> None:
        from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

        answer = await self._manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=name))
        if not answer.success:
            raise ProtocolError("SGLang did not unload an adapter", where=name, got=str(answer.error_message))

    def close(self) -> None:
        """The engine runs on, or goes on refusing. Idempotent."""
        claim.give_up(self.engine, self)
        self._hang_up()
        if self._owned:
            self.engine.shutdown()
            self._owned = False

    def _hang_up(self) -> None:
        if self._line is not None:
            line, self._line = self._line, None
            line.give_up()


def attach(engine: object, canonical: object = None) -> EngineAdapter | None:
    """The adapter of a `sglang.Engine` of this process; None for anything else. Raises ConfigError for one that was
    started without the loader or the plugin, or that this adapter cannot drive. Does not import SGLang."""
    module = sys.modules.get("sglang.srt.entrypoints.engine")
    if module is None or not isinstance(engine, module.Engine):
        return None
    check_version(str(module.__version__))
    return EngineAdapter(engine)
