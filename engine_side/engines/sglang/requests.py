"""Make SGLang's requests, and read its outputs."""

from __future__ import annotations

import inspect
from typing import Any

from bridge.protocol.codec import Completion, Sampling
from engine_side.engines.common.published_state import parse_version
from engine_side.protocol import PromptBatch

_REQUESTS = {
    "pause_generation": "PauseGenerationReqInput",
    "continue_generation": "ContinueGenerationReqInput",
    "update_weight_version": "UpdateWeightVersionReqInput",
}
"""Methods of the tokenizer manager that take their arguments in a class of `sglang.srt.managers.io_struct`."""


async def call_manager(manager: Any, method: str, **arguments: Any) -> bool:
    """Make one of the calls of `remote.SglangChannel` in the manager's loop. Returns whether it succeeded."""
    from sglang.srt.managers import io_struct

    manager.auto_create_handle_loop()
    kind, function = _REQUESTS.get(method), getattr(manager, method)
    answer = function(**arguments) if kind is None else function(getattr(io_struct, kind)(**arguments))
    if inspect.isawaitable(answer):
        answer = await answer
    return bool(getattr(answer, "success", True))


def generate_request(prompts: PromptBatch, sampling: Sampling, lora: str | None, ids: list[str]) -> Any:
    """Make one `GenerateReqInput` for a batch of prompts; `ids` are SGLang's request ids, one per prompt."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    parameters: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop_token_ids": list(sampling.stop_token_ids),
    }
    if sampling.seed is not None:
        parameters["sampling_seed"] = sampling.seed
    return GenerateReqInput(
        rid=list(ids),
        input_ids=[list(prompt) for prompt in prompts],
        sampling_params=[dict(parameters) for _ in prompts],
        return_logprob=True,
        lora_path=[lora] * len(prompts) if lora is not None else None,
    )


def completion(output: Any) -> Completion:
    """Read one of SGLang's outputs. Its version is the one that the first token was computed with."""
    meta = output["meta_info"]
    tokens = tuple(int(token) for token in output["output_ids"])
    rows = meta.get("output_token_logprobs") or ()
    spans = meta.get("weight_versions") or ()
    label = spans[0]["version"] if spans else meta.get("weight_version")
    reason = (meta.get("finish_reason") or {}).get("type", "abort")
    return Completion(tokens, tuple(float(row[0]) for row in rows[: len(tokens)]), reason, parse_version(label))
