"""Prompt log-probabilities in a vLLM worker, past the scheduler: what a paused engine says about fixed prompts.

A hand-made scheduler output runs the model runner on KV blocks counted down from the end of the pool. The pool's own
books lie in the engine core and are not touched, so every block has to be free: the driver resets the prefix cache, and
preempts what it kept, right after it paused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput

from bridge.errors import ConfigError

_SAMPLING: Mapping[str, Any] = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}


@dataclass(frozen=True)
class _Piece:
    """One prompt of a step: its place in the answer, request id, KV blocks per cache group."""

    index: int
    req_id: str
    ids: list[int]
    blocks: tuple[list[int], ...]


@torch.inference_mode()
def prompt_logprobs(worker: Any, prompts: Sequence[Sequence[int]], lora: LoRARequest | None) -> list[list[float]]:
    """Log-probability of token i+1 given tokens 0..i, per prompt; the same on all tensor-parallel ranks. Blocks.

    All ranks must call it together. Raises ConfigError, in every rank alike and before the model runs, for a prompt
    that the engine cannot take.
    """
    limit = worker.vllm_config.model_config.max_model_len
    out: list[list[float]] = [[] for _ in prompts]
    wanted = [(k, list(ids)) for k, ids in enumerate(prompts) if len(ids) > 1]
    for _, ids in wanted:
        if len(ids) > limit:
            raise ConfigError("a prompt is too long for this engine", expected=f"at most {limit}", got=str(len(ids)))
    steps = list(_steps(worker, wanted))
    finished: list[str] = []
    try:
        for pieces in steps:
            before, finished = finished, [piece.req_id for piece in pieces]
            for index, row in _run(worker, pieces, before, lora).items():
                out[index] = row
    finally:
        if getattr(worker.model_runner, "execute_model_state", None) is not None:
            worker.model_runner.execute_model_state = None  # left by a failure between the forward and the sampling
        if finished:
            _execute(worker, [], None, {}, finished)  # the runner forgets the requests
    return out


def _steps(worker: Any, wanted: Sequence[tuple[int, list[int]]]) -> Iterator[list[_Piece]]:
    """Prompts packed into steps as far as tokens, sequences and KV blocks reach."""
    kv, scheduler = worker.model_runner.kv_cache_config, worker.vllm_config.scheduler_config
    # with a wrapped head vLLM maps a step's tokens to adapters by its sampled rows: right for one request only
    most = scheduler.max_num_seqs if worker.vllm_config.lora_config is None else 1
    tag = f"bridge-{time.monotonic_ns()}-"  # the runner takes an id that it knows for an update of that request
    pieces: list[_Piece] = []
    used, cursor = 0, kv.num_blocks
    for index, ids in wanted:
        blocks, after = _blocks(kv, len(ids), cursor)
        full = used + len(ids) > scheduler.max_num_batched_tokens or len(pieces) == most
        if pieces and (full or after < 1):
            yield pieces
            pieces, used = [], 0
            blocks, after = _blocks(kv, len(ids), kv.num_blocks)
        if after < 1:
            raise ConfigError(
                "a prompt does not fit the engine's KV pool",
                expected=f"{kv.num_blocks - 1} blocks",
                got=f"{len(ids)} tokens",
            )
        cursor, used = after, used + len(ids)
        pieces.append(_Piece(index, f"{tag}{index}", ids, blocks))
    if pieces:
        yield pieces


def _blocks(kv: Any, tokens: int, cursor: int) -> tuple[tuple[list[int], ...], int]:
    """Ids below `cursor` for each cache group, distinct over the groups; 0 is vLLM's null block."""
    out: list[list[int]] = []
    for group in kv.kv_cache_groups:
        count = -(-(tokens + 1) // group.kv_cache_spec.block_size)
        out.append(list(range(cursor - count, cursor)))
        cursor -= count
    return tuple(out), cursor


def _run(
    worker: Any, pieces: Sequence[_Piece], finished: Sequence[str], lora: LoRARequest | None
) -> dict[int, list[float]]:
    """One step; a prompt longer than the token budget is alone in it and goes in chunks."""
    budget = worker.vllm_config.scheduler_config.max_num_batched_tokens
    kv = worker.model_runner.kv_cache_config
    zero = [b for p in pieces for group in p.blocks for b in group] if kv.needs_kv_cache_zeroing else None
    new = [_request(piece, lora) for piece in pieces]
    first = {piece.req_id: min(len(piece.ids), budget) for piece in pieces}
    found: dict[str, Any] = dict(_execute(worker, new, None, first, finished, zero))
    done = budget
    while len(pieces) == 1 and done < len(pieces[0].ids):
        req_id, count = pieces[0].req_id, min(budget, len(pieces[0].ids) - done)
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
    rows = {piece.index: found.get(piece.req_id) for piece in pieces}
    # column 0 is the prompt's own token
    return {k: [float(x) for x in row.logprobs[:, 0].tolist()] for k, row in rows.items() if row is not None}


def _request(piece: _Piece, lora: LoRARequest | None) -> NewRequestData:
    return NewRequestData(
        req_id=piece.req_id,
        prompt_token_ids=piece.ids,
        mm_features=[],
        sampling_params=SamplingParams(**_SAMPLING),
        pooling_params=None,
        block_ids=piece.blocks,
        num_computed_tokens=0,
        lora_request=lora,
        prefill_token_ids=piece.ids,
    )


def _execute(
    worker: Any,
    new: list[NewRequestData],
    cached: CachedRequestData | None,
    tokens: dict[str, int],
    finished: Sequence[str],
    zero: list[int] | None = None,
) -> Mapping[str, Any]:
    """One call of the model runner; request id -> prompt log-probabilities."""
    output = SchedulerOutput(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=cached or CachedRequestData.make_empty(),
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        finished_req_ids=set(finished),
        free_encoder_mm_hashes=[],
        num_common_prefix_blocks=[0] * len(worker.model_runner.kv_cache_config.kv_cache_groups),
        new_block_ids_to_zero=zero,
    )
    result = worker.execute_model(output)
    if tokens and result is None:
        result = worker.sample_tokens(None)
    if isinstance(result, AsyncModelRunnerOutput):
        result = result.get_output()
    found: Mapping[str, Any] = {} if result is None else result.prompt_logprobs_dict
    return found
