"""Calls to an engine core in a process of its own: vLLM's clients wait for an answer for ever, also for one that a dead
core will never give."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from bridge.errors import DeadlineExceeded, PeerLost
from bridge.protocol.deadline import Deadline

T = TypeVar("T")
LOOK_S = 0.1
"""How often a core that does not answer is looked at."""


def has_died(core: Any) -> bool:
    """Has the process of this engine-core client ended? False for an engine core of this process. Does not block."""
    resources = getattr(core, "resources", None)
    if resources is None:
        return False
    if resources.engine_dead:
        return True
    processes = getattr(resources.engine_manager, "processes", ())
    try:
        return any(not process.is_alive() for process in processes)
    except ValueError:
        return True  # closed: somebody has shut the engine down meanwhile


def lost(where: str, got: str = "its process has ended") -> PeerLost:
    return PeerLost("vLLM's engine core has died", where=where, got=got, remedy="start the engine again")


def answered(core: Any, call: Callable[[], T], deadline: Deadline, where: str) -> T:
    """What `call` returns. Blocks until then, until the deadline or the core's end. Raises DeadlineExceeded, PeerLost,
    and what the call raises. A call that came too late goes on by itself, on a thread of its own."""
    if has_died(core):
        raise lost(where)
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # thread boundary: whoever waits gets it
            future.set_exception(error)

    threading.Thread(target=run, name="weighbridge-vllm-call", daemon=True).start()
    while True:
        try:
            return future.result(max(min(LOOK_S, deadline.remaining_s), 0.001))
        except TimeoutError:
            if future.done():
                return future.result()
        if has_died(core):
            raise lost(where)
        if deadline.expired:
            raise DeadlineExceeded("vLLM did not answer in time", where=where)


def has_output(core: Any, wait_s: float, where: str) -> bool:
    """Would the next step of the engine return without waiting? Blocks for up to `wait_s` until it would; always True
    where the core is of this process, and steps when it is asked to. Raises PeerLost."""
    outputs = getattr(core, "outputs_queue", None)
    if not isinstance(outputs, queue.Queue):
        return True
    with outputs.not_empty:
        if not outputs.queue:
            outputs.not_empty.wait(wait_s)
        found = bool(outputs.queue)
    if not found and has_died(core):
        raise lost(where)
    return found
