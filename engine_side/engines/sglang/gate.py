"""Hold every request of an SGLang engine before it leaves for the scheduler.

Every way to generate (blocking, async, HTTP) waits on one condition of the tokenizer manager, `is_pause_cond`; the gate
takes its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi import HTTPException

from bridge.errors import EngineQuarantined
from engine_side.engines.common.frontend import quarantine_error


class SglangGate(asyncio.Condition):
    """Stands in for `is_pause_cond` of one tokenizer manager. Used in the manager's event loop only.

    Attributes:
        shut: requests wait, whether the engine is paused or not.
    """

    def __init__(self, passes: Callable[[bool], bool]) -> None:
        """Make an open gate.

        Args:
            passes: called with whether the engine runs; returns whether the request passes, or raises to refuse it.
        """
        super().__init__()
        self._passes = passes
        self.shut = False

    async def wait_for(self, predicate: Callable[[], bool]) -> bool:  # type: ignore[override]
        """Wait until the request passes. Raises QuarantinedRequest while the engine refuses, also for requests that
        waited before."""
        return await super().wait_for(lambda: self._passes(predicate()))


class QuarantinedRequest(EngineQuarantined, HTTPException):  # type: ignore[misc]  # fastapi is not looked into
    """The refusal of a request by a quarantined engine; SGLang's server answers it with status 503."""

    def __init__(self, where: str, reason: str) -> None:
        error = quarantine_error(where, reason)
        super().__init__(error.what, where=error.where, got=error.got, remedy=error.remedy)
        self.status_code, self.detail, self.headers = 503, self._message(), None

    def __str__(self) -> str:
        return self._message()
