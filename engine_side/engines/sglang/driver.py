"""The driver half for a `sglang.Engine` of this process; its schedulers are processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from bridge.errors import ProtocolError
from engine_side.engines.common import claim
from engine_side.engines.sglang import LOADER
from engine_side.engines.sglang.common import Arguments
from engine_side.engines.sglang.in_process_channel import LoopLine
from engine_side.engines.sglang.remote import FrontendDriver
from engine_side.engines.sglang.versions import check_version

START = f'sglang.Engine(..., custom_weight_loader=["{LOADER}"])'


class SglangEngineDriver(FrontendDriver):
    """Over one Engine, which stays its owner's, or ends with the adapter where `on_close` ends it."""

    def __init__(self, engine: Any, *, on_close: Callable[[], None] | None = None) -> None:
        where = "sglang.Engine"
        arguments = Arguments.read(partial(getattr, engine.server_args), where, START)
        self.engine = engine
        line = LoopLine.of(engine)
        super().__init__(line, arguments, where, on_close=on_close)
        self._taken: LoopLine | None = line
        line.take()
        try:
            self.facts()
        except BaseException:
            self._hang_up()
            raise

    @property
    def line(self) -> LoopLine:
        if self._taken is None:
            raise ProtocolError("this adapter was closed", where=self.where)
        return self._taken

    def refuse_caller(self) -> None:
        """Raises ConfigError when this thread runs the engine's event loop. After `close` nothing is asked of it."""
        if self._taken is not None:
            self._taken.refuse_caller()

    def claim(self, owner: str) -> None:
        """By a mark on the engine object, which knows when an adapter was forgotten instead of closed."""
        try:
            claim.take(self.engine, self, owner)
            self._require_ready()
        except BaseException:
            self._hang_up()
            raise

    def close(self) -> None:
        """The engine runs on, or goes on refusing; one of ours ends. Idempotent."""
        claim.give_up(self.engine, self)
        self._hang_up()
        super().close()

    def _hang_up(self) -> None:
        if self._taken is not None:
            line, self._taken = self._taken, None
            line.give_up()


def attach(engine: object, canonical: object = None) -> SglangEngineDriver | None:
    """The adapter of a `sglang.Engine` of this process; None for anything else. Raises ConfigError for one that was
    started without the loader or the plugin, or that this adapter cannot drive. Does not import SGLang."""
    module = sys.modules.get("sglang.srt.entrypoints.engine")
    if module is None or not isinstance(engine, module.Engine):
        return None
    check_version(str(module.__version__))
    return SglangEngineDriver(engine)
