"""Hosting vLLM: start an AsyncLLM of our own on an event loop of its own, and end it without leftovers."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import CancelledError, wait
from functools import partial
from typing import Any, TypeVar

from bridge.entry_points import load
from bridge.errors import BridgeError, PeerLost
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common import hosting
from engine_side.engines.common.refusals import require_version
from engine_side.engines.vllm.facts import check_facts, facts_of
from engine_side.engines.vllm.liveness import died_error, wait_for
from engine_side.engines.vllm.plugin import BACKEND, register
from engine_side.engines.vllm.remote import AsyncDriver

T = TypeVar("T")
STOP_S = 20.0
"""Time for an engine to shut down by itself."""
END_S = 10.0
"""Time for the tasks of an event loop to end."""


class VllmLoopChannel:
    """An event loop on a thread of its own, and the AsyncLLM that lives on it.

    Attributes:
        engine: the AsyncLLM; None before it was made and after it was ended.
        front: its VllmFrontend.
    """

    def __init__(self) -> None:
        self.engine: Any = None
        self.front: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="weighbridge-vllm", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], deadline: Deadline | None) -> T:
        """Run a coroutine on the loop and wait for its result. Without a deadline this waits for as long as the engine
        core lives.

        Raises:
            DeadlineExceeded: the coroutine was cancelled at the deadline.
            PeerLost: the engine core has ended, or the loop was stopped.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return wait_for(future, getattr(self.engine, "engine_core", None), deadline, "AsyncLLM")
        except CancelledError as error:
            raise PeerLost(
                "vLLM's engine was stopped",
                where="AsyncLLM",
                expected="an engine that runs",
                got="closed",
                remedy="start it again",
            ) from error

    def stop(self) -> None:
        """End the loop and what still waits on it. Blocks for at most twice END_S. Idempotent."""
        if self._loop.is_closed():
            return
        wait((asyncio.run_coroutine_threadsafe(_end_all(), self._loop),), END_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(END_S)
        if not self._thread.is_alive():  # else something on it blocks, and it cannot be closed
            self._loop.close()

    def ask(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        """Have the frontend handle a request on the loop."""
        answer: msg.FrontendReply = self.run(self.front.handle(request), deadline)
        return answer

    def call(self, name: str, deadline: Deadline, **arguments: Any) -> Any:
        """Call a method of the AsyncLLM on the loop."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return self.run(getattr(self.engine, name)(**arguments), deadline)
        except EngineDeadError as error:
            raise died_error("AsyncLLM", str(error)) from error


async def _end_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def host(path: str, arguments: Mapping[str, Any]) -> AsyncDriver:
    """Start vLLM on a checkpoint folder. Blocks until it can serve; vLLM itself ends a start that takes longer than
    VLLM_ENGINE_READY_TIMEOUT_S.

    Args:
        arguments: vLLM's own engine arguments.

    Raises:
        ConfigError: vLLM is not installed, its version was not tried, or it does not have or accept an argument, which
            the message names.
    """
    require_version("vLLM", load("vllm:__version__"))
    from vllm.v1.engine.async_llm import AsyncLLM

    from engine_side.engines.vllm.frontend import VllmFrontend

    register()  # in an environment where the plugin's entry point is switched off, our own engine has it all the same
    channel, leavings = VllmLoopChannel(), hosting.Leavings()

    async def start(config: Any) -> Any:  # on the loop, so that vLLM's output handler starts there
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True)

    try:
        channel.engine = channel.run(start(_engine_config(path, arguments)), None)
        channel.front = VllmFrontend.of(channel.engine)
        facts = facts_of(channel.engine.vllm_config)
        return AsyncDriver(channel, facts, "AsyncLLM", on_close=partial(_end_engine, channel, leavings))
    except BaseException as error:
        _end_engine(channel, leavings)
        if isinstance(error, Exception) and not isinstance(error, BridgeError):
            raise hosting.not_accepted("vllm", path, arguments, error) from error
        raise


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
    config = AsyncEngineArgs(**given).create_engine_config()
    check_facts(
        facts_of(config),
        where="weight_transfer_config",
        expected=f"backend={BACKEND!r}",
        remedy="leave this argument out: a hosted engine has it",
    )
    return config
