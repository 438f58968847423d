"""What the bridge's requests find in each of SGLang's scheduler processes. Runs in the scheduler's own thread."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from engine_side.engines.sglang import LOADER

log = logging.getLogger(__name__)

ACTION = "weighbridge"
"""The `action` of a `check_weights` request that is the bridge's."""
JOB, FACTS, ADAPTERS, OPEN, SHUT = "job", "facts", "adapters", "open", "shut"
FRONT = "front"
"""Never gets here: what the process where requests come in answers itself (`front.door`)."""
_POST = "_weighbridge_post"


class Facts(msgspec.Struct, frozen=True):
    """What the driver asks of a scheduler: longest prompt, tokens per cache page (0 without a prefix cache), is it
    paused, whether log-probabilities are those before temperature, and the vocabulary that token ids lie below."""

    max_prompt: int
    page: int
    paused: bool
    original_logprobs: bool
    vocabulary: int


class Answer(msgspec.Struct, frozen=True):
    """Rank 0's answer. `error` is what went wrong in some rank, in words; "" when all went well."""

    error: str = ""
    facts: Facts | None = None
    adapters: dict[str, str] = {}


class _Post:
    """What the bridge keeps in one scheduler: the rank with its plans, and requests that wait for the gate."""

    def __init__(self, scheduler: Any) -> None:
        from engine_side.engines.sglang.host import SglangRankHost
        from engine_side.worker.rank import Rank

        self.host = SglangRankHost(scheduler)
        self.rank = Rank(self.host)
        self.waiting: list[Any] | None = None


def door(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    """AROUND `SchedulerWeightUpdaterManager.check_weights`. Never raises for a request of the bridge: an exception
    ends SGLang's scheduler. Every rank comes here, and each takes part in the one collective at the end."""
    if recv_req.action != ACTION:
        return original(self, recv_req)
    from sglang.srt.managers.io_struct import CheckWeightsReqOutput

    answer = _answer(self.scheduler, recv_req.skip_tensor_list or [])
    failed = torch.tensor([int(bool(answer.error))], dtype=torch.int64)
    torch.distributed.all_reduce(failed, group=self.tp_cpu_group)
    if int(failed) and not answer.error:
        answer = Answer(error=f"{int(failed)} other ranks could not answer; their logs say why")
    return CheckWeightsReqOutput(success=True, message=msgspec.json.encode(answer).decode())


def refuse_update(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    """AROUND `SchedulerWeightUpdaterManager.update_weights_from_tensor`: SGLang does not catch what a loader raises."""
    if recv_req.load_format != LOADER:
        return original(self, recv_req)
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqOutput

    return UpdateWeightsFromTensorReqOutput(
        success=False, message="weights go through bridge.attach(engine).push(...), not through update calls"
    )


def _answer(scheduler: Any, words: list[str]) -> Answer:
    try:
        post = vars(scheduler).get(_POST)
        if post is None:
            post = vars(scheduler)[_POST] = _Post(scheduler)
        return _do(scheduler, post, words[0], words[1] if len(words) > 1 else "")
    except Exception as error:  # process boundary: see `door`
        log.exception("a request of the bridge could not be answered")
        return Answer(error=f"{type(error).__name__}: {error}")


def _do(scheduler: Any, post: _Post, verb: str, text: str) -> Answer:
    if verb == JOB:
        try:
            frame = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            return Answer(error=f"not a job: {error}")
        post.rank.run(frame)
        return Answer()
    if verb == FACTS:
        return Answer(facts=_facts(scheduler))
    if verb == ADAPTERS:
        return Answer(adapters=post.host.adapters())
    if verb == OPEN:
        return _open(scheduler, post)
    if verb == SHUT:
        return _shut(scheduler, post)
    return Answer(error=f"unknown request {verb!r}")


def _facts(scheduler: Any) -> Facts:
    from sglang.srt.layers import sampler

    rows = int(scheduler.req_to_token_pool.req_to_token.shape[1])
    longest = min(int(scheduler.max_req_input_len), rows, int(scheduler.token_to_kv_pool_allocator.size)) - 1
    page = 0 if scheduler.disable_radix_cache else int(scheduler.token_to_kv_pool_allocator.page_size)
    paused, original = bool(scheduler._engine_paused), bool(sampler.SGLANG_RETURN_ORIGINAL_LOGPROB)
    return Facts(longest, page, paused, original, int(scheduler.model_config.vocab_size))


def _open(scheduler: Any, post: _Post) -> Answer:
    """Let a paused scheduler run for the bridge's own requests: those that wait are put aside."""
    if not scheduler._engine_paused:
        return Answer(error="the scheduler is not paused")
    if post.waiting is None:
        post.waiting, scheduler.waiting_queue = scheduler.waiting_queue, []
    scheduler._engine_paused = False
    return Answer()


def _shut(scheduler: Any, post: _Post) -> Answer:
    """Pause again, with those who waited before in front."""
    from sglang.srt.managers.io_struct import PauseGenerationReqInput

    scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
    if post.waiting is not None:
        scheduler.waiting_queue, post.waiting = post.waiting + scheduler.waiting_queue, None
    return Answer()
