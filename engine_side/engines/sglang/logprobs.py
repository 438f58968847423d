"""Score prompts past SGLang's queues: hand-made requests run through its own batch and forward pass.

Rows and KV slots come from the scheduler's own pools and go back to them; nothing enters the prefix cache. SGLang
checks its pools for leaks on every idle turn and ends the process over one missing row, so room is checked first, and
everything is given back in a `finally`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from bridge.errors import ConfigError, ProtocolError
from engine_side.protocol import PromptBatch


def prompt_logprobs(scheduler: Any, prompts: PromptBatch, lora_id: str | None) -> list[list[float]]:
    """Return the log-probability of token i+1 given tokens 0..i, per prompt. All ranks call it together. Raises
    ConfigError for a prompt that does not fit the free room."""
    found: list[list[float]] = [[] for _ in prompts]
    wanted = [k for k, ids in enumerate(prompts) if len(ids) > 1]
    _check(scheduler, [prompts[k] for k in wanted])
    while wanted:
        taken = _as_many_as_fit(scheduler, [prompts[k] for k in wanted])
        now, wanted = wanted[:taken], wanted[taken:]
        for k, row in zip(now, _extend(scheduler, [prompts[k] for k in now], lora_id), strict=True):
            found[k] = row
    return found


def _room(scheduler: Any) -> int:
    return int(scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size())


def _pages(scheduler: Any, tokens: int) -> int:
    page = int(scheduler.token_to_kv_pool_allocator.page_size)
    return -(-tokens // page) * page


def _check(scheduler: Any, prompts: PromptBatch) -> None:
    limit = int(scheduler.req_to_token_pool.req_to_token.shape[1])
    for ids in prompts:
        if len(ids) > limit or _pages(scheduler, len(ids)) > _room(scheduler):
            raise ConfigError(
                "a prompt does not fit the engine",
                where="canary",
                expected=f"at most {min(limit, _room(scheduler))} tokens",
                got=f"{len(ids)} tokens",
                remedy="shorter canary prompts, or wait until the engine has more room",
            )
    if prompts and not scheduler.req_to_token_pool.available_size():
        raise ConfigError(
            "the engine has no free row for a prompt",
            where="max_running_requests",
            expected="a free row",
            got="all rows in use",
            remedy="push again when fewer requests run, or with inflight='abort'",
        )


def _as_many_as_fit(scheduler: Any, prompts: PromptBatch) -> int:
    """Within the engine's own prefill size, its free rows and its free KV slots; at least one."""
    budget = min(int(scheduler.max_prefill_tokens), int(scheduler.chunked_prefill_size or 1 << 30), _room(scheduler))
    rows, used, count = int(scheduler.req_to_token_pool.available_size()), 0, 0
    for ids in prompts:
        used += _pages(scheduler, len(ids))
        if count and (used > budget or count >= rows):
            break
        count += 1
    return count


def _extend(scheduler: Any, prompts: PromptBatch, lora_id: str | None) -> list[list[float]]:
    runner = scheduler.tp_worker.model_runner
    reqs = [_request(scheduler, k, ids, lora_id) for k, ids in enumerate(prompts)]
    batch = ScheduleBatch.init_new(
        reqs=reqs,
        req_to_token_pool=scheduler.req_to_token_pool,
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        tree_cache=scheduler.tree_cache,
        model_config=scheduler.model_config,
        enable_overlap=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )
    try:
        with torch.inference_mode():
            batch.prepare_for_extend()
            batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
            batch.prefill_input_ids_cpu = None
            forward = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
            output = runner.forward(forward).logits_output
            output.finalize_input_logprobs()
            flat = torch.as_tensor(output.input_token_logprobs, dtype=torch.float64).flatten()
    finally:
        _give_back(scheduler, reqs)
    lengths = [len(ids) for ids in prompts]
    if len(flat) != sum(lengths):
        raise ProtocolError(
            "SGLang returned log-probabilities of other tokens than the prompts have",
            where="input_token_logprobs",
            expected=f"{sum(lengths)} values",
            got=f"{len(flat)} values",
            remedy="report this with SGLang's version and start arguments",
        )
    rows = flat.split(lengths)  # type: ignore[no-untyped-call]
    return [row[:-1].tolist() for row in rows]  # the last token of a prompt has no next one


def _request(scheduler: Any, k: int, ids: Sequence[int], lora_id: str | None) -> Req:
    sampling = SamplingParams(temperature=0, max_new_tokens=0)
    sampling.normalize(None)
    req = Req(
        rid=f"weighbridge-{k}",
        origin_input_text="",
        origin_input_ids=array("q", ids),
        sampling_params=sampling,
        return_logprob=True,
        lora_id=lora_id,
        vocab_size=scheduler.model_config.vocab_size,
    )
    req.full_untruncated_fill_ids = req.origin_input_ids
    req.logprob_start_len = 0
    req.extend_end = len(ids)  # the prefix stays empty: nothing is read from the cache
    return req


def _give_back(scheduler: Any, reqs: Sequence[Req]) -> None:
    for req in reqs:
        if req.kv.holds_kv and req.kv.kv_allocated_len == 0:  # a row was taken and slots were not
            scheduler.req_to_token_pool.free(req)
        elif req.kv.holds_kv:
            release_kv_cache(req, scheduler.tree_cache, checkpoint=False)
