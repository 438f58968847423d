"""Calls to an engine core in another process that end when the core ends: vLLM's own clients wait for its answer
without a limit, even after it died (https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/engine/core_client.py).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from bridge.errors import DeadlineExceeded, PeerLost
from bridge.protocol.deadline import Deadline

T = TypeVar("T")
LOOK_S = 0.1
"""Time between two looks at a core that does not answer."""
GRACE_S = 1.0
"""Time for vLLM to fail a call itself, once its engine core has ended."""


def has_died(core: Any) -> bool:
    """True when the process of this engine-core client has ended; False for a core of this process. Does not block."""
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


def died_error(where: str, got: str = "its process has ended") -> PeerLost:
    """The error for an engine core whose process has ended."""
    return PeerLost(
        "vLLM's engine core has died", where=where, expected="a running core", got=got, remedy="start the engine again"
    )


def wait_for(future: Future[T], core: Any, deadline: Deadline | None, where: str) -> T:
    """Wait for a call that the engine core answers, and return its result. Blocks; without a deadline for as long as
    the core lives.

    Raises:
        PeerLost: the core has ended, and vLLM has not failed the call itself GRACE_S later.
        DeadlineExceeded: no answer in time.
    """
    while not wait((future,), LOOK_S if deadline is None else min(LOOK_S, deadline.remaining_s)).done:
        if deadline is not None and deadline.expired:
            future.cancel()
            remedy = "look for a hung worker in vLLM's log, or raise timeout_s"
            raise DeadlineExceeded(
                "vLLM did not answer in time",
                where=where,
                expected="an answer before the deadline",
                got="none",
                remedy=remedy,
            )
        if has_died(core) and not wait((future,), GRACE_S).done:
            future.cancel()
            raise died_error(where)
    return future.result()


def call_core(core: Any, call: Callable[[], T], deadline: Deadline, where: str) -> T:
    """Run `call`, which asks the engine core, and return its result. Blocks, and raises as `wait_for`. A call without
    an answer goes on by itself, on a daemon thread: it cannot be interrupted."""
    if has_died(core):
        raise died_error(where)
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # thread boundary: the waiting thread raises it
            future.set_exception(error)

    threading.Thread(target=run, name="weighbridge-vllm-call", daemon=True).start()
    return wait_for(future, core, deadline, where)


def has_output(core: Any, wait_s: float, where: str) -> bool:
    """True when the next step of the engine returns without waiting. Blocks for up to `wait_s` until it does.

    Always True for a core of this process, which computes during the step. Raises PeerLost.
    """
    outputs = getattr(core, "outputs_queue", None)
    if not isinstance(outputs, queue.Queue):
        return True
    with outputs.not_empty:
        if not outputs.queue:
            outputs.not_empty.wait(wait_s)
        found = bool(outputs.queue)
    if not found and has_died(core):
        raise died_error(where)
    return found
