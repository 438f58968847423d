"""Handles that a `Bridge` gives out: engines for rollouts, and pushes that are under way."""

from __future__ import annotations

from collections.abc import Sequence

from bridge.errors import BridgeError, DeadlineExceeded, EngineQuarantined, PushAborted
from bridge.generate_options import check_generate_options
from bridge.model.receipt import Receipt
from bridge.ports import EnginePort
from bridge.protocol.codec import Completion, Sampling
from bridge.protocol.coordinator_messages import Finished, WaitRequest
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import EngineGenerated
from bridge.session import Session

CALL_TIMEOUT_S = 60.0


class EngineHandle:
    """One engine of a bridge, for rollouts. Get it from `Bridge.engines`."""

    def __init__(self, port: EnginePort) -> None:
        self._port = port
        self.id = port.id

    def __repr__(self) -> str:
        return f"<engine {self.id}>"

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        adapter: str = "current",
        timeout_s: float = 600.0,
    ) -> list[Completion]:
        """Sample one completion per prompt (token ids in, token ids and log-probabilities out). Blocks, also while the
        engine is paused for a push, for at most `timeout_s` seconds. `adapter` is "current", "base" or the name of a
        loaded one. Raises EngineQuarantined when the engine serves nothing, ConfigError for prompts or a sampling that
        it cannot take, NotFound for an adapter, DeadlineExceeded (what has not finished is ended)."""
        request = check_generate_options(prompts, sampling, adapter, timeout_s)
        return list(self._port.call(request, EngineGenerated, Deadline.after(request.timeout_s)).completions)


class PendingPush:
    """A push whose snapshot is sealed and handed over (`wait=False`)."""

    def __init__(self, session: Session, version: int, timeout_s: float) -> None:
        self.version = version
        self._session = session
        self._timeout_s = timeout_s
        self._finished: Finished | None = None

    def done(self) -> bool:
        """Tell whether the push has ended, one way or the other. Does not block."""
        return self._poll(0.0) is not None

    def result(self, timeout: float | None = None) -> Receipt:
        """Wait for the receipt, at most `timeout` seconds (default: the push's own deadline and the way back after it).
        Raises what `push` raises, and DeadlineExceeded when the push has not ended in time; it goes on."""
        seconds = self._timeout_s + CALL_TIMEOUT_S + 120.0 if timeout is None else timeout
        self._session.require_usable()
        finished = self._poll(seconds)
        if finished is None:
            raise DeadlineExceeded(
                "the push has not ended yet",
                where=f"version {self.version}",
                remedy="wait longer; it goes on without you",
            )
        return receipt_or_raise(finished, self.version)

    def _poll(self, seconds: float) -> Finished | None:
        if self._finished is None:
            wait, deadline = WaitRequest(self.version, seconds), Deadline.after(seconds + CALL_TIMEOUT_S)
            answer = self._session.coordinator.call(wait, Finished, deadline)
            if answer.receipt is not None or answer.error is not None:
                self._finished = answer
        return self._finished


def receipt_or_raise(finished: Finished, version: int) -> Receipt:
    """Return the receipt of a push that ended well, else raise.

    Raises the cause itself when nothing had been touched; PushAborted (or EngineQuarantined) *from* the cause when
    engines had to be put back; EngineQuarantined or PeerLost when the version was committed while an engine was lost
    (its receipt is in the journal, `Bridge.history`).
    """
    if finished.error is None and finished.receipt is not None:
        return finished.receipt
    cause = finished.error.rebuild() if finished.error else BridgeError("the push ended without a receipt")
    if not finished.aborted:
        if isinstance(cause, PushAborted):  # committed, but not served everywhere
            cause.receipt, cause.serving = finished.receipt, finished.serving
        raise cause
    lost = [engine for engine, serving in finished.serving.items() if serving is None]
    kind = EngineQuarantined if lost else PushAborted
    now = ", ".join(f"{e}: {'nothing' if v is None else f'version {v}'}" for e, v in finished.serving.items())
    raise kind(
        f"the push of version {version} was aborted: {cause.what}",
        receipt=finished.receipt,
        serving=finished.serving,
        where=cause.where,
        expected=cause.expected,
        got=cause.got,
        remedy=f"engines now serve {now}; {cause.remedy or 'mend the cause and push again'}",
        names=cause.names,
    ) from cause
