"""The condition on which every request of an SGLang engine waits before it leaves for the scheduler, made into a gate.

Every way to generate (blocking, async, over HTTP) waits on one condition of the tokenizer manager. The gate takes its
place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi import HTTPException

from bridge.errors import EngineQuarantined
from engine_side.engines.common.frontend import quarantine_error


class Gate(asyncio.Condition):
    """`is_pause_cond` of one tokenizer manager. Used in its event loop only.

    Attributes:
        shut: callers wait, whether the engine is paused or not.
    """

    def __init__(self, passes: Callable[[bool], bool]) -> None:
        """`passes` is told whether the engine runs, and says whether the caller passes; it raises for one that is to be
        refused."""
        super().__init__()
        self._passes = passes
        self.shut = False

    async def wait_for(self, predicate: Callable[[], bool]) -> bool:  # type: ignore[override]
        """Raises Refused while the engine refuses, also for those who waited already."""
        return await super().wait_for(lambda: self._passes(predicate()))


class Refused(EngineQuarantined, HTTPException):  # type: ignore[misc]  # fastapi is not looked into
    """What callers meet in front of an engine that serves nothing; SGLang's servers answer it as a 503."""

    def __init__(self, where: str, reason: str) -> None:
        said = quarantine_error(where, reason)
        super().__init__(said.what, where=said.where, got=said.got, remedy=said.remedy)
        self.status_code, self.detail, self.headers = 503, self._message(), None

    def __str__(self) -> str:
        return self._message()
