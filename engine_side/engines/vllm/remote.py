"""The driver half for an AsyncLLM, hosted by us or behind a server: vLLM's own calls, and its front's, over a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bridge.protocol.codec import Completion, Sampling
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.frontend_client import CALL_S, FrontendClient
from engine_side.engines.common.published_state import CURRENT, check_mode, lora_not_loaded
from engine_side.engines.vllm.channels import VllmChannel
from engine_side.engines.vllm.common import VllmDriver, asleep, keeping
from engine_side.engines.vllm.facts import VllmFacts
from engine_side.engines.vllm.plugin import METHOD
from engine_side.protocol import Prompts

_VLLMS_WORD = {"drain": "wait", "abort": "abort", "keep": "keep"}


class AsyncDriver(FrontendClient, VllmDriver):
    """`own` says in which process the engine's driver is, for the claim: (pid, start time)."""

    def __init__(
        self,
        line: VllmChannel,
        facts: VllmFacts,
        where: str,
        own: tuple[int, str],
        *,
        remedy: str = "resume it, then try again",
        on_close: Callable[[], None] | None = None,
    ) -> None:
        VllmDriver.__init__(self, facts, where)
        FrontendClient.__init__(self, own, on_close)
        self._line = line
        self._remedy = remedy

    def _front(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        return self._line.ask(request, deadline)

    # ---- jobs ----------------------------------------------------------------------------------------------------

    def _run_job(self, job: bytes, deadline: Deadline) -> Sequence[Any]:
        return self._line.rpc(METHOD, job, deadline)

    def refuse_shared(self, storages: frozenset[int]) -> None:
        """The engine core has a process of its own."""

    # ---- pause and caches ----------------------------------------------------------------------------------------

    def pause(self, inflight: str, deadline: Deadline) -> None:
        """New callers wait in front, what runs is drained, aborted or kept; then all KV blocks are free: the canary
        needs them."""
        check_mode(inflight)
        paused = self.state().paused
        if not paused:
            self._require_awake()
        self._tell(msg.Hold())
        try:
            word = "keep" if paused and inflight == "drain" else _VLLMS_WORD[inflight]
            self._line.call("pause_generation", deadline, mode=word, clear_cache=False)
            self._tell(msg.Note(True))
            self._free_blocks()
        except BaseException:
            if not paused:
                self._go_on()
            raise

    def resume(self) -> None:
        """An engine that its owner has paused stays paused."""
        if self.state().paused:
            self._go_on()
        else:
            self._tell(msg.Release())
        self._blocks_used = False

    def _go_on(self) -> None:
        self._call("resume_generation")
        self._tell(msg.Note(False))
        self._tell(msg.Release())

    def reset_caches(self) -> bool:
        """Prefix, encoder and multimodal caches; what was kept is computed again under the new weights."""
        answer = self._reset_prefix_cache()
        self._call("reset_mm_cache")
        self._call("reset_encoder_cache")
        return answer

    def _reset_prefix_cache(self) -> bool:
        return bool(self._call("reset_prefix_cache", reset_running_requests=True))

    # ---- claim, refusal, versions --------------------------------------------------------------------------------

    def _ready(self) -> None:
        """An engine that is asleep has no weights."""
        state = self.state()
        if state.refusal is None and not state.paused:
            self._require_awake()

    def _require_awake(self) -> None:
        if self._call("is_sleeping"):
            raise asleep(self.where, self._remedy)

    def publish(self, version: int, adapter: str | None = None) -> None:
        """vLLM's own weight version, and the spans on outputs, show the version from now on."""
        if adapter is not None and adapter not in self.adapters():
            raise lora_not_loaded(adapter)
        self._call("update_weight_version", new_version=str(version))
        self._tell(msg.Publish(version, adapter))

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
        state = self.state(deadline) if past_gate else None
        opened = state is not None and state.paused
        if opened:
            if state is not None and state.unfinished:
                raise keeping(self.where)
            self._call("resume_generation")
        try:
            return self._completions(prompts, sampling, adapter, past_gate, deadline)
        finally:
            if opened:
                self._call("pause_generation", mode="keep", clear_cache=False)
                self._blocks_used = True

    # ---- adapters ------------------------------------------------------------------------------------------------

    def adapters(self) -> tuple[str, ...]:
        """Those that the bridge loaded, then `#id` for those that vLLM read from folders: it keeps no names."""
        return () if self.lora is None else self.state().adapters

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._line.call(method, Deadline.after(CALL_S), **arguments)
