"""Answer the bridge's requests in each of SGLang's scheduler processes, in the scheduler's own thread."""

from __future__ import annotations

import base64
import logging
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from bridge.model.torch_dtypes import DTYPES
from engine_side.engines.sglang import LOADER
from engine_side.engines.sglang.scheduler_messages import (
    ACTION,
    FACTS,
    JOB,
    LORAS,
    OPEN,
    SHUT,
    SchedulerAnswer,
    SchedulerFacts,
)

log = logging.getLogger(__name__)

_KEY = "_weighbridge_state"


class _BridgeState:
    """The bridge's state in one scheduler: the rank with its plans, and requests that were put aside."""

    def __init__(self, scheduler: Any) -> None:
        from engine_side.engines.sglang.host import SglangRankHost
        from engine_side.worker.rank import Rank

        self.host = SglangRankHost(scheduler)
        self.rank = Rank(self.host)
        self.waiting: list[Any] | None = None


def answer_check_weights(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    """AROUND hook of `SchedulerWeightUpdaterManager.check_weights`: run the bridge's requests in this rank.

    Never raises for a request of the bridge, since an exception ends SGLang's scheduler. Every rank comes here and
    takes part in the one collective at the end, which has the timeout of SGLang's process group (`--dist-timeout`).
    """
    if recv_req.action != ACTION:
        return original(self, recv_req)
    from sglang.srt.managers.io_struct import CheckWeightsReqOutput

    answer = _answer(self.scheduler, recv_req.skip_tensor_list or [])
    failed = torch.tensor([int(bool(answer.error))], dtype=torch.int64)
    torch.distributed.all_reduce(failed, group=self.tp_cpu_group)
    if int(failed) and not answer.error:
        answer = SchedulerAnswer(error=f"{int(failed)} other ranks could not answer; their logs say why")
    return CheckWeightsReqOutput(success=True, message=msgspec.json.encode(answer).decode())


def refuse_update(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    """AROUND hook of `SchedulerWeightUpdaterManager.update_weights_from_tensor`: refuse SGLang's own update calls with
    the bridge's loader here, since SGLang does not catch what a loader raises."""
    if recv_req.load_format != LOADER:
        return original(self, recv_req)
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqOutput

    return UpdateWeightsFromTensorReqOutput(
        success=False, message="weights go through bridge.attach(engine).push(...), not through update calls"
    )


def _answer(scheduler: Any, words: list[str]) -> SchedulerAnswer:
    try:
        state = vars(scheduler).get(_KEY)
        if state is None:
            state = vars(scheduler)[_KEY] = _BridgeState(scheduler)
        verb, text = words
        if verb == JOB:
            try:
                state.rank.run(base64.b64decode(text, validate=True))
            finally:
                _drop_image_embeddings()
        elif verb == FACTS:
            return SchedulerAnswer(facts=_facts(scheduler))
        elif verb == LORAS:
            return SchedulerAnswer(loras=state.host.loaded_loras())
        elif verb == OPEN:
            return _open(scheduler, state)
        elif verb == SHUT:
            _shut(scheduler, state)
        else:
            return SchedulerAnswer(error=f"unknown request {verb!r}: its sender has another version of weighbridge")
    except Exception as error:  # process boundary: see `answer_check_weights`
        log.exception("a request of the bridge could not be answered")
        return SchedulerAnswer(error=f"{type(error).__name__}: {error}")
    return SchedulerAnswer()


def _drop_image_embeddings() -> None:
    """Drop what a tower has made of images. SGLang looks it up by image alone, whatever weights made it, and
    `flush_cache` leaves it. After every job, since most of them write or read weights, and a miss only costs time."""
    module = sys.modules.get("sglang.srt.managers.mm_schedule")
    cache = getattr(module, "embedding_cache", None)
    if cache is not None:
        cache.clear()


def _facts(scheduler: Any) -> SchedulerFacts:
    rows = int(scheduler.req_to_token_pool.req_to_token.shape[1])
    allocator = scheduler.token_to_kv_pool_allocator
    runner = scheduler.tp_worker.model_runner
    kv = None if runner.kv_cache_dtype == runner.dtype else runner.kv_cache_dtype
    return SchedulerFacts(
        max_prompt=min(int(scheduler.max_req_input_len), rows, int(allocator.size)) - 1,
        page=0 if scheduler.disable_radix_cache else int(allocator.page_size),
        paused=bool(scheduler._engine_paused),
        vocabulary=int(scheduler.model_config.vocab_size),
        kv=None if kv is None else str(kv).removeprefix("torch."),
        kv_dtype=next((name for name, dtype in DTYPES.items() if dtype == kv), None),
    )


def _open(scheduler: Any, state: _BridgeState) -> SchedulerAnswer:
    """Let a paused scheduler run the bridge's own requests; those that wait are put aside."""
    if not scheduler._engine_paused:
        return SchedulerAnswer(error="the scheduler is not paused")
    if state.waiting is None:
        state.waiting, scheduler.waiting_queue = scheduler.waiting_queue, []
    scheduler._engine_paused = False
    return SchedulerAnswer()


def _shut(scheduler: Any, state: _BridgeState) -> None:
    """Pause again, with the requests that were put aside in front."""
    from sglang.srt.managers.io_struct import PauseGenerationReqInput

    scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
    if state.waiting is not None:
        scheduler.waiting_queue, state.waiting = state.waiting + scheduler.waiting_queue, None
