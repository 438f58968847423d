"""The driver of a `vllm.LLM` of this process, whether its engine core runs here or in a process of its own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from bridge.errors import BridgeError, DeadlineExceeded, PeerLost
from bridge.protocol.codec import Completion, Sampling
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import claim
from engine_side.engines.common.frontend_client import CALL_S
from engine_side.engines.common.published_state import (
    CURRENT,
    PublishedState,
    asleep_error,
    lora_not_loaded,
    parse_version,
)
from engine_side.engines.common.refusals import require_apart, require_version
from engine_side.engines.vllm.common import (
    VllmDriver,
    kept_requests_error,
    list_loras,
    read_completion,
    request_lora,
    sampling_parameters,
)
from engine_side.engines.vllm.facts import check_facts, facts_of
from engine_side.engines.vllm.gate import VllmGate
from engine_side.engines.vllm.liveness import call_core, died_error
from engine_side.engines.vllm.plugin import LORAS
from engine_side.protocol import PromptBatch

if TYPE_CHECKING:
    from vllm import LLM

log = logging.getLogger(__name__)
_PUBLISHED = "_weighbridge_published"
_LATE_S = 3.0
"""Time for an engine that did not stop in time to obey the call that lets it go on."""


class LLMDriver(VllmDriver):
    """The driver of one LLM, which stays its owner's. Every method blocks; for a core in another process it raises
    PeerLost when that has ended, and DeadlineExceeded."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._engine: Any = llm.llm_engine
        facts = facts_of(self._engine.vllm_config)
        super().__init__(facts, "vllm.LLM")
        check_facts(
            facts,
            where=self.where,
            expected='weight_transfer_config=WeightTransferConfig(backend="bridge")',
            remedy='vllm.LLM(..., weight_transfer_config=vllm.config.WeightTransferConfig(backend="bridge"))',
        )
        self._core = getattr(self._engine.engine_core, "engine_core", None)  # None when it has a process of its own
        self._published: PublishedState = vars(self._engine).setdefault(_PUBLISHED, PublishedState())

    @cached_property
    def gate(self) -> VllmGate:
        """The gate of the engine, put up at its first use. Before the claim it may be that of another bridge."""
        return VllmGate.of(self._engine)

    # ---- calls of the engine -------------------------------------------------------------------------------------

    def _run_job(self, job: bytes, deadline: Deadline) -> Sequence[Any]:
        try:
            with self.gate.between_steps(deadline):
                return super()._run_job(job, deadline)
        except BridgeError:
            raise
        except Exception as error:  # process boundary: vLLM's executor, of dead workers or a closed engine
            raise PeerLost(
                "vLLM's workers cannot be reached",
                where=self.where,
                expected="workers that run",
                got=f"{type(error).__name__}: {error}",
                remedy="start the engine again; vLLM's log says why its workers ended",
            ) from error

    def _call(self, name: str, deadline: Deadline | None = None, /, **arguments: Any) -> Any:
        """Call a method of LLMEngine. A core of this process computes the answer in this thread, without a limit."""
        call: Callable[[], Any] = partial(getattr(self._engine, name), **arguments)
        if self._core is not None:
            return call()
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return call_core(self._engine.engine_core, call, deadline or Deadline.after(CALL_S), self.where)
        except EngineDeadError as error:
            raise died_error(self.where, str(error)) from error

    def _is_asleep(self) -> bool:
        """True when somebody else paused the engine. A push of ours that begins or ends meanwhile does not count."""
        ours = self._published.paused or self.gate.held
        return not ours and bool(self._call("is_sleeping")) and not (self._published.paused or self.gate.held)

    def _require_awake(self) -> None:
        if self._is_asleep() and self._is_asleep():  # once more: a push may have ended in between
            raise asleep_error(self.where, "llm.wake_up(), then try again")

    def _stop_scheduling(self) -> None:
        self._call("sleep", level=0, mode="keep")
        self._published.paused = True

    def _resume_scheduling(self, deadline: Deadline | None = None) -> None:
        self._call("wake_up", deadline, tags=["scheduling"])

    def refuse_shared(self, storages: frozenset[int]) -> None:
        """Weights of a core of this process may share storage with the trainer's."""
        worker = getattr(getattr(self._core, "model_executor", None), "driver_worker", None)
        runner = getattr(worker, "model_runner", None)  # None where workers have processes of their own
        if runner is not None:
            require_apart(runner.get_model().named_parameters(), storages)

    # ---- pause and resume ----------------------------------------------------------------------------------------

    def pause(self, inflight: str, deadline: Deadline) -> None:
        """Hold callers at the gate, drain, abort or keep running requests, then free all KV blocks: the canary needs
        them."""
        self._require_awake()
        paused = self._published.paused
        try:
            self.gate.hold(deadline)
            if inflight == "drain" and not self._published.paused:
                self.gate.drain(deadline)
            with self.gate.between_steps(deadline):
                if inflight == "abort":
                    self.gate.abort()
                if self._core is not None and not self._published.paused:
                    self.gate.forget_finished()
                self._stop_scheduling()
                self._free_blocks()
        except BaseException:
            if not paused:
                self._undo_pause()
            raise

    def _undo_pause(self) -> None:
        """Also for a stop that was late: vLLM carries it out all the same, and this call after it."""
        try:
            with suppress(BridgeError):
                self._resume_scheduling(Deadline.after(_LATE_S))
            self._published.paused = False
        finally:
            self.gate.release()

    def resume(self) -> None:
        """Let requests run again, and callers in. Idempotent."""
        if self._published.paused:
            self._resume_scheduling()
            self._published.paused = False
        self._blocks_used = False
        self.gate.release()

    # ---- claim, refusal, versions --------------------------------------------------------------------------------

    def claim(self, owner: str) -> None:
        """Raises Busy, and ConfigError for an engine that is asleep: it has no weights to read."""
        claim.take(self.llm, self, owner)
        self.gate = VllmGate.of(self._engine)  # the one that was looked at before may have been taken down since
        if self.refusal is None and self._is_asleep():
            claim.give_up(self.llm, self)
            raise asleep_error(self.where, "llm.wake_up(), then try again")

    @property
    def refusal(self) -> str | None:
        """The reason why the engine refuses requests; None when it does not."""
        return self.gate.reason

    def refuse(self, reason: str | None) -> None:
        """Refuse new and waiting callers. Requests inside the engine are ended, so that an engine that its owner wakes
        up by accident computes nothing."""
        self.gate.reason = reason
        if reason is None:
            return
        try:
            with self.gate.between_steps():
                self.gate.abort(rollouts=False)  # `VllmGate.run` raises the reason to those
                self._stop_scheduling()
        except (PeerLost, DeadlineExceeded) as error:
            log.warning("the engine could not be paused: %s", error)
        finally:
            self.gate.release()

    def publish(self, version: int, adapter: str | None = None) -> None:
        """`llm.llm_engine.get_weight_version()` and the spans on outputs show the version from now on."""
        if adapter is not None and adapter not in self.loaded_loras():
            raise lora_not_loaded(adapter)
        self._call("set_weight_version", weight_version=str(version))
        self._published.version, self._published.lora = version, adapter

    @property
    def published(self) -> tuple[int, str | None]:
        """The version and LoRA that were published last, by whatever bridge."""
        return self._published.version, self._published.lora

    def close(self) -> None:
        """Give up the claim. The engine runs on, or goes on refusing."""
        if not claim.is_others(self.llm, self):  # else the gate is that of another bridge, which has refused us
            self.gate.lift()  # while the claim still stands: whoever takes it next puts up one of their own
        claim.give_up(self.llm, self)

    # ---- generation ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling,
        adapter: str = CURRENT,
        *,
        past_gate: bool = False,
        deadline: Deadline | None = None,
    ) -> list[Completion]:
        """Past the gate of a paused engine, scheduling is opened for everything inside: raises Busy where requests are
        kept."""
        if not past_gate:
            self.gate.enter(deadline)
        self._require_awake()
        if sampling.max_tokens == 0:
            label = self._call("get_weight_version")
            return [Completion((), (), "length", parse_version(label)) for _ in prompts]
        parameters = sampling_parameters(sampling)

        def find_lora() -> Any:
            lora = self._published.resolve_lora(adapter)
            return None if lora is None else request_lora(lora, self._loaded())

        from vllm.v1.engine.exceptions import EngineDeadError

        opened = self._published.paused and past_gate
        if opened:
            if self.gate.requests():
                raise kept_requests_error(self.where)
            self._resume_scheduling()
        try:
            outputs = self.gate.run(prompts, parameters, find_lora, deadline, past=past_gate)
            return [read_completion(output) for output in outputs]
        except EngineDeadError as error:
            raise died_error(self.where, str(error)) from error
        finally:
            if opened:
                self._stop_scheduling()
                self._blocks_used = True

    # ---- LoRA ----------------------------------------------------------------------------------------------------

    def loaded_loras(self) -> tuple[str, ...]:
        """Names of the LoRAs that the bridge loaded, then `#id` for those that vLLM read from folders."""
        return () if self.lora is None else list_loras(self._loaded(), self._call("list_loras"))

    def _loaded(self) -> dict[str, int]:
        """Name -> id of the LoRAs that the bridge has loaded."""
        if self.lora is None:
            return {}
        with self.gate.between_steps():
            found: dict[str, int] = self._call("collective_rpc", method=LORAS)[0]
        return found

    def end_users(self, names: Iterable[str]) -> None:
        """End, as aborted, every request that uses one of these LoRAs."""
        with self.gate.between_steps():
            self.gate.abort(frozenset(names))

    def retire(self, names: Iterable[str]) -> None:
        """LoRAs that are still in use are dropped at a later call."""
        retiring = self._published.retiring
        retiring |= set(names)
        if not retiring:
            return
        loaded, users = self._loaded(), self.gate.requests().values()
        for name in sorted(retiring.difference(state.lora_name for state in users)):
            if name in loaded:
                self._call("remove_lora", lora_id=loaded[name])
            retiring.discard(name)


def attach(engine: object) -> LLMDriver | None:
    """Make the driver of a `vllm.LLM` of this process; None for any other object. Does not import vLLM.

    Raises:
        ConfigError: it was started without the backend, or cannot be driven.
    """
    module = sys.modules.get("vllm.entrypoints.llm")
    if module is None or not isinstance(engine, module.LLM):
        return None
    require_version("vLLM", str(sys.modules["vllm"].__version__))
    return LLMDriver(engine)
