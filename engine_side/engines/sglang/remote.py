"""The driver half for any SGLang engine: SGLang's own calls, and its front's, over a line."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from bridge.errors import ConfigError, DeadlineExceeded
from bridge.protocol.codec import Sampling
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.frontend_client import CALL_S, FrontendClient
from engine_side.engines.common.published_state import BASE, check_mode
from engine_side.engines.sglang.common import Arguments, SglangDriver
from engine_side.engines.sglang.scheduler import FACTS, OPEN, SHUT

T = TypeVar("T")
_POLL_S = 0.005
_GRACE_S, _KNOCK_S = 3.0, 0.5
_ASKING_RANKS = (msg.GetState, msg.Generate, msg.Publish, msg.Retire)
"""Of the front's requests those that, where there are adapters, wait for the schedulers."""


class Line(Protocol):
    """Blocks until answered. Every call raises PeerLost for an engine that is gone, and DeadlineExceeded."""

    def ask(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        """The front's answer; its errors are raised."""
        ...

    def call(self, method: str, deadline: Deadline, **arguments: Any) -> Any:
        """One of SGLang's calls, by the name that it has in its tokenizer manager and as a route: `pause_generation`,
        `continue_generation`, `flush_cache` (True when it did), `update_weight_version`, `abort_request`."""
        ...

    def check_weights(self, words: list[str], deadline: Deadline) -> tuple[bool, str]:
        """A request of the bridge to all schedulers: (success, message)."""
        ...


class FrontendDriver(FrontendClient, SglangDriver):
    """The driver over a channel."""

    def __init__(
        self,
        line: Line,
        arguments: Arguments,
        where: str,
        *,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        SglangDriver.__init__(self, arguments, where)
        FrontendClient.__init__(self, on_close)
        self._line = line
        self._push: Deadline | None = None  # of the push that has the engine paused
        self._grace: Deadline | None = None  # for an engine that has let a deadline pass

    def _front(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        if isinstance(request, msg.Generate) and not request.past_gate:
            return self._line.ask(request, deadline)  # a user's: it may take its time
        if isinstance(request, _ASKING_RANKS) and self.lora is not None:
            self._knock()
        return self._timed(lambda: self._line.ask(request, deadline))

    def _send(self, verb: str, text: str, deadline: Deadline) -> tuple[bool, str]:
        if verb == FACTS and self._grace is not None:
            deadline = self._until()
        elif verb != FACTS:
            self._knock()
        answer = self._timed(lambda: self._line.check_weights([verb, text], deadline))
        self._grace = None
        return answer

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._timed(lambda: self._line.call(method, self._until(), **arguments))

    # ---- time ----------------------------------------------------------------------------------------------------

    def _until(self) -> Deadline:
        """For a call without a deadline of its own: that of the push, and for all of what is asked of an engine that
        has let a deadline pass together one short grace."""
        if self._grace is not None:
            return Deadline.after(_KNOCK_S) if self._grace.expired else self._grace
        if self._push is None:
            return Deadline.after(CALL_S)
        return Deadline.after(_GRACE_S) if self._push.expired else self._push

    def _timed(self, call: Callable[[], T]) -> T:
        """Remember when the engine does not answer in time."""
        try:
            return call()
        except DeadlineExceeded:
            self._grace = self._grace or Deadline.after(_GRACE_S)
            raise

    def _knock(self) -> None:
        """Before an engine that has let a deadline pass is given time for work, it has to answer at all."""
        if self._grace is not None:
            self.facts()

    # ---- pause and caches ----------------------------------------------------------------------------------------

    def pause(self, inflight: str, deadline: Deadline) -> None:
        """Callers wait in front, what runs is drained, aborted or taken back to be computed again."""
        check_mode(inflight)
        self._push = deadline
        paused = self.state(deadline).paused
        self._tell(msg.Hold(), deadline)
        try:
            if inflight == "drain" and not paused:
                self._drain(deadline)
            self._tell(msg.Hold(paused=True), deadline)
            self._line.call("pause_generation", deadline, mode="retract")
            while not self.facts(deadline).paused:  # it has no answer of its own
                deadline.check("SGLang's pause")
            if inflight == "abort":
                self._line.call("abort_request", deadline, rid="", abort_all=True)
        except BaseException:
            if not paused:
                self._go_on()
            raise

    def _drain(self, deadline: Deadline) -> None:
        while self.state(deadline).unfinished:
            deadline.check("requests in flight did not finish")
            time.sleep(_POLL_S)

    def resume(self) -> None:
        state = self.state()
        if state.paused or state.held:
            self._go_on()
        self._push = None

    def refuse(self, reason: str | None) -> None:
        """As `FrontendClient.refuse`; an engine that hangs refuses, and what is inside it ends when it can."""
        try:
            super().refuse(reason)
        except DeadlineExceeded:
            if reason is None:
                raise
        if reason is not None:
            self._push = None

    def _go_on(self) -> None:
        self._call("continue_generation", torch_empty_cache=self.arguments.device != "cpu")
        self._tell(msg.Release())

    def reset_caches(self) -> bool:
        self._knock()
        return bool(self._call("flush_cache"))

    # ---- readiness, versions -------------------------------------------------------------------------------------

    def _require_ready(self) -> None:
        """Two tokens are generated: the first forward of some of SGLang's models changes their module tree, which has
        to be over before anybody looks whether a push leaves it as it was."""
        state = self.state()
        if state.refusal is not None or state.paused:
            return
        if self.facts().paused:
            raise ConfigError(
                "the engine is paused", where=self.where, got="pause_generation by somebody else",
                remedy="continue_generation, then try again",
            )  # fmt: skip
        sampling = Sampling(max_tokens=2, temperature=0.0)
        self._completions([[0, 0]], sampling, BASE, True, Deadline.after(CALL_S))

    def _set_weight_version(self, version: int) -> None:
        """`meta_info["weight_version"]` shows the version from now on."""
        self._call("update_weight_version", new_version=str(version), abort_all_requests=False)

    def _open_scheduling(self, state: msg.FrontendState, deadline: Deadline | None) -> None:
        """For the bridge's own requests alone."""
        self.ask(OPEN, deadline=deadline)

    def _close_scheduling(self) -> None:
        self.ask(SHUT)
