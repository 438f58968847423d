"""Which requests run in the next step. No threads, no tensors: the engine calls it under its own lock.

Requests wait, run and finish. A preempted request loses its blocks, keeps its tokens, and is computed again from the
start when it is admitted again, under whatever weights are there by then.
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
from engine_side.embedded.runner import Batch

_STEP_TOKENS = 8192
"""Largest padded frame (sequences x longest) of one prefill step."""
_NONE: Mapping[str, int] = MappingProxyType({})


@dataclass(eq=False)
class Request:
    """One prompt on its way to a completion. `tokens` is prompt and output; `computed` of them have keys and values.

    `adapter` is what it runs with to its end, None for the base model. While it `follows` it has not begun: it takes
    the adapter that is published when it first runs, the one that belongs to the version it then reports.
    """

    tokens: list[int]
    sampling: Sampling
    stream: random.Random
    privileged: bool = False
    adapter: str | None = None
    follows: bool = False
    prompt_len: int = 0
    computed: int = 0
    logprobs: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    version: int | None = None
    reason: str | None = None
    error: BridgeError | None = None

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)

    @property
    def done(self) -> bool:
        return self.reason is not None or self.error is not None

    def completion(self) -> Completion:
        output = tuple(self.tokens[self.prompt_len :])
        return Completion(output, tuple(self.logprobs), self.reason or "abort", self.version or 0)


class Scheduler:
    """Waiting and running requests over one pool of blocks."""

    def __init__(self, pool: BlockPool, max_seqs: int, max_seq_len: int) -> None:
        self.pool = pool
        self.max_seqs = max_seqs
        self.max_seq_len = max_seq_len
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, requests: Iterable[Request]) -> None:
        self.waiting.extend(requests)

    def has_work(self, privileged: bool) -> bool:
        """Anything to do; with `privileged`, only requests that may pass the gate count."""
        return any(r.privileged or not privileged for r in (*self.running, *self.waiting))

    def schedule(
        self, privileged: bool, version: int, current: str | None = None, versions: Mapping[str, int] = _NONE
    ) -> tuple[list[Request], Batch] | None:
        """The next step: newly admitted requests if any, else one token for each running one; None when idle.

        With `privileged`, only requests that may pass the gate run. A request keeps what it first ran with: the adapter
        (`current` for one that follows what is published) and the version. For an adapter that was asked for by name
        that is the version it was published under last (`versions`): a later push may have published another one.
        """
        begun = self._admit(privileged, current, version, versions)
        chosen = begun or self._decode(privileged)
        if not chosen:
            return None
        return chosen, Batch(
            tuple(token for r in chosen for token in r.tokens[r.computed :]),
            tuple(len(r.tokens) - r.computed for r in chosen),
            tuple(r.computed for r in chosen),
            tuple(tuple(r.blocks) for r in chosen),
            tuple(r.adapter or "" for r in chosen) if any(r.adapter for r in chosen) else (),
        )

    def _admit(self, privileged: bool, current: str | None, version: int, versions: Mapping[str, int]) -> list[Request]:
        chosen: list[Request] = []
        longest = 0
        # Privileged ones first: a push waits for them, and must not wait for a whole queue of users.
        for request in sorted((r for r in self.waiting if r.privileged or not privileged), key=_rank_in_queue):
            adapter = current if request.follows else request.adapter
            cached = self.pool.match(request.tokens, adapter)
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
                named = not request.follows and adapter
                request.version = versions.get(named, version) if named else version
            request.adapter, request.follows = adapter, False
            self.waiting.remove(request)
            self.running.append(request)
            chosen.append(request)
        return chosen

    def _room(self, fresh: int, cached: Sequence[int], privileged: bool, chosen: Sequence[Request]) -> bool:
        """Are so many blocks free besides the cached ones? A privileged request may push running ones out, but none
        that this very step will compute."""
        # Counted anew each time: a cached block that only the victim used is among the free ones afterwards.
        while self.pool.free < fresh + self.pool.idle(cached):
            victim = next((r for r in reversed(self.running) if not r.privileged and r not in chosen), None)
            if not privileged or victim is None:
                return False
            self.preempt([victim])
        return True

    def _decode(self, privileged: bool) -> list[Request]:
        for request in [r for r in self.running if r.privileged or not privileged]:
            while request in self.running and len(request.blocks) * self.pool.block_size < len(request.tokens):
                if self.pool.free:
                    request.blocks.append(self.pool.take())
                else:
                    ordinary = (r for r in reversed(self.running) if not r.privileged)
                    self.preempt([next(ordinary, self.running[-1])])
        return [r for r in self.running if r.privileged or not privileged]

    def preempt(self, requests: Sequence[Request]) -> None:
        """Send running requests back to the head of the queue, without their keys and values."""
        for request in reversed(requests):
            self.running.remove(request)
            self._drop_blocks(request)
            self.waiting.appendleft(request)

    def advance(self, chosen: Sequence[Request], tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """The step was computed and these tokens were sampled."""
        for request, token, logprob in zip(chosen, tokens, logprobs):
            self._remember(request)
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

    def finish(self, request: Request, reason: str, error: BridgeError | None = None) -> None:
        """End a request, wherever it is."""
        request.reason, request.error = reason, error  # first: who waits for it is answered whatever fails below
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._drop_blocks(request)

    def reset(self, preempt_running: bool) -> bool:
        """Forget all prefixes; running requests are preempted first where allowed. False: nothing was forgotten."""
        if preempt_running:
            self.preempt(list(self.running))
        return self.pool.reset()

    def _remember(self, request: Request) -> None:
        """All of `request.tokens` have keys and values now: name the blocks that are full."""
        size = self.pool.block_size
        for index in range(len(request.names), len(request.tokens) // size):
            before = request.names[-1] if request.names else chain_start(request.adapter)
            request.names.append(block_hash(before, request.tokens[index * size : (index + 1) * size]))
            self.pool.remember(request.blocks[index], request.names[-1])

    def _drop_blocks(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks, request.names, request.computed = [], [], 0


def _rank_in_queue(request: Request) -> bool:
    return not request.privileged
