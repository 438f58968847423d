"""The driver half for an AsyncLLM, hosted by us or behind a server: vLLM's own calls, and its front's, over a line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from uuid import uuid4

from bridge.deadline import Deadline
from bridge.errors import BridgeError, EngineQuarantined, ProtocolError
from bridge.wire import Completion, Sampling
from engine_side.adapters.base import Prompts
from engine_side.adapters.vllm import front_messages as msg
from engine_side.adapters.vllm.common import CURRENT, VllmAdapter, asleep, check_mode, not_held
from engine_side.adapters.vllm.facts import Facts
from engine_side.adapters.vllm.lines import Line
from engine_side.adapters.vllm.plugin import METHOD

CALL_S = 60.0
_VLLMS_WORD = {"drain": "wait", "abort": "abort", "keep": "keep"}


class AsyncAdapter(VllmAdapter):
    """`own` says in which process the engine's driver is, for the claim: (pid, start time)."""

    def __init__(
        self,
        line: Line,
        facts: Facts,
        where: str,
        own: tuple[int, str],
        *,
        remedy: str = "resume it, then try again",
        on_close: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(facts, where)
        self._line = line
        self._own = own
        self._remedy = remedy
        self._on_close = on_close
        self._token = uuid4().hex
        self._claimed = False

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
            if not self._reset_prefix_cache():
                raise ProtocolError("vLLM did not free its KV blocks", where="reset_prefix_cache", got="False")
        except BaseException:
            if not paused:
                self.resume()
            raise

    def resume(self) -> None:
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

    def claim(self, owner: str) -> None:
        """Raises ConfigError for an engine that is asleep: its weights are not there."""
        self._tell(msg.Claim(self._token, owner, *self._own))
        self._claimed = True
        state = self.state()
        if state.refusal is None and not state.paused:
            self._require_awake()

    def _require_awake(self) -> None:
        if self._call("is_sleeping"):
            raise asleep(self.where, self._remedy)

    @property
    def refusal(self) -> str | None:
        return self.state().refusal

    def refuse(self, reason: str | None) -> None:
        """Callers that wait in a push get the refusal as well; what is inside the engine is ended."""
        self._tell(msg.Refuse(reason))

    def publish(self, version: int, adapter: str | None = None) -> None:
        """vLLM's own weight version, and the spans on outputs, show the version from now on."""
        if adapter is not None and adapter not in self.adapters():
            raise not_held(adapter)
        self._call("update_weight_version", new_version=str(version))
        self._tell(msg.Published(version, adapter))

    @property
    def published(self) -> tuple[int, str | None]:
        state = self.state()
        return state.version, state.adapter

    def state(self) -> msg.State:
        """What the engine's front knows."""
        answer = self._ask(msg.Ask())
        if not isinstance(answer, msg.State):
            raise ProtocolError("an answer of the wrong kind", where=self.where, got=type(answer).__name__)
        return answer

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
        """Past the gate of a paused engine scheduling is opened for these requests; kept ones go on by as many steps,
        and wait again."""
        seconds = None if deadline is None else deadline.remaining_s
        asked = msg.Generate(tuple(tuple(map(int, p)) for p in prompts), sampling, adapter, past_gate, seconds)
        limit = Deadline.after(_FOREVER_S) if deadline is None else Deadline.after(deadline.remaining_s + CALL_S)
        opened = past_gate and self.state().paused
        if opened:
            self._call("resume_generation")
        try:
            answer = self._line.ask(asked, limit)
        finally:
            if opened:
                self._call("pause_generation", mode="keep", clear_cache=False)
                if not self._reset_prefix_cache():
                    raise EngineQuarantined("vLLM did not free its KV blocks", where="reset_prefix_cache")
        if not isinstance(answer, msg.Completions):
            raise ProtocolError("an answer of the wrong kind", where=self.where, got=type(answer).__name__)
        return list(answer.completions)

    # ---- adapters ------------------------------------------------------------------------------------------------

    def adapters(self) -> tuple[str, ...]:
        """Those that the bridge loaded, then `#id` for those that vLLM read from folders: it keeps no names."""
        return () if self.lora is None else self.state().adapters

    def end_users(self, names: Iterable[str]) -> None:
        self._tell(msg.End(tuple(names)))

    def retire(self, names: Iterable[str]) -> None:
        """Those still in use go at the next call."""
        self._tell(msg.Retire(tuple(names)))

    def close(self) -> None:
        """A server runs on, or goes on refusing; an engine of ours ends. Idempotent."""
        try:
            if self._claimed:
                self._claimed = False
                self._tell(msg.GiveUp(self._token))
        except BridgeError:
            if self._on_close is None:
                raise
        finally:
            if self._on_close is not None:
                self._on_close()

    # ---- the line ------------------------------------------------------------------------------------------------

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._line.call(method, Deadline.after(CALL_S), **arguments)

    def _ask(self, request: msg.ToFront) -> msg.FromFront:
        return self._line.ask(request, Deadline.after(CALL_S))

    def _tell(self, request: msg.ToFront) -> None:
        answer = self._ask(request)
        if not isinstance(answer, msg.Done):
            raise ProtocolError("an answer of the wrong kind", where=self.where, got=type(answer).__name__)


_FOREVER_S = 30 * 24 * 3600.0
