"""Hosting: an AsyncLLM of our own, started from arguments, on an event loop of its own, and ended without leftovers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from bridge.daemon.processes import started_at
from bridge.errors import BridgeError, ConfigError
from engine_side.engines.common import claim, hosting
from engine_side.engines.vllm.channels import VllmLoopChannel
from engine_side.engines.vllm.facts import check_facts, facts_of
from engine_side.engines.vllm.plugin import BACKEND, register
from engine_side.engines.vllm.remote import AsyncDriver
from engine_side.engines.vllm.versions import check_version

STOP_S = 20.0


class HostedDriver(AsyncDriver):
    """Over an AsyncLLM that ends with it."""

    def __init__(self, line: VllmLoopChannel, leavings: hosting.Leavings) -> None:
        self._loop = line
        self._leavings = leavings
        facts = facts_of(line.engine.vllm_config)
        own = (os.getpid(), started_at(os.getpid()) or "")
        super().__init__(line, facts, "AsyncLLM", own, on_close=self._stop)

    def claim(self, owner: str) -> None:
        claim.take(self._loop.engine, self, owner)
        super().claim(owner)

    def _stop(self) -> None:
        """The engine's processes end, and what they had in shared memory goes with them. Idempotent."""
        engine = self._loop.engine
        if engine is None:
            return
        self._loop.engine = None
        self._leavings.note()
        try:
            engine.shutdown(timeout=STOP_S)
        finally:
            self._loop.stop()
            self._leavings.remove()


def host(path: str, arguments: Mapping[str, Any]) -> HostedDriver:
    """Start vLLM on a checkpoint folder; `arguments` are vLLM's own engine arguments. Blocks until it can serve. Raises
    ConfigError, naming the argument, for one that vLLM does not have or does not accept."""
    try:
        import vllm
        from vllm.v1.engine.async_llm import AsyncLLM
    except ModuleNotFoundError as error:
        raise ConfigError(
            "vLLM is not installed", where="engine", got=f"no module named {error.name}", remedy="pip install vllm"
        ) from error
    from engine_side.engines.vllm.frontend import VllmFrontend

    check_version(str(vllm.__version__))
    register()  # in an environment where the plugin's entry point is switched off, our own engine has it all the same
    config = _config(path, arguments)
    line, leavings = VllmLoopChannel(), hosting.Leavings()
    try:
        line.engine = line.run(_made(AsyncLLM, config), None)
        line.front = VllmFrontend.of(line.engine)
        return HostedDriver(line, leavings)
    except BaseException as error:
        if line.engine is not None:
            line.engine.shutdown(timeout=STOP_S)
        line.stop()
        if isinstance(error, BridgeError) or not isinstance(error, Exception):
            raise
        raise ConfigError(
            "vLLM could not be started with these arguments",
            where=f"vllm:{path}",
            got=f"{type(error).__name__}: {error}"[:2000],
            remedy="vLLM's own log has the details",
        ) from error


async def _made(kind: Any, config: Any) -> Any:
    """On the loop, so that vLLM's output handler starts there."""
    return kind.from_vllm_config(config, disable_log_stats=True)


def _config(path: str, arguments: Mapping[str, Any]) -> Any:
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs) if field.init}
    hosting.check_names("vllm", "vllm.AsyncEngineArgs", arguments, known, "model")
    given = {**hosting.with_dtype(arguments), "model": path}
    given.setdefault("skip_tokenizer_init", True)  # prompts and answers are token ids
    given.setdefault("weight_transfer_config", WeightTransferConfig(backend=BACKEND))
    try:
        config = AsyncEngineArgs(**given).create_engine_config()
    except (ValueError, TypeError, AssertionError, NotImplementedError, OSError) as error:
        raise hosting.not_accepted("vllm", path, arguments, error) from error
    check_facts(
        facts_of(config),
        where="weight_transfer_config",
        expected=f"backend={BACKEND!r}",
        remedy="leave this argument out: a hosted engine has it",
    )
    return config
