"""Prompt log-probabilities in a vLLM worker while the engine is paused, from the model runner, past the scheduler.

A hand-made SchedulerOutput runs the model runner on KV blocks counted down from the end of the pool. The pool's
bookkeeping lies in the engine core and is not touched, so every block has to be free: the driver resets the prefix
cache, and preempts what it kept, right after it paused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput

from bridge.errors import ConfigError

_SAMPLING: Mapping[str, Any] = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}


Step = dict[int, NewRequestData]
"""The prompts that run together, by their place in the answer."""


@torch.inference_mode()
def prompt_logprobs(worker: Any, prompts: Sequence[Sequence[int]], lora: LoRARequest | None) -> list[list[float]]:
    """Compute the log-probability of token i+1 given tokens 0..i, per prompt. Blocks.

    All ranks call it together and get the same numbers (nats).

    Raises:
        ConfigError: a prompt is too long, in every rank alike and before the model runs: a rank that raised alone would
            leave the others in a collective.
    """
    limit = worker.vllm_config.model_config.max_model_len
    out: list[list[float]] = [[] for _ in prompts]
    wanted = [(k, list(ids)) for k, ids in enumerate(prompts) if len(ids) > 1]
    for k, ids in wanted:
        if len(ids) > limit:
            raise _too_long_error(k, f"at most {limit} tokens (max_model_len)", len(ids))
    steps = list(_steps(worker, wanted, lora))
    finished: list[str] = []
    try:
        for step in steps:
            before, finished = finished, [request.req_id for request in step.values()]
            for index, row in _run_step(worker, step, before).items():
                out[index] = row
    finally:
        if getattr(worker.model_runner, "execute_model_state", None) is not None:
            worker.model_runner.execute_model_state = None  # left by a failure between the forward and the sampling
        if finished:
            _execute(worker, [], None, {}, finished)  # the runner forgets the requests
    return out


def _steps(worker: Any, wanted: Sequence[tuple[int, list[int]]], lora: LoRARequest | None) -> Iterator[Step]:
    """Pack prompts into steps, as far as tokens, sequences and KV blocks reach."""
    kv, scheduler = worker.model_runner.kv_cache_config, worker.vllm_config.scheduler_config
    # with a wrapped head vLLM maps a step's tokens to LoRAs by its sampled rows: right for one request only
    most = scheduler.max_num_seqs if worker.vllm_config.lora_config is None else 1
    tag = f"bridge-{time.monotonic_ns()}-"  # the runner takes an id that it knows for an update of that request
    step: Step = {}
    used, cursor = 0, kv.num_blocks
    for index, ids in wanted:
        blocks, after = _blocks(kv, len(ids), cursor)
        full = used + len(ids) > scheduler.max_num_batched_tokens or len(step) == most
        if step and (full or after < 1):
            yield step
            step, used = {}, 0
            blocks, after = _blocks(kv, len(ids), kv.num_blocks)
        if after < 1:
            raise _too_long_error(index, f"what fits the {kv.num_blocks - 1} blocks of the KV pool", len(ids))
        cursor, used = after, used + len(ids)
        step[index] = NewRequestData(
            req_id=f"{tag}{index}",
            prompt_token_ids=ids,
            mm_features=[],
            sampling_params=SamplingParams(**_SAMPLING),
            pooling_params=None,
            block_ids=blocks,
            num_computed_tokens=0,
            lora_request=lora,
            prefill_token_ids=ids,
        )
    if step:
        yield step


def _too_long_error(index: int, expected: str, tokens: int) -> ConfigError:
    return ConfigError(
        "a prompt is too long for this engine", where=f"prompt {index}", expected=expected, got=f"{tokens} tokens",
        remedy="shorten the canary's prompts, or start the engine with a longer context and more KV memory",
    )  # fmt: skip


def _blocks(kv: Any, tokens: int, cursor: int) -> tuple[tuple[list[int], ...], int]:
    """Block ids below `cursor` for each cache group, distinct over the groups, and the next cursor. 0 is vLLM's null
    block."""
    out: list[list[int]] = []
    for group in kv.kv_cache_groups:
        count = -(-(tokens + 1) // group.kv_cache_spec.block_size)
        out.append(list(range(cursor - count, cursor)))
        cursor -= count
    return tuple(out), cursor


def _run_step(worker: Any, step: Step, finished: Sequence[str]) -> dict[int, list[float]]:
    """Run one step; a prompt longer than the token budget is alone in it and goes in chunks."""
    budget = worker.vllm_config.scheduler_config.max_num_batched_tokens
    new = list(step.values())
    zero = None
    if worker.model_runner.kv_cache_config.needs_kv_cache_zeroing:
        zero = [block for request in new for group in request.block_ids for block in group]
    counts = {request.req_id: min(len(request.prompt_token_ids), budget) for request in new}
    found: dict[str, Any] = dict(_execute(worker, new, None, counts, finished, zero))
    req_id, length, done = new[0].req_id, len(new[0].prompt_token_ids), budget
    while len(new) == 1 and done < length:
        count = min(budget, length - done)
        more = CachedRequestData(
            req_ids=[req_id],
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None],
            num_computed_tokens=[done],
            num_output_tokens=[0],
        )
        found.update(_execute(worker, [], more, {req_id: count}, ()))
        done += count
    rows = {index: found.get(request.req_id) for index, request in step.items()}
    # column 0 is the prompt's own token
    return {k: [float(x) for x in row.logprobs[:, 0].tolist()] for k, row in rows.items() if row is not None}


def _execute(
    worker: Any,
    new: list[NewRequestData],
    cached: CachedRequestData | None,
    tokens: dict[str, int],
    finished: Sequence[str],
    zero: list[int] | None = None,
) -> Mapping[str, Any]:
    """Call the model runner once. Returns request id -> prompt log-probabilities."""
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = new
    output.scheduled_cached_reqs = cached or output.scheduled_cached_reqs
    output.num_scheduled_tokens = tokens
    output.total_num_scheduled_tokens = sum(tokens.values())
    output.finished_req_ids = set(finished)
    output.num_common_prefix_blocks = [0] * len(worker.model_runner.kv_cache_config.kv_cache_groups)
    output.new_block_ids_to_zero = zero
    result = worker.execute_model(output)
    if tokens and result is None:
        result = worker.sample_tokens(None)
    if isinstance(result, AsyncModelRunnerOutput):
        result = result.get_output()
    found: Mapping[str, Any] = {} if result is None else result.prompt_logprobs_dict
    return found
