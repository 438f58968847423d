"""Handles that a `Bridge` gives its user: engines for rollouts, and pushes that are under way."""

from __future__ import annotations

from collections.abc import Sequence

from bridge.errors import REPORT, BridgeError, DeadlineExceeded, EngineQuarantined, PushAborted
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
    """One engine of a bridge, for rollouts; an element of `Bridge.engines`. May be used from several threads."""

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
        """Sample one completion per prompt, in order. Blocks, also while the engine is paused for a push.

        Args:
            prompts: token ids, one sequence per completion.
            sampling: temperature, length, stop tokens; default `Sampling()`.
            adapter: "current" (the LoRA that was pushed last, or none), "base", or the name of a loaded LoRA.
            timeout_s: longest wait; what has not finished by then is ended.

        Raises:
            EngineQuarantined: the engine serves nothing until a push verifies.
            ConfigError: prompts or a sampling that the engine cannot take; Closed in a forked child.
            NotFound: no LoRA of that name is loaded.
            PeerLost, DeadlineExceeded: the engine is gone, or late.
        """
        request = check_generate_options(prompts, sampling, adapter, timeout_s)
        return list(self._port.call(request, EngineGenerated, Deadline.after(request.timeout_s)).completions)


class PendingPush:
    """A push whose snapshot is sealed and handed over, as `push(wait=False)` returns it. The trainer's tensors may
    change; the push goes on without this object, and without its Bridge."""

    def __init__(self, session: Session, version: int, timeout_s: float) -> None:
        self.version = version
        self._session = session
        self._timeout_s = timeout_s
        self._finished: Finished | None = None

    def done(self) -> bool:
        """True when the push has ended, one way or the other. Does not wait for it."""
        return self._poll(0.0) is not None

    def result(self, timeout: float | None = None) -> Receipt:
        """Wait for the receipt.

        Args:
            timeout: longest wait in seconds; default the push's own deadline and the way back after it.

        Raises the errors of `Bridge.push`, and DeadlineExceeded when the push has not ended in time (it goes on).
        """
        if self._finished is None:  # a result that is known waits for nobody: any thread may take it
            self._session.require_usable()
        return wait_for_receipt(self, timeout)

    def _poll(self, seconds: float) -> Finished | None:
        if self._finished is None:
            wait, deadline = WaitRequest(self.version, seconds), Deadline.after(seconds + CALL_TIMEOUT_S)
            answer = self._session.coordinator.call(wait, Finished, deadline)
            if answer.receipt is not None or answer.error is not None:
                self._finished = answer
        return self._finished


def wait_for_receipt(pending: PendingPush, timeout: float | None = None) -> Receipt:
    """Wait as `PendingPush.result`, in a thread that is known to be allowed to: `Bridge.push` has found that out before
    it began. Blocks. Raises as `result`."""
    seconds = pending._timeout_s + CALL_TIMEOUT_S + 120.0 if timeout is None else timeout
    finished = pending._poll(seconds)
    if finished is None:
        raise DeadlineExceeded(
            "the push has not ended yet",
            where=f"version {pending.version}",
            expected=f"an end within {seconds:g} s",
            got="it goes on",
            remedy="call result() again with a longer timeout; the push goes on meanwhile",
        )
    return receipt_or_raise(finished, pending.version)


def receipt_or_raise(finished: Finished, version: int) -> Receipt:
    """Return the receipt of a push that ended well, or raise. Does not block.

    Raises:
        the cause itself: no engine was written.
        PushAborted: *from* the cause; engines had been written and were put back.
        EngineQuarantined: the same, but some engine could not be put back; or the version was committed, and an engine
            was lost on the way to serving it (then also PeerLost). Its receipt is in the journal (`Bridge.history`).
    """
    if finished.error is None and finished.receipt is not None:
        return finished.receipt
    cause = (
        finished.error.rebuild()
        if finished.error
        else BridgeError(
            "the push ended without a receipt",
            where=f"version {version}",
            expected="a receipt or an error",
            got="neither",
            remedy=REPORT,
        )
    )
    if not finished.aborted:
        if isinstance(cause, PushAborted):  # committed, but not served everywhere
            cause.receipt, cause.serving = finished.receipt, finished.serving
        raise cause
    lost = [engine for engine, serving in finished.serving.items() if serving is None]
    kind = EngineQuarantined if lost else PushAborted
    now = ", ".join(f"{e}: {'nothing' if v is None else f'version {v}'}" for e, v in finished.serving.items())
    what = f"the push of version {version} was aborted: {cause.what}"
    remedy = f"engines now serve {now}; {cause.remedy or 'mend the cause and push again'}"
    facts = {**cause.facts(), "remedy": remedy}
    raise kind(what, receipt=finished.receipt, serving=finished.serving, names=cause.names, **facts) from cause
