"""The choice of requests for the next step. No threads, no tensors: the engine calls it under its own lock.

Requests wait, run and finish. A preempted request loses its blocks, keeps its tokens, and is computed again from the
start when it is admitted again, under the weights of that time.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from bridge.errors import BridgeError
from bridge.protocol.codec import Completion, Sampling
from engine_side.embedded.kv import BlockPool, block_hash, chain_start
from engine_side.embedded.runner import SequenceBatch

_STEP_TOKENS = 8192
"""Largest padded frame (sequences x longest) of one prefill step."""
_NO_VERSIONS: Mapping[str, int] = MappingProxyType({})


@dataclass(eq=False)
class GenerationRequest:
    """One prompt on its way to a completion.

    Attributes:
        tokens: prompt and output; the first `computed` of them have keys and values, in `blocks` with these `hashes`.
        privileged: runs although the engine is paused or refuses, and before all others.
        lora: the LoRA that it runs with to its end, None for the base model.
        follows: it has not begun, and takes the LoRA that is published when it first runs, with that version.
        version: the weight version that it began with.
        reason, error: how it ended.
    """

    tokens: list[int]
    sampling: Sampling
    stream: random.Random
    privileged: bool = False
    lora: str | None = None
    follows: bool = False
    prompt_len: int = 0
    computed: int = 0
    logprobs: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    version: int | None = None
    reason: str | None = None
    error: BridgeError | None = None

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)

    @property
    def done(self) -> bool:
        return self.reason is not None or self.error is not None

    def completion(self) -> Completion:
        """Return the output so far as users get it."""
        output = tuple(self.tokens[self.prompt_len :])
        return Completion(output, tuple(self.logprobs), self.reason or "abort", self.version or 0)


class Scheduler:
    """Waiting and running requests over one pool of blocks."""

    def __init__(self, pool: BlockPool, max_seqs: int, max_seq_len: int) -> None:
        self.pool = pool
        self.max_seqs = max_seqs
        self.max_seq_len = max_seq_len
        self.waiting: deque[GenerationRequest] = deque()
        self.running: list[GenerationRequest] = []

    def add(self, requests: Iterable[GenerationRequest]) -> None:
        """Queue new requests."""
        self.waiting.extend(requests)

    def has_work(self, privileged: bool) -> bool:
        """Tell if there is a request to run; with `privileged`, only those that may pass the gate count."""
        return any(r.privileged or not privileged for r in (*self.running, *self.waiting))

    def schedule(
        self, privileged: bool, version: int, current: str | None = None, versions: Mapping[str, int] = _NO_VERSIONS
    ) -> tuple[list[GenerationRequest], SequenceBatch] | None:
        """Choose the next step: newly admitted requests if any, else one token for each running one; None when idle.

        With `privileged`, only requests that may pass the gate run. A request keeps the LoRA (`current` for one that
        follows what is published) and the version that it first ran with. A LoRA that was asked for by name has the
        version that it was published under last (`versions`): a later push may have published another one.
        """
        begun = self._admit(privileged, current, version, versions)
        chosen = begun or self._decode(privileged)
        if not chosen:
            return None
        return chosen, SequenceBatch(
            tuple(token for r in chosen for token in r.tokens[r.computed :]),
            tuple(len(r.tokens) - r.computed for r in chosen),
            tuple(r.computed for r in chosen),
            tuple(tuple(r.blocks) for r in chosen),
            tuple(r.lora or "" for r in chosen) if any(r.lora for r in chosen) else (),
        )

    def _admit(
        self, privileged: bool, current: str | None, version: int, versions: Mapping[str, int]
    ) -> list[GenerationRequest]:
        chosen: list[GenerationRequest] = []
        longest = 0
        # Privileged ones first: a push waits for them, and must not wait for a whole queue of users.
        for request in sorted(
            (r for r in self.waiting if r.privileged or not privileged), key=lambda r: not r.privileged
        ):
            lora = current if request.follows else request.lora
            cached = self.pool.match(request.tokens, lora)
            fresh = len(request.tokens) - len(cached) * self.pool.block_size
            longest = max(longest, fresh)
            if chosen and longest * (len(chosen) + 1) > _STEP_TOKENS:
                break
            if len(self.running) >= self.max_seqs and not request.privileged:
                break
            # One block more than the prompt: a request that is admitted can also take its first step.
            need = len(request.tokens) // self.pool.block_size + 1
            need = min(need, -(-self.max_seq_len // self.pool.block_size)) - len(cached)
            if not self._room(need, cached, request.privileged, chosen):
                break
            self.pool.share(cached)
            request.blocks = [*cached, *(self.pool.take() for _ in range(need))]
            request.computed = len(cached) * self.pool.block_size
            if request.version is None:
                named = not request.follows and lora
                request.version = versions.get(named, version) if named else version
            request.lora, request.follows = lora, False
            self.waiting.remove(request)
            self.running.append(request)
            chosen.append(request)
        return chosen

    def _room(self, fresh: int, cached: Sequence[int], privileged: bool, chosen: Sequence[GenerationRequest]) -> bool:
        """Tell if so many blocks are free besides the cached ones. A privileged request may push running ones out, but
        none that this very step will compute."""
        # Counted anew each time: a cached block that only the victim used is among the free ones afterwards.
        while self.pool.free < fresh + self.pool.idle(cached):
            victim = next((r for r in reversed(self.running) if not r.privileged and r not in chosen), None)
            if not privileged or victim is None:
                return False
            self.preempt([victim])
        return True

    def _decode(self, privileged: bool) -> list[GenerationRequest]:
        for request in [r for r in self.running if r.privileged or not privileged]:
            while request in self.running and len(request.blocks) * self.pool.block_size < len(request.tokens):
                if self.pool.free:
                    request.blocks.append(self.pool.take())
                else:
                    ordinary = (r for r in reversed(self.running) if not r.privileged)
                    self.preempt([next(ordinary, self.running[-1])])
        return [r for r in self.running if r.privileged or not privileged]

    def preempt(self, requests: Sequence[GenerationRequest]) -> None:
        """Send running requests back to the head of the queue, without their keys and values."""
        for request in reversed(requests):
            self.running.remove(request)
            self._drop_blocks(request)
            self.waiting.appendleft(request)

    def advance(self, chosen: Sequence[GenerationRequest], tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Record the tokens that were sampled in a step, and end the requests that are complete. One that was ended
        while its step ran is left out."""
        for request, token, logprob in zip(chosen, tokens, logprobs):
            if request.done:
                continue
            # All of its tokens have keys and values now: record the blocks that are full.
            size = self.pool.block_size
            for index in range(len(request.hashes), len(request.tokens) // size):
                before = request.hashes[-1] if request.hashes else chain_start(request.lora)
                request.hashes.append(block_hash(before, request.tokens[index * size : (index + 1) * size]))
                self.pool.remember(request.blocks[index], request.hashes[-1])
            request.computed = len(request.tokens)
            request.tokens.append(token)
            request.logprobs.append(logprob)
            if token in request.sampling.stop_token_ids:
                self.finish(request, "stop")
            elif (
                len(request.tokens) - request.prompt_len >= request.sampling.max_tokens
                or len(request.tokens) >= self.max_seq_len
            ):
                self.finish(request, "length")

    def finish(self, request: GenerationRequest, reason: str, error: BridgeError | None = None) -> None:
        """End a request, wherever it is."""
        request.reason, request.error = reason, error  # first: its caller is answered whatever fails below
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._drop_blocks(request)

    def _drop_blocks(self, request: GenerationRequest) -> None:
        self.pool.release(request.blocks)
        request.blocks, request.hashes, request.computed = [], [], 0
