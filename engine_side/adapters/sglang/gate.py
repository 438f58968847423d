"""What stands in front of an SGLang engine's requests: callers wait while it is paused, and are refused if need be.

Every way to generate (blocking, async, over HTTP in the same process) waits on one condition of the tokenizer manager
before a request leaves for the scheduler. The gate takes its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from bridge.errors import ConfigError, EngineQuarantined

OURS: ContextVar[bool] = ContextVar("weighbridge_ours", default=False)
"""Set in tasks whose requests are the bridge's own: they pass."""


class Gate(asyncio.Condition):
    """`is_pause_cond` of one tokenizer manager. Used in its event loop only."""

    def __init__(self) -> None:
        super().__init__()
        self.reason: str | None = None

    @classmethod
    def of(cls, manager: Any) -> Gate:
        """The gate of this tokenizer manager, put there if it has none. Raises ConfigError for one that somebody has
        paused: its waiting callers could not be told."""
        found = manager.is_pause_cond
        if isinstance(found, Gate):
            return found
        if manager.is_pause:
            raise ConfigError(
                "the engine is paused",
                where="sglang.Engine",
                got="pause_generation by somebody else",
                remedy="continue_generation, then try again",
            )
        gate = manager.is_pause_cond = cls()
        return gate

    async def wait_for(self, predicate: Callable[[], bool]) -> bool:  # type: ignore[override]
        """Raises EngineQuarantined while the engine refuses, also for those who waited already."""
        if OURS.get():
            return True
        await super().wait_for(lambda: self.reason is not None or predicate())
        if self.reason is not None:
            raise EngineQuarantined(
                "this engine holds weights that nobody verified and serves nothing",
                where="sglang.Engine",
                got=self.reason,
                remedy="push a version that verifies",
            )
        return True

    async def refuse(self, reason: str | None) -> None:
        async with self:
            self.reason = reason
            self.notify_all()
