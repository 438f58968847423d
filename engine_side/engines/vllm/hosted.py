"""Hosting vLLM: start an AsyncLLM of our own on an event loop of its own, and end it without leftovers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from bridge.errors import BridgeError, ConfigError
from engine_side.engines.common import hosting
from engine_side.engines.vllm.channels import VllmLoopChannel
from engine_side.engines.vllm.facts import check_facts, facts_of
from engine_side.engines.vllm.plugin import BACKEND, register
from engine_side.engines.vllm.remote import AsyncDriver
from engine_side.engines.vllm.versions import check_version

STOP_S = 20.0
"""Time for an engine to shut down by itself."""


def host(path: str, arguments: Mapping[str, Any]) -> AsyncDriver:
    """Start vLLM on a checkpoint folder. Blocks until it can serve; vLLM itself ends a start that takes longer than
    VLLM_ENGINE_READY_TIMEOUT_S.

    Args:
        arguments: vLLM's own engine arguments.

    Raises:
        ConfigError: vLLM is not installed, its version was not tried, or it does not have or accept an argument, which
            the message names.
    """
    try:
        import vllm
        from vllm.v1.engine.async_llm import AsyncLLM
    except ModuleNotFoundError as error:
        raise hosting.not_installed("vLLM", error) from error
    from engine_side.engines.vllm.frontend import VllmFrontend

    check_version(str(vllm.__version__))
    register()  # in an environment where the plugin's entry point is switched off, our own engine has it all the same
    config = _engine_config(path, arguments)
    channel, leavings = VllmLoopChannel(), hosting.Leavings()

    async def start() -> Any:  # on the loop, so that vLLM's output handler starts there
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True)

    try:
        channel.engine = channel.run(start(), None)
        channel.front = VllmFrontend.of(channel.engine)
        facts = facts_of(channel.engine.vllm_config)
        return AsyncDriver(channel, facts, "AsyncLLM", on_close=partial(_end_engine, channel, leavings))
    except BaseException as error:
        _end_engine(channel, leavings)
        if isinstance(error, BridgeError) or not isinstance(error, Exception):
            raise
        raise ConfigError(
            "vLLM could not be started with these arguments",
            where=f"vllm:{path}",
            got=f"{type(error).__name__}: {error}"[:2000],
            remedy="vLLM's own log has the details",
        ) from error


def _end_engine(channel: VllmLoopChannel, leavings: hosting.Leavings) -> None:
    """End the engine's processes and remove what they leave in shared memory. Idempotent."""
    engine, channel.engine = channel.engine, None
    try:
        if engine is not None:
            leavings.note()
            engine.shutdown(timeout=STOP_S)
    finally:
        channel.stop()
        leavings.remove()


def _engine_config(path: str, arguments: Mapping[str, Any]) -> Any:
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
