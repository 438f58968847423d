"""The gate of a `vllm.LLM`: holds callers during a push, refuses them while nobody knows what the weights are, and runs
the bridge's own requests.

It hangs on the engine object (`LLMEngine`), through whose `add_request` and `step` every way to generate leads. Outputs
of users' requests that appear while the bridge steps the engine are kept and handed out at the next `step`. The
bridge's own requests call the engine's methods past the gate.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from uuid import uuid4
from weakref import WeakMethod, ref

from bridge.errors import DeadlineExceeded, EngineQuarantined
from bridge.protocol.deadline import Deadline
from engine_side.engines.common.frontend import quarantine_error
from engine_side.engines.common.frontend_client import CALL_S
from engine_side.engines.vllm.liveness import LOOK_S, has_output
from engine_side.protocol import PromptBatch

_KEY = "_weighbridge_gate"
_WAYS = ("add_request", "step", "has_unfinished_requests")


class VllmGate:
    """One per engine object, shared by all drivers of it: made by `VllmGate.of`, removed by `lift` unless it refuses.
    Used from several threads.

    Attributes:
        reason: why callers are refused; None when they are not.
        held: True while callers wait.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = ref(engine)
        self.reason: str | None = None
        self.held = False
        self._opened = threading.Condition()
        self._entering = 0
        self._stepping = threading.RLock()
        self._ours: dict[str, Any] = {}
        self._privileged: set[str] = set()
        self._others: list[Any] = []

    @classmethod
    def of(cls, engine: Any) -> VllmGate:
        """The gate of this engine; made at the first call."""
        found = vars(engine).get(_KEY)
        if isinstance(found, VllmGate):
            return found
        gate = cls(engine)
        vars(engine)[_KEY] = gate
        for way in _WAYS:
            vars(engine)[way] = getattr(gate, way)
        send = getattr(engine.engine_core, "_send_input", None)
        if send is not None and not isinstance(send, _OneSender):
            engine.engine_core._send_input = _OneSender(send)
        return gate

    def lift(self) -> None:
        """Remove the gate, unless it refuses or still holds outputs of users' requests."""
        self.release()
        if self.reason is None and not self._others:
            state = vars(self._live())
            for way in (_KEY, *_WAYS):
                state.pop(way, None)

    # ---- in place of the engine's methods ------------------------------------------------------------------------

    def add_request(self, *args: Any, **kwargs: Any) -> Any:
        """In place of `LLMEngine.add_request`. Waits during a push, without a limit: as `generate` itself waits."""
        with self._entered(None), self._stepping:
            return self._call("add_request", *args, **kwargs)

    def step(self) -> list[Any]:
        """In place of `LLMEngine.step`. Waits during a push."""
        while True:
            self.enter()
            with self._stepping:
                if self._others or self._is_ready(0.0):
                    kept, self._others = self._others, []
                    return kept or self._step()
            self._is_ready(LOOK_S)

    def has_unfinished_requests(self) -> bool:
        """In place of `LLMEngine.has_unfinished_requests`: kept outputs have to be fetched as well."""
        return bool(self._others) or bool(self._call("has_unfinished_requests"))

    def enter(self, deadline: Deadline | None = None) -> None:
        """Wait while a push is under way. Raises EngineQuarantined while the engine refuses, DeadlineExceeded."""
        with self._opened:
            if not self._opened.wait_for(lambda: not self.held, None if deadline is None else deadline.remaining_s):
                raise DeadlineExceeded(
                    "a push is under way",
                    where="vllm.LLM",
                    expected="an open gate before the deadline",
                    got="a closed one",
                    remedy="call again, or give the request more time",
                )
        if self.reason is not None:
            raise quarantine_error("vllm.LLM", self.reason)

    @contextmanager
    def _entered(self, deadline: Deadline | None) -> Iterator[None]:
        """Inside, a request is handed to the engine under the weights that serve now: no push begins before it has
        arrived. Waits and raises as `enter`."""
        with self._opened:  # reentrant: no push begins between the two
            self.enter(deadline)
            self._entering += 1
        try:
            yield
        finally:
            with self._opened:
                self._entering -= 1
                self._opened.notify_all()

    # ---- for the driver ------------------------------------------------------------------------------------------

    def hold(self, deadline: Deadline) -> None:
        """Make callers wait, and wait until those on the way in have arrived. Running requests go on until the engine
        is paused. Idempotent. Raises DeadlineExceeded, and holds all the same."""
        with self._opened:
            self.held = True
            if not self._opened.wait_for(lambda: not self._entering, deadline.remaining_s):
                raise DeadlineExceeded(
                    "requests on their way into the engine did not arrive",
                    where="vllm.LLM",
                    expected="all inside before the deadline",
                    got="some are still on their way",
                    remedy="raise timeout_s",
                )

    def release(self) -> None:
        """Let waiting callers go on. Idempotent."""
        with self._opened:
            self.held = False
            self._opened.notify_all()

    def requests(self) -> dict[str, Any]:
        """The engine's unfinished requests, those of the bridge included. A copy: callers add to them meanwhile."""
        return dict(self._live().output_processor.request_states)

    @contextmanager
    def between_steps(self, deadline: Deadline | None = None) -> Iterator[None]:
        """Inside, no step of an engine core of this process runs. A step that only waits for a core in another process
        is no obstacle, and would never end while that one is paused. Raises DeadlineExceeded."""
        engine = self._live()
        if not hasattr(engine.engine_core, "engine_core"):
            yield
            return
        if not self._stepping.acquire(timeout=CALL_S if deadline is None else deadline.remaining_s):
            raise DeadlineExceeded(
                "a step of the engine did not end",
                where="vllm.LLM",
                expected="a step that ends before the deadline",
                got="none yet",
                remedy="look for a hung step, or raise timeout_s",
            )
        try:
            yield
        finally:
            self._stepping.release()

    def drain(self, deadline: Deadline) -> None:
        """Step until no request runs or waits any more. Raises DeadlineExceeded."""
        while self._call("has_unfinished_requests"):
            deadline.check("requests in flight did not finish")
            self._is_ready(LOOK_S)
            with self._stepping:
                if self._call("has_unfinished_requests") and self._is_ready(0.0):
                    self._others += self._step()

    def forget_finished(self) -> None:
        """Step once if no request runs: only then does vLLM forget the requests that have finished."""
        with self._stepping:
            if not self._call("has_unfinished_requests") and self._is_ready(0.0):
                self._others += self._step()

    def abort(self, loras: Container[str] | None = None, *, rollouts: bool = True) -> None:
        """End running and waiting requests, with `loras` those that use one of these. Their callers get what there is,
        marked as aborted. Requests past the gate go on; without `rollouts` all of the bridge's requests do."""
        from vllm.v1.engine import FinishReason

        with self._stepping:
            spared = self._privileged if rollouts else self._ours
            states = {
                name: state
                for name, state in self.requests().items()
                if state.external_req_id not in spared and (loras is None or state.lora_name in loras)
            }
            for state in states.values():
                output = state.make_request_output([], None, FinishReason.ABORT, None)
                if output is not None:
                    self._others += self._sort([output])
            self._live().abort_request(list(states), internal=True)

    def run(
        self,
        prompts: PromptBatch,
        parameters: Any,
        find_lora: Callable[[], Any],
        deadline: Deadline | None = None,
        *,
        past: bool = False,
    ) -> list[Any]:
        """Run requests of the bridge to their end. Blocks.

        Args:
            parameters: vLLM's SamplingParams.
            find_lora: returns vLLM's LoRARequest or None. Called where no push can begin until the requests are in.
            past: run although callers are held or refused; else as one of them.

        Returns:
            The final output of each request.

        Raises:
            DeadlineExceeded, EngineQuarantined, PeerLost: the requests were ended.
        """
        names = [f"bridge-{uuid4().hex}" for _ in prompts]
        added: list[str] = []
        try:
            with nullcontext() if past else self._entered(deadline):
                lora = find_lora()
                for name, ids in zip(names, prompts, strict=True):
                    self._ours[name] = None
                    added.append(name)
                    if past:
                        self._privileged.add(name)
                    with self._stepping:
                        self._call("add_request", name, {"prompt_token_ids": list(ids)}, parameters, lora_request=lora)
            while self._waits_for(added):
                if deadline is not None:
                    deadline.check("requests of the bridge did not finish")
                if not past:
                    self.enter(deadline)
                self._is_ready(LOOK_S)
                with self._stepping:
                    goes_on = past or (not self.held and self.reason is None)
                    if goes_on and self._waits_for(added) and self._is_ready(0.0):
                        self._others += self._step()
            return [self._ours[name] for name in added]
        finally:
            unfinished = [name for name in added if self._ours.pop(name) is None]
            self._privileged.difference_update(added)
            if unfinished:
                with self._stepping:
                    self._live().abort_request(unfinished)

    # ---- the engine ----------------------------------------------------------------------------------------------

    def _waits_for(self, ids: Iterable[str]) -> bool:
        return any(self._ours[name] is None for name in ids)

    def _is_ready(self, wait_s: float) -> bool:
        """True when a step would return without waiting. Blocks for up to `wait_s` until it does, and must then be
        called without the lock. Raises PeerLost."""
        return has_output(self._live().engine_core, wait_s, "vllm.LLM")

    def _step(self) -> list[Any]:
        """Step the engine. Returns the outputs of users' requests."""
        return self._sort(self._call("step"))

    def _sort(self, outputs: Iterable[Any]) -> list[Any]:
        rest: list[Any] = []
        for output in outputs:
            if output.request_id not in self._ours:
                rest.append(output)
            elif output.finished:
                self._ours[output.request_id] = output
        return rest

    def _call(self, way: str, *args: Any, **kwargs: Any) -> Any:
        """The engine's own method, past the gate's."""
        engine = self._live()
        return getattr(type(engine), way)(engine, *args, **kwargs)

    def _live(self) -> Any:
        engine = self._engine()
        if engine is None:
            raise _gone_error()
        return engine


class _OneSender:
    """Lets one thread at a time send to an engine core in another process. Its client has one ZeroMQ socket, which two
    threads at once break: the process aborts, or the core's input ends. The bridge pushes from a thread of its own
    beside the user's.

    Takes the place of a method of the client, and must not keep that alive: its end ends the core's process.
    """

    def __init__(self, send: Any) -> None:
        self._send = WeakMethod(send)
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        send = self._send()
        if send is None:
            raise _gone_error()
        with self._lock:
            return send(*args, **kwargs)


def _gone_error() -> EngineQuarantined:
    return EngineQuarantined(
        "the engine is gone",
        where="vllm.LLM",
        expected="an engine that runs",
        got="it was deleted",
        remedy="make a new one and attach to it",
    )
