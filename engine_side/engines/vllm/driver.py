"""The driver half for a `vllm.LLM` of this process, whether its engine core runs here or in a process of its own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from bridge.errors import BridgeError, ConfigError, DeadlineExceeded, PeerLost
from bridge.protocol.codec import Completion, Sampling
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import claim
from engine_side.engines.common.frontend_client import CALL_S
from engine_side.engines.common.published_state import CURRENT, check_mode, lora_not_loaded, number
from engine_side.engines.vllm.common import VllmDriver, VllmPublishedState, asleep, completion, keeping, parameters
from engine_side.engines.vllm.facts import check_facts, facts_of
from engine_side.engines.vllm.gate import VllmGate, running_loras
from engine_side.engines.vllm.liveness import answered, lost
from engine_side.engines.vllm.plugin import ADAPTERS, METHOD
from engine_side.engines.vllm.versions import check_version
from engine_side.protocol import Prompts

if TYPE_CHECKING:
    from vllm import LLM

log = logging.getLogger(__name__)
T = TypeVar("T")
_BOOKS = "_weighbridge_books"
_LATE_S = 3.0
"""How long an engine that did not stop in time is waited for when it is told to go on."""


class LLMDriver(VllmDriver):
    """Over one LLM, which stays its owner's."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._engine: Any = llm.llm_engine
        self._gate: VllmGate | None = None
        super().__init__(facts_of(self._engine.vllm_config), "vllm.LLM")
        check_facts(
            self.facts,
            where="vllm.LLM",
            expected='weight_transfer_config=WeightTransferConfig(backend="bridge")',
            remedy='vllm.LLM(..., weight_transfer_config=vllm.config.WeightTransferConfig(backend="bridge"))',
        )
        self._books: VllmPublishedState = vars(self._engine).setdefault(_BOOKS, VllmPublishedState())

    @property
    def gate(self) -> VllmGate:
        if self._gate is None:
            self._gate = VllmGate.of(self._engine)
        return self._gate

    @property
    def in_process(self) -> bool:
        """Does the engine core run in this process?"""
        return hasattr(self._engine.engine_core, "engine_core")

    # ---- jobs ----------------------------------------------------------------------------------------------------

    def _run_job(self, job: bytes, deadline: Deadline) -> Sequence[Any]:
        try:
            with self.gate.between_steps(stepping_blocks=not self.in_process):
                said: Sequence[Any] = self._call(lambda: self.llm.collective_rpc(METHOD, args=(job,)), deadline)
        except BridgeError:
            raise
        except Exception as error:  # vLLM's own executor: dead workers, a closed engine
            raise PeerLost(
                "vLLM's workers cannot be reached", where="vllm.LLM", got=f"{type(error).__name__}: {error}"
            ) from error
        return said

    def _call(self, ask: Callable[[], T], deadline: Deadline | None = None) -> T:
        """One call to the engine core. Raises PeerLost, DeadlineExceeded for one in another process."""
        if self.in_process:
            return ask()
        from vllm.v1.engine.exceptions import EngineDeadError

        deadline = deadline or Deadline.after(CALL_S)
        try:
            return answered(self._engine.engine_core, ask, deadline, "vllm.LLM")
        except EngineDeadError as error:
            raise lost("vllm.LLM", str(error)) from error

    def _is_asleep(self) -> bool:
        """Did somebody else pause it? A push of ours that begins or ends meanwhile is none of it."""
        ours = self._books.paused or self.gate.held
        return not ours and bool(self._call(self._engine.is_sleeping)) and not (self._books.paused or self.gate.held)

    def _require_awake(self) -> None:
        if self._is_asleep() and self._is_asleep():  # once more: a push may have ended in between
            raise asleep("vllm.LLM", "llm.wake_up(), then try again")

    def _stop(self) -> None:
        """Nothing is scheduled any more."""
        self._call(lambda: self.llm.sleep(level=0, mode="keep"))
        self._books.paused = True

    def _go_on(self, deadline: Deadline | None = None) -> None:
        self._call(lambda: self.llm.wake_up(tags=["scheduling"]), deadline)

    def refuse_shared(self, storages: frozenset[int]) -> None:
        """Weights of an engine core of this process lie where the trainer's may."""
        if not self.in_process:
            return
        for name, address in _storages(self._engine):
            if address in storages:
                raise ConfigError(
                    "the trainer and the engine share storage",
                    where=name,
                    expected="an engine with weights of its own",
                    got=f"address {address:#x} on both sides",
                    remedy="clone one of them",
                    names=(name,),
                )

    # ---- pause and caches ----------------------------------------------------------------------------------------

    def pause(self, inflight: str, deadline: Deadline) -> None:
        """Callers wait, what runs is drained, aborted or kept; then all KV blocks are free: the canary needs them."""
        check_mode(inflight)
        self._require_awake()
        paused = self._books.paused
        try:
            self.gate.hold(deadline)
            if inflight == "drain" and not self._books.paused:
                self.gate.drain(deadline)
            with self.gate.between_steps(stepping_blocks=not self.in_process):
                if inflight == "abort":
                    self.gate.abort()
                if self.in_process and not self._books.paused:
                    self.gate.tidy()
                self._stop()
                self._free_blocks()
        except BaseException:
            if not paused:
                self._undo_pause()
            raise

    def _undo_pause(self) -> None:
        """Also of a stop that came too late: it is done all the same, and this after it."""
        try:
            with suppress(BridgeError):
                self._go_on(Deadline.after(_LATE_S))
            self._books.paused = False
        finally:
            self.gate.release()

    def resume(self) -> None:
        if self._books.paused:
            self._go_on()
            self._books.paused = False
        self._blocks_used = False
        self.gate.release()

    def reset_caches(self) -> bool:
        """Prefix, encoder and multimodal caches; what was kept is computed again under the new weights."""
        answer = self._reset_prefix_cache()
        self._call(self.llm.reset_mm_cache)
        self._call(self._engine.reset_encoder_cache)
        return answer

    def _reset_prefix_cache(self) -> bool:
        return bool(self._call(lambda: self.llm.reset_prefix_cache(reset_running_requests=True)))

    # ---- claim, refusal, versions --------------------------------------------------------------------------------

    def claim(self, owner: str) -> None:
        """Raises ConfigError for an engine that is asleep: its weights are not there."""
        claim.take(self.llm, self, owner)
        if self.refusal is None and self._is_asleep():
            claim.give_up(self.llm, self)
            raise asleep("vllm.LLM", "llm.wake_up(), then try again")

    @property
    def refusal(self) -> str | None:
        return self.gate.reason

    def refuse(self, reason: str | None) -> None:
        """Callers that wait in a push get the refusal as well. What is inside the engine is ended: whoever wakes it up
        by accident has it compute nothing."""
        self.gate.reason = reason
        if reason is None:
            return
        try:
            with self.gate.between_steps(stepping_blocks=not self.in_process):
                self.gate.abort(rollouts=False)  # they learn by themselves, and why
                self._stop()
        except (PeerLost, DeadlineExceeded) as error:
            log.warning("the engine could not be paused: %s", error)
        finally:
            self.gate.release()

    def publish(self, version: int, adapter: str | None = None) -> None:
        """`llm.llm_engine.get_weight_version()` and the spans on outputs show the version from now on."""
        if adapter is not None and adapter not in self.adapters():
            raise lora_not_loaded(adapter)
        self._call(lambda: self._engine.set_weight_version(str(version)))
        self._books.version, self._books.adapter = version, adapter

    @property
    def published(self) -> tuple[int, str | None]:
        return self._books.version, self._books.adapter

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
        """Past the gate of a paused engine scheduling is opened, which is for everybody inside: raises Busy where there
        are kept requests."""
        if not past_gate:
            self.gate.enter(deadline)
        self._require_awake()
        if sampling.max_tokens == 0:
            label = self._call(self._engine.get_weight_version)
            return [Completion((), (), "length", number(label)) for _ in prompts]
        wanted = parameters(sampling)
        lora = cache(partial(self._lora_request, adapter))  # asked for once no push can begin any more

        def add(add_request: Any, k: int) -> str:
            name = f"bridge-{uuid4().hex}"
            return str(add_request(name, {"prompt_token_ids": list(prompts[k])}, wanted, lora_request=lora()))

        opened = self._books.paused and past_gate
        if opened:
            if self.gate.keeps:
                raise keeping("vllm.LLM")
            self._go_on()
        try:
            outputs = self._run(add, len(prompts), deadline, past_gate)
        finally:
            if opened:
                self._stop()
                self._blocks_used = True
        return [completion(output) for output in outputs]

    def _run(self, add: Callable[..., str], count: int, deadline: Deadline | None, past_gate: bool) -> list[Any]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return self.gate.run(add, count, deadline, past=past_gate)
        except EngineDeadError as error:
            raise lost("vllm.LLM", str(error)) from error

    def _lora_request(self, adapter: str) -> Any:
        name = self._books.meant(adapter)
        if name is None:
            return None
        from engine_side.engines.vllm.lora_slots import lora_request

        held = self._held()
        if name not in held:
            raise lora_not_loaded(name)
        return lora_request(name, held[name])

    # ---- adapters ------------------------------------------------------------------------------------------------

    def adapters(self) -> tuple[str, ...]:
        """Those that the bridge loaded, then `#id` for those that vLLM read from folders: it keeps no names."""
        if self.lora is None:
            return ()
        held = self._held()
        others = sorted(set(self._call(self._engine.list_loras)) - set(held.values()))
        return (*held, *(f"#{number}" for number in others))

    def _held(self) -> dict[str, int]:
        if self.lora is None:
            return {}
        with self.gate.between_steps(stepping_blocks=not self.in_process):
            found: dict[str, int] = self._call(lambda: self.llm.collective_rpc(ADAPTERS))[0]
        return found

    def end_users(self, names: Iterable[str]) -> None:
        with self.gate.between_steps(stepping_blocks=not self.in_process):
            self.gate.abort(frozenset(names))

    def retire(self, names: Iterable[str]) -> None:
        """Those still in use go at the next call."""
        self._books.retiring |= set(names)
        if not self._books.retiring:
            return
        held, used = self._held(), running_loras(self._engine)
        for name in sorted(self._books.retiring.difference(used)):
            if name in held:
                self._call(partial(self._engine.remove_lora, held[name]))
            self._books.retiring.discard(name)

    def close(self) -> None:
        """The engine runs on, or goes on refusing."""
        if claim.give_up(self.llm, self):  # else the gate is that of another bridge, which has refused us
            self.gate.lift()


def attach(engine: object, canonical: object = None) -> LLMDriver | None:
    """The adapter of a `vllm.LLM` of this process; None for anything else. Raises ConfigError for one that was started
    without the backend, or that this adapter cannot drive. Does not import vLLM."""
    module = sys.modules.get("vllm.entrypoints.llm")
    if module is None or not isinstance(engine, module.LLM):
        return None
    check_version(str(sys.modules["vllm"].__version__))
    return LLMDriver(engine)


def _storages(engine: Any) -> Iterable[tuple[str, int]]:
    executor = engine.engine_core.engine_core.model_executor
    worker = getattr(executor, "driver_worker", None)
    runner = getattr(worker, "model_runner", None)
    if runner is None:
        return
    for name, tensor in runner.get_model().named_parameters():
        address = tensor.untyped_storage().data_ptr()
        if address:
            yield name, address
