"""The embedded engine called in a thread, held between two steps, and its queue: the tests' way into it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from bridge.protocol.codec import Completion
from bridge.protocol.deadline import Deadline
from engine_side.embedded.engine import Engine
from engine_side.embedded.scheduler import Scheduler


def no_step(engine: Engine) -> AbstractContextManager[None]:
    """Inside the block the engine makes no step, as if one took that long."""
    return engine._exclusive(Deadline.after(20))


def scheduler_of(engine: Engine) -> Scheduler:
    """The engine's queue, to wait until requests are in it and to break it."""
    return engine._scheduler


class Call:
    """generate in a thread; `result` returns or raises what it did."""

    def __init__(self, work: Callable[[], list[Completion]]) -> None:
        self._answer: list[Any] = []
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], list[Completion]]) -> None:
        try:
            self._answer.append(work())
        except Exception as error:
            self._answer.append(error)

    def waits(self) -> bool:
        self._thread.join(0.1)
        return self._thread.is_alive()

    def result(self) -> list[Completion]:
        self._thread.join(20)
        answer = self._answer[0]
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]
