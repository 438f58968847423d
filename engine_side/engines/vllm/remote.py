"""The driver of an AsyncLLM, hosted by us or behind a server: vLLM's own calls and its frontend's, over a channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.frontend_client import CALL_S, FrontendClient
from engine_side.engines.common.published_state import asleep_error
from engine_side.engines.vllm.common import VllmDriver, kept_requests_error
from engine_side.engines.vllm.facts import VllmFacts

_PAUSE_MODES = {"drain": "wait", "abort": "abort", "keep": "keep"}


class VllmChannel(Protocol):
    """A way to an AsyncLLM. Every call blocks until it is answered; raises PeerLost for an engine that is gone, and
    DeadlineExceeded."""

    def ask(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        """Send a request to the frontend. Raises the error that it answers with."""
        ...

    def call(self, name: str, deadline: Deadline, **arguments: Any) -> Any:
        """Call a method of AsyncLLM by name. `collective_rpc` returns what each worker answered; bytes among its `args`
        reach the workers as bytes, or in base64 over HTTP."""
        ...


class AsyncDriver(FrontendClient, VllmDriver):
    """The driver over a channel. Every method blocks, and raises PeerLost and DeadlineExceeded."""

    def __init__(
        self,
        channel: VllmChannel,
        facts: VllmFacts,
        where: str,
        *,
        remedy: str = "resume it, then try again",
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            remedy: how the owner of an engine that is asleep wakes it up.
            on_close: stops an engine that this driver started.
        """
        VllmDriver.__init__(self, facts, where)
        FrontendClient.__init__(self, on_close)
        self._channel = channel
        self._remedy = remedy

    def _front(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        return self._channel.ask(request, deadline)

    def _call(self, name: str, deadline: Deadline | None = None, /, **arguments: Any) -> Any:
        return self._channel.call(name, deadline or Deadline.after(CALL_S), **arguments)

    def refuse_shared(self, storages: frozenset[int]) -> None:
        """Never raises: the engine core has a process of its own."""

    # ---- pause and resume ----------------------------------------------------------------------------------------

    def pause(self, inflight: str, deadline: Deadline) -> None:
        """Hold new requests in the frontend, drain, abort or keep the running ones, then free all KV blocks: the canary
        needs them."""
        paused = self.state().paused
        if not paused:
            self._require_awake()
        self._tell(msg.Hold())
        try:
            mode = "keep" if paused and inflight == "drain" else _PAUSE_MODES[inflight]
            self._call("pause_generation", deadline, mode=mode, clear_cache=False)
            self._tell(msg.Hold(paused=True))
            self._free_blocks()
        except BaseException:
            if not paused:
                self._resume_engine()
            raise

    def resume(self) -> None:
        """Let requests run again; an engine that its owner has paused stays paused."""
        if self.state().paused:
            self._resume_engine()
        else:
            self._tell(msg.Release())
        self._blocks_used = False

    def _resume_engine(self) -> None:
        self._call("resume_generation")
        self._tell(msg.Release())

    def _open_scheduling(self, state: msg.FrontendState, deadline: Deadline | None) -> None:
        if state.unfinished:
            raise kept_requests_error(self.where)
        self._call("resume_generation")

    def _close_scheduling(self) -> None:
        self._call("pause_generation", mode="keep", clear_cache=False)
        self._blocks_used = True

    # ---- readiness, versions, LoRA -------------------------------------------------------------------------------

    def _require_ready(self) -> None:
        """An engine that is asleep has no weights to read."""
        state = self.state()
        if state.refusal is None and not state.paused:
            self._require_awake()

    def _require_awake(self) -> None:
        if self._call("is_sleeping"):
            raise asleep_error(self.where, self._remedy)

    def _set_weight_version(self, version: int) -> None:
        self._call("update_weight_version", new_version=str(version))

    def loaded_loras(self) -> tuple[str, ...]:
        """Names of the LoRAs that the bridge loaded, then `#id` for those that vLLM read from folders."""
        return () if self.lora is None else self.state().loras
