"""Requests of the bridge to SGLang's tokenizer manager, and through it to the schedulers, inside `check_weights`.

A request to the schedulers is `CheckWeightsReqInput(action=ACTION, skip_tensor_list=[verb, text])`; the answer is JSON
in its message.
"""

from __future__ import annotations

import inspect
from typing import Any

import msgspec

from bridge.errors import ConfigError, ProtocolError

ACTION = "weighbridge"
"""The `action` of a `check_weights` request that is the bridge's."""
JOB, FACTS, LORAS, OPEN, SHUT = "job", "facts", "loras", "open", "shut"
FRONT = "front"
"""The verb of a request that `frontend.answer_check_weights` answers; no scheduler receives it."""
_REQUESTS = {
    "pause_generation": "PauseGenerationReqInput",
    "continue_generation": "ContinueGenerationReqInput",
    "update_weight_version": "UpdateWeightVersionReqInput",
}
"""Methods of the tokenizer manager that take their arguments in a class of `sglang.srt.managers.io_struct`."""


class SchedulerFacts(msgspec.Struct, frozen=True):
    """Limits and state of one scheduler.

    Attributes:
        max_prompt: longest prompt in tokens that can be scored and continued by one.
        page: tokens per cache page; 0 without a prefix cache.
        paused: no request is scheduled, whoever paused it.
        vocabulary: token ids lie below this.
        kv: torch's name of the KV cache's dtype; None where that is the dtype it computes in.
        kv_dtype: the wire's name of it, if it has one there.
    """

    max_prompt: int
    page: int
    paused: bool
    vocabulary: int
    kv: str | None = None
    kv_dtype: str | None = None


class SchedulerAnswer(msgspec.Struct, frozen=True):
    """Rank 0's answer.

    Attributes:
        error: what went wrong in some rank; "" when nothing did.
        facts: the answer to FACTS.
        loras: SGLang's id of each loaded LoRA by name, the answer to LORAS.
    """

    error: str = ""
    facts: SchedulerFacts | None = None
    loras: dict[str, str] = {}


async def call_manager(manager: Any, method: str, **arguments: Any) -> bool:
    """Make one of the calls of `SglangDriver.call_engine` in the manager's loop. Returns whether it succeeded."""
    from sglang.srt.managers import io_struct

    manager.auto_create_handle_loop()
    kind, function = _REQUESTS.get(method), getattr(manager, method)
    answer = function(**arguments) if kind is None else function(getattr(io_struct, kind)(**arguments))
    if inspect.isawaitable(answer):
        answer = await answer
    return bool(getattr(answer, "success", True))


async def check_weights(manager: Any, words: list[str]) -> tuple[bool, str]:
    """Send a request through the tokenizer manager of this process: (success, message)."""
    from sglang.srt.managers.io_struct import CheckWeightsReqInput

    ok, message, *_ = await manager.check_weights(CheckWeightsReqInput(action=ACTION, skip_tensor_list=words))
    return bool(ok), str(message)


def read_answer(where: str, ok: bool, message: str) -> SchedulerAnswer:
    """Decode what `check_weights` returned. Raises ConfigError for schedulers without the plugin, ProtocolError for an
    answer that reports an error or cannot be read."""
    if not ok:
        raise without_plugin(where, message)
    try:
        answer = msgspec.json.decode(message, type=SchedulerAnswer)
    except msgspec.DecodeError as error:
        raise ProtocolError(
            "the answer of an SGLang scheduler cannot be read",
            where=where,
            expected="an answer of this version of weighbridge",
            got=str(error),
            remedy="install the same weighbridge where SGLang runs and in the trainer's environment",
        ) from error
    if answer.error:
        raise ProtocolError(
            "an SGLang scheduler could not answer",
            where=where,
            expected="an answer without errors",
            got=answer.error,
            remedy="SGLang's log has the traceback",
        )
    return answer


def without_plugin(where: str, got: str) -> ConfigError:
    """Make the error for an SGLang whose processes did not load weighbridge's plugin."""
    return ConfigError(
        "this SGLang was started without weighbridge's plugin",
        where=where,
        expected="the plugin 'weighbridge' of the entry point group sglang.srt.plugins",
        got=got[:200],
        remedy="install weighbridge where SGLang runs, and let SGLANG_PLUGINS, if set, name 'weighbridge'",
    )
