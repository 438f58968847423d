"""What stands in front of a `vllm.LLM`'s engine: holds callers during a push, refuses them afterwards if need be, and
lets the bridge's own requests through.

The gate hangs on the engine object (`LLMEngine`), through which every way to generate leads: `add_request` and `step`.
Results of other requests that fall out while the bridge steps the engine are kept, and handed out at the next `step`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

from bridge.deadline import Deadline
from bridge.errors import EngineQuarantined

_KEY = "_weighbridge_gate"
_WAYS = ("add_request", "step", "has_unfinished_requests")


class Gate:
    """One per engine object, whoever attaches to it: made by `Gate.of`, gone with `lift` unless it refuses."""

    def __init__(self, engine: Any) -> None:
        self._engine = ref(engine)
        self.reason: str | None = None
        self._opened = threading.Condition()
        self._held = False
        self._guest: int | None = None
        self._stepping = threading.RLock()
        self._ours: dict[str, Any] = {}
        self._others: list[Any] = []

    @classmethod
    def of(cls, engine: Any) -> Gate:
        """The gate of this engine, hung there if it has none."""
        found = vars(engine).get(_KEY)
        if isinstance(found, Gate):
            return found
        gate = cls(engine)
        vars(engine)[_KEY] = gate
        for way in _WAYS:
            vars(engine)[way] = getattr(gate, way)
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
        self._enter()
        return self._call("add_request", *args, **kwargs)

    def step(self) -> list[Any]:
        self._enter()
        with self._stepping:
            kept, self._others = self._others, []
            return kept or self._step()

    def has_unfinished_requests(self) -> bool:
        return bool(self._others) or bool(self._call("has_unfinished_requests"))

    def _enter(self) -> None:
        """Wait while a push is under way; raise while the engine refuses."""
        with self._opened:
            self._opened.wait_for(lambda: not self._held or self._guest == threading.get_ident())
        if self.reason is not None and self._guest != threading.get_ident():
            raise EngineQuarantined(
                "this engine holds weights that nobody verified and serves nothing",
                where="vllm.LLM",
                got=self.reason,
                remedy="push a version that verifies",
            )

    # ---- what the bridge does ------------------------------------------------------------------------------------

    def hold(self) -> None:
        """From now on callers wait. What is in flight goes on until the engine itself is paused. Idempotent."""
        with self._opened:
            self._held = True

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
            with self._stepping:
                if self._call("has_unfinished_requests"):
                    self._others += self._step()

    def abort(self, adapters: Container[str] | None = None) -> None:
        """End what runs or waits (with `adapters`: what uses one of these); its callers get what there is, marked as
        aborted. The bridge's own requests are left alone."""
        from vllm.v1.engine import FinishReason

        engine = self._live()
        states = {
            name: state
            for name, state in engine.output_processor.request_states.items()
            if state.external_req_id not in self._ours and (adapters is None or state.lora_name in adapters)
        }
        for state in states.values():
            output = state.make_request_output([], None, FinishReason.ABORT, None)
            if output is not None:
                self._others.append(output)
        engine.abort_request(list(states), internal=True)

    def run(
        self, add: Callable[[Callable[..., str], int], str], count: int, deadline: Deadline | None = None
    ) -> list[Any]:
        """Add `count` requests past the gate (`add(add_request, k)` answers the id) and step until all are done; their
        final outputs. Blocks. Raises DeadlineExceeded, and ends them."""
        ids: list[str] = []
        self._guest, before = threading.get_ident(), self._guest
        try:
            for k in range(count):
                ids.append(add(self._add_ours, k))
            while any(self._ours[name] is None for name in ids):
                if deadline is not None:
                    deadline.check("requests of the bridge did not finish")
                with self._stepping:
                    if any(self._ours[name] is None for name in ids):
                        self._others += self._step()
            return [self._ours[name] for name in ids]
        finally:
            self._guest = before
            unfinished = [name for name in ids if self._ours.get(name) is None]
            for name in ids:
                self._ours.pop(name, None)
            if unfinished:
                self._live().abort_request(unfinished)

    def _add_ours(self, request_id: str, *args: Any, **kwargs: Any) -> str:
        self._ours[request_id] = None
        self._call("add_request", request_id, *args, **kwargs)
        return request_id

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


def running_adapters(engine: Any) -> Sequence[str]:
    """Names of the adapters that some running or waiting request uses."""
    states = engine.output_processor.request_states.values()
    return [state.lora_name for state in states if state.lora_name is not None]
