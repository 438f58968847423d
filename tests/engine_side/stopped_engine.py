"""The embedded engine held between two steps, and its queue: where tests reach into its private parts."""

from __future__ import annotations

from contextlib import AbstractContextManager

from bridge.protocol.deadline import Deadline
from engine_side.embedded.engine import Engine
from engine_side.embedded.scheduler import Scheduler


def no_step(engine: Engine) -> AbstractContextManager[None]:
    """Inside the block the engine makes no step, as if one took that long."""
    return engine._exclusive(Deadline.after(20))


def scheduler_of(engine: Engine) -> Scheduler:
    """The engine's queue, to wait until requests are in it and to break it."""
    return engine._scheduler
