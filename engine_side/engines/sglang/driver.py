"""Drive a `sglang.Engine` of this process; its schedulers are processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from engine_side.engines.common import claim
from engine_side.engines.sglang import LOADER
from engine_side.engines.sglang.arguments import SglangArguments
from engine_side.engines.sglang.in_process_channel import InProcessChannel
from engine_side.engines.sglang.remote import SglangDriver
from engine_side.engines.sglang.versions import check_version

START = f'sglang.Engine(..., custom_weight_loader=["{LOADER}"])'


class SglangEngineDriver(SglangDriver):
    """The driver of one Engine object, which stays its owner's unless `on_close` ends it."""

    def __init__(self, engine: Any, *, on_close: Callable[[], None] | None = None) -> None:
        """Open the channel and ask the schedulers for their facts. Blocks. Raises ConfigError for an engine that was
        started without the loader or the plugin, or that cannot be driven."""
        where = "sglang.Engine"
        arguments = SglangArguments.read(partial(getattr, engine.server_args), where, START)
        self.engine = engine
        self._in_process = InProcessChannel.open(engine, self)
        super().__init__(self._in_process, arguments, where, on_close=on_close)
        self._closed = False
        try:
            self.facts()
        except BaseException:
            self._in_process.close(self)
            raise

    def refuse_caller(self) -> None:
        """Raises ConfigError when this thread runs the engine's event loop. After `close` every thread may call."""
        if not self._closed:
            self._in_process.refuse_caller()

    def claim(self, owner: str) -> None:
        """Mark the engine object as driven by this bridge. The mark also knows when a driver was collected unclosed.
        Raises Busy while another bridge drives the engine, ConfigError for one that somebody else has paused."""
        try:
            claim.take(self.engine, self, owner)
            self._require_ready()
        except BaseException:
            self._in_process.close(self)
            raise

    def close(self) -> None:
        """Give up the claim and the channel; the engine runs on, or goes on refusing, unless it is ours. Idempotent.
        Raises as `InProcessChannel.close`."""
        self._closed = True
        claim.give_up(self.engine, self)
        try:
            self._in_process.close(self)
        finally:
            super().close()


def attach(engine: object) -> SglangEngineDriver | None:
    """Return the driver of a `sglang.Engine` of this process; None for any other object. Does not import SGLang. Blocks
    and raises as `SglangEngineDriver`."""
    module = sys.modules.get("sglang.srt.entrypoints.engine")
    if module is None or not isinstance(engine, module.Engine):
        return None
    check_version(str(module.__version__))
    return SglangEngineDriver(engine)
