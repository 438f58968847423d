"""What stands in front of a `vllm.LLM`'s engine: holds callers during a push, refuses them afterwards if need be, and
lets the bridge's own requests through.

The gate hangs on the engine object (`LLMEngine`), through which every way to generate leads: `add_request` and `step`.
Results of other requests that fall out while the bridge steps the engine are kept, and handed out at the next `step`.
The bridge's own requests do not come through here: `run` calls the engine's methods past what hangs on the object.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakMethod, ref

from bridge.errors import DeadlineExceeded, EngineQuarantined
from bridge.protocol.deadline import Deadline
from engine_side.engines.vllm.liveness import LOOK_S, has_output

_KEY = "_weighbridge_gate"
_WAYS = ("add_request", "step", "has_unfinished_requests")


class VllmGate:
    """One per engine object, whoever attaches to it: made by `VllmGate.of`, gone with `lift` unless it refuses."""

    def __init__(self, engine: Any) -> None:
        self._engine = ref(engine)
        self.reason: str | None = None
        self._opened = threading.Condition()
        self._held = False
        self._entering = 0
        self._stepping = threading.RLock()
        self._ours: dict[str, Any] = {}
        self._privileged: set[str] = set()
        self._others: list[Any] = []

    @classmethod
    def of(cls, engine: Any) -> VllmGate:
        """The gate of this engine, hung there if it has none."""
        found = vars(engine).get(_KEY)
        if isinstance(found, VllmGate):
            return found
        gate = cls(engine)
        vars(engine)[_KEY] = gate
        for way in _WAYS:
            vars(engine)[way] = getattr(gate, way)
        one_sender_at_a_time(engine.engine_core)
        return gate

    def lift(self) -> None:
        """Take the gate away, unless it refuses or still holds results of the user's."""
        self.release()
        if self.reason is None and not self._others:
            state = vars(self._live())
            for way in (_KEY, *_WAYS):
                state.pop(way, None)

    # ---- what the engine's callers meet --------------------------------------------------------------------------

    def add_request(self, *args: Any, **kwargs: Any) -> Any:
        with self.entering(None), self._stepping:
            return self._call("add_request", *args, **kwargs)

    def step(self) -> list[Any]:
        while True:
            self.enter()
            with self._stepping:
                if self._others or self._ready(0.0):
                    kept, self._others = self._others, []
                    return kept or self._step()
            self._ready(LOOK_S)

    def has_unfinished_requests(self) -> bool:
        return bool(self._others) or bool(self._call("has_unfinished_requests"))

    def enter(self, deadline: Deadline | None = None) -> None:
        """Wait while a push is under way. Raises EngineQuarantined while the engine refuses, DeadlineExceeded."""
        with self._opened:
            if not self._opened.wait_for(lambda: not self._held, None if deadline is None else deadline.remaining_s):
                raise DeadlineExceeded("a push is under way", where="vllm.LLM")
        if self.reason is not None:
            raise EngineQuarantined(
                "this engine holds weights that nobody verified and serves nothing",
                where="vllm.LLM",
                got=self.reason,
                remedy="push a version that verifies",
            )

    @contextmanager
    def entering(self, deadline: Deadline | None) -> Iterator[None]:
        """Inside, a request is handed to the engine, under what serves now: no push begins before it has arrived. Waits
        and raises as `enter`."""
        while True:
            self.enter(deadline)
            with self._opened:
                if not self._held:
                    self._entering += 1
                    break
        try:
            yield
        finally:
            with self._opened:
                self._entering -= 1
                self._opened.notify_all()

    @property
    def held(self) -> bool:
        """Do callers wait?"""
        return self._held

    @property
    def keeps(self) -> bool:
        """Does the engine hold requests, rollouts asked of the bridge among them?"""
        return bool(self._states())

    # ---- what the bridge does ------------------------------------------------------------------------------------

    def hold(self, deadline: Deadline) -> None:
        """From now on callers wait, and whoever was on the way in has arrived. What is in flight goes on until the
        engine itself is paused. Idempotent. Raises DeadlineExceeded, and holds."""
        with self._opened:
            self._held = True
            if not self._opened.wait_for(lambda: not self._entering, deadline.remaining_s):
                raise DeadlineExceeded("requests on their way into the engine did not arrive", where="vllm.LLM")

    def release(self) -> None:
        """Callers go on. Idempotent."""
        with self._opened:
            self._held = False
            self._opened.notify_all()

    @contextmanager
    def between_steps(self, *, stepping_blocks: bool) -> Iterator[None]:
        """No step of an engine of this process is under way inside. One that only waits for another process
        (`stepping_blocks`) is no obstacle, and would never end while that one is paused."""
        if stepping_blocks:
            yield
            return
        with self._stepping:
            yield

    def drain(self, deadline: Deadline) -> None:
        """Step until nothing runs or waits any more. Raises DeadlineExceeded."""
        while self._call("has_unfinished_requests"):
            deadline.check("requests in flight did not finish")
            self._ready(LOOK_S)
            with self._stepping:
                if self._call("has_unfinished_requests") and self._ready(0.0):
                    self._others += self._step()

    def tidy(self) -> None:
        """Where nothing runs any more: let the engine forget what has finished, which it does at its next step."""
        with self._stepping:
            if not self._call("has_unfinished_requests") and self._ready(0.0):
                self._others += self._step()

    def abort(self, adapters: Container[str] | None = None, *, rollouts: bool = True) -> None:
        """EndRequests what runs or waits (with `adapters`: what uses one of these); its callers get what there is, marked as
        aborted. What runs past the gate is left alone; without `rollouts` all that was asked of the bridge is."""
        from vllm.v1.engine import FinishReason

        engine = self._live()
        with self._stepping:
            alone = self._privileged if rollouts else self._ours
            states = {
                name: state
                for name, state in self._states().items()
                if state.external_req_id not in alone and (adapters is None or state.lora_name in adapters)
            }
            for state in states.values():
                output = state.make_request_output([], None, FinishReason.ABORT, None)
                if output is not None:
                    self._others += self._sort([output])
            engine.abort_request(list(states), internal=True)

    def run(
        self,
        add: Callable[[Callable[..., str], int], str],
        count: int,
        deadline: Deadline | None = None,
        *,
        past: bool = False,
    ) -> list[Any]:
        """Add `count` requests (`add(add_request, k)` answers the id) and step until all are done; their final outputs.
        Blocks. With `past`, although callers are held or refused; else as one of them. Raises DeadlineExceeded,
        EngineQuarantined and PeerLost, and ends the requests."""
        ids: list[str] = []
        try:
            with nullcontext() if past else self.entering(deadline):
                for k in range(count):
                    ids.append(add(partial(self._add_ours, past), k))
            while self._waits_for(ids):
                if deadline is not None:
                    deadline.check("requests of the bridge did not finish")
                if not past:
                    self.enter(deadline)
                self._ready(LOOK_S)
                with self._stepping:
                    if self._waits_for(ids) and (past or self._is_open()) and self._ready(0.0):
                        self._others += self._step()
            return [self._ours[name] for name in ids]
        finally:
            unfinished = [name for name in ids if self._ours.get(name) is None]
            for name in ids:
                self._ours.pop(name, None)
            self._privileged.difference_update(ids)
            if unfinished:
                with self._stepping:
                    self._live().abort_request(unfinished)

    def _waits_for(self, ids: Iterable[str]) -> bool:
        return any(self._ours[name] is None for name in ids)

    def _is_open(self) -> bool:
        return not self._held and self.reason is None

    def _ready(self, wait_s: float) -> bool:
        """Would a step return without waiting? Blocks for up to `wait_s` for it, and must then be called without the
        lock. Raises PeerLost."""
        return has_output(self._live().engine_core, wait_s, "vllm.LLM")

    def _add_ours(self, past: bool, request_id: str, *args: Any, **kwargs: Any) -> str:
        self._ours[request_id] = None
        if past:
            self._privileged.add(request_id)
        with self._stepping:
            self._call("add_request", request_id, *args, **kwargs)
        return request_id

    def _states(self) -> dict[str, Any]:
        """What the engine has not finished, as of now: callers add to it meanwhile."""
        return dict(self._live().output_processor.request_states)

    def _step(self) -> list[Any]:
        """One step of the engine; outputs that are not ours."""
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
        """The engine's own method, past what hangs on the object."""
        engine = self._live()
        return getattr(type(engine), way)(engine, *args, **kwargs)

    def _live(self) -> Any:
        engine = self._engine()
        if engine is None:
            raise EngineQuarantined("the engine is gone", where="vllm.LLM", got="it was deleted")
        return engine


def one_sender_at_a_time(core: Any) -> None:
    """A client of an engine core in another process sends through one ZeroMQ socket, which two threads at once break:
    the process aborts, or the core's input ends. The bridge pushes from a thread of its own beside the user's."""
    send = getattr(core, "_send_input", None)
    if send is None or isinstance(send, _OneAtATime):
        return
    core._send_input = _OneAtATime(send)


class _OneAtATime:
    """Over a method of the object that it hangs on: it must not keep that alive, whose end ends the core's process."""

    def __init__(self, send: Any) -> None:
        self._send = WeakMethod(send)
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        send = self._send()
        if send is None:
            raise EngineQuarantined("the engine is gone", where="vllm.LLM", got="it was deleted")
        with self._lock:
            return send(*args, **kwargs)


def running_loras(engine: Any) -> Sequence[str]:
    """Names of the adapters that some running or waiting request uses."""
    states = dict(engine.output_processor.request_states)
    return [state.lora_name for state in states.values() if state.lora_name is not None]
