"""Requests of the bridge to SGLang's schedulers, and their answers, inside SGLang's `check_weights`.

A request is `CheckWeightsReqInput(action=ACTION, skip_tensor_list=[verb, text])`; the answer is JSON in its message.
"""

from __future__ import annotations

from typing import Any

import msgspec

from bridge.errors import ConfigError, ProtocolError

ACTION = "weighbridge"
"""The `action` of a `check_weights` request that is the bridge's."""
JOB, FACTS, LORAS, OPEN, SHUT = "job", "facts", "loras", "open", "shut"
FRONT = "front"
"""The verb of a request that `frontend.answer_check_weights` answers; no scheduler receives it."""


class SchedulerFacts(msgspec.Struct, frozen=True):
    """Limits and state of one scheduler.

    Attributes:
        max_prompt: longest prompt in tokens that can be scored and continued by one.
        page: tokens per cache page; 0 without a prefix cache.
        paused: no request is scheduled, whoever paused it.
        original_logprobs: log-probabilities are those before temperature.
        vocabulary: token ids lie below this.
    """

    max_prompt: int
    page: int
    paused: bool
    original_logprobs: bool
    vocabulary: int


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
            got=str(error),
            remedy="install the same weighbridge where SGLang runs and in the trainer's environment",
        ) from error
    if answer.error:
        raise ProtocolError(
            "an SGLang scheduler could not answer",
            where=where,
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
