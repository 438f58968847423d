"""The driver half where an engine's front answers for it: what is the same for every engine and every way to it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from uuid import uuid4

from bridge.errors import BridgeError, ProtocolError
from bridge.protocol.codec import Completion, Sampling
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.protocol import Prompts

CALL_S = 60.0
"""For calls that take no time of their own."""
_FOREVER_S = 30 * 24 * 3600.0


class FrontendClient:
    """`own` says in which process the engine's driver is, for the claim: (pid, start time). `on_close` ends an engine
    that is the adapter's own."""

    where: str

    def __init__(self, own: tuple[int, str], on_close: Callable[[], None] | None = None) -> None:
        self._own = own
        self._on_close = on_close
        self._token = uuid4().hex
        self._claimed = False

    @abstractmethod
    def _front(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        """The front's answer; its errors are raised. Raises PeerLost, DeadlineExceeded."""

    @abstractmethod
    def _ready(self) -> None:
        """Called once the engine is ours. Raises ConfigError for one that cannot be driven now."""

    def claim(self, owner: str) -> None:
        """Raises Busy while another bridge drives the engine, ConfigError for one that somebody else has paused."""
        self._tell(msg.Claim(self._token, owner, *self._own))
        self._claimed = True
        try:
            self._ready()
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        if self._claimed:
            self._claimed = False
            self._tell(msg.GiveUp(self._token))

    def close(self) -> None:
        """A server runs on, or goes on refusing; an engine of ours ends. Idempotent."""
        try:
            self._give_up()
        except BridgeError:
            if self._on_close is None:
                raise
        finally:
            if self._on_close is not None:
                self._on_close()

    def state(self, deadline: Deadline | None = None) -> msg.FrontendState:
        """What the engine's front knows."""
        answer = self._front(msg.GetState(), deadline or self._until())
        if not isinstance(answer, msg.FrontendState):
            raise self._wrong(answer)
        return answer

    @property
    def refusal(self) -> str | None:
        return self.state().refusal

    def refuse(self, reason: str | None) -> None:
        """Callers that wait in a push get the refusal as well; what is inside the engine is ended."""
        self._tell(msg.Refuse(reason))

    @property
    def published(self) -> tuple[int, str | None]:
        state = self.state()
        return state.version, state.adapter

    def end_users(self, names: Iterable[str]) -> None:
        self._tell(msg.EndRequests(tuple(names)))

    def retire(self, names: Iterable[str]) -> None:
        """Those still in use go when they are not."""
        self._tell(msg.Retire(tuple(names)))

    def _completions(
        self, prompts: Prompts, sampling: Sampling, adapter: str, past_gate: bool, deadline: Deadline | None
    ) -> list[Completion]:
        """The deadline ends the requests where they are; the answer has a little longer."""
        seconds = None if deadline is None else deadline.remaining_s
        asked = msg.Generate(tuple(tuple(map(int, p)) for p in prompts), sampling, adapter, past_gate, seconds)
        answer = self._front(asked, Deadline.after(_FOREVER_S if seconds is None else seconds + CALL_S))
        if not isinstance(answer, msg.Completions):
            raise self._wrong(answer)
        return list(answer.completions)

    def _tell(self, request: msg.FrontendRequest, deadline: Deadline | None = None) -> None:
        answer = self._front(request, deadline or self._until())
        if not isinstance(answer, msg.FrontendDone):
            raise self._wrong(answer)

    def _until(self) -> Deadline:
        """How long a call may take that was given no deadline."""
        return Deadline.after(CALL_S)

    def _wrong(self, answer: object) -> ProtocolError:
        return ProtocolError("an answer of the wrong kind", where=self.where, got=type(answer).__name__)
