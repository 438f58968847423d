"""The engine that users call: generation, pausing, caches, prompt log-probabilities; one thread steps all requests."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from bridge.errors import REPORT, BridgeError, Closed, ConfigError, DeadlineExceeded, EngineQuarantined, NotFound
from bridge.protocol.codec import Completion, Sampling
from bridge.protocol.deadline import Deadline
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.kv import BlockPool
from engine_side.embedded.ranks import Ranks
from engine_side.embedded.sampler import sample, stream
from engine_side.embedded.scheduler import GenerationRequest, Scheduler

log = logging.getLogger(__name__)

PAUSE_MODES = ("drain", "abort", "keep")
CURRENT, BASE = "current", "base"
"""Values of `generate(adapter=...)` besides the name of a loaded LoRA: the one published last, and the base model."""


class Engine:
    """An inference engine of this process (rank 0) and, with tensor parallelism, of its child processes.

    Thread-safe. `close()` ends its thread and its children; so does the end of this process. A forked child has only
    the object: its `close()` does nothing.

    Attributes:
        weight_version: the version that completions report; set by the bridge at commit.
        adapter: the loaded LoRA that `generate(adapter="current")` uses; None is the base model.
        steps: forwards of the scheduler so far.
        runner: rank 0, the live model and its forwards.
        child_pids: process ids of ranks 1 and up.
        refusal: the reason with which `generate` raises EngineQuarantined now; None when it does not.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Start the ranks and the thread. Blocks until weights are loaded in all ranks. Raises ConfigError,
        IntegrityError, PeerLost."""
        self.config = config
        self.weight_version = 0
        self.adapter: str | None = None
        self._version_of: dict[str, int] = {}  # loaded LoRA -> the version it was published under last
        self.steps = 0
        self._pid = os.getpid()
        self._ranks = Ranks(config)
        self.runner = self._ranks.runner
        self.child_pids = tuple(child.process.pid for child in self._ranks.children)
        limits = self.runner.limits
        pool = BlockPool(limits.num_blocks, limits.block_size)
        self._scheduler = Scheduler(pool, config.max_num_seqs, limits.max_seq_len)
        self._execution = threading.RLock()  # one forward or job at a time, in the same order in all ranks
        self._changed = threading.Condition()  # guards everything below, and the scheduler
        self._gate_open = True  # False: new calls of generate wait
        self._scheduling = True  # False: only privileged requests run
        self.refusal: str | None = None
        self._retired: set[str] = set()  # LoRAs that are dropped as soon as no request uses them
        self._stepping = False
        self._visitors = 0  # callers that want the execution lock: the stepping thread lets them go first
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="embedded-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def cached_blocks_read(self) -> int:
        """Number of KV blocks that were taken from the prefix cache so far."""
        return self._scheduler.pool.hits

    # -- generation -------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        adapter: str = CURRENT,
        *,
        past_gate: bool = False,
        deadline: Deadline | None = None,
    ) -> list[Completion]:
        """Sample one completion per prompt, in order; a stop token is part of its completion. Blocks until all are
        done, and while the engine is paused.

        Args:
            adapter: "current" (the LoRA that is published when a request first runs), "base", or the name of a loaded
                LoRA; a request keeps the one that it began with, whatever is published while it runs.
            past_gate: run although paused or quarantined, and before all others.
            deadline: requests that have not finished by then end; None waits.

        Raises EngineQuarantined, Closed, NotFound (a LoRA that is not loaded, or retired), ConfigError (bad prompt),
        PeerLost (a rank's process has ended), DeadlineExceeded.
        """
        sampling = sampling or Sampling()
        tokens = self.runner.check(prompts)
        requests = [GenerationRequest(ids, sampling, stream(sampling, i), past_gate) for i, ids in enumerate(tokens)]
        late = "the completions were not finished in time", "give it more time, or resume the engine if it is paused"
        with self._changed:
            self._wait(lambda: past_gate or self._gate_open or self.refusal is not None, deadline, *late)
            self._check_closed()
            if self.refusal is not None and not past_gate:
                raise self._quarantined(self.refusal)
            named = None if adapter == CURRENT else self._named(adapter)
            for request in requests:
                request.lora, request.follows = named, adapter == CURRENT
                if not sampling.max_tokens or len(request.tokens) >= self._scheduler.max_seq_len:
                    request.version = self._version_of.get(named or BASE, self.weight_version)
                    request.reason = "length"
            self._scheduler.add(r for r in requests if not r.done)
            self._changed.notify_all()
            try:
                self._wait(lambda: all(r.done for r in requests), deadline, *late)
            finally:
                # Only a caller that was interrupted, or came to its deadline, leaves anything to end here.
                self._finish([r for r in requests if not r.done])
        for request in requests:
            if request.error is not None:
                raise request.error
        return [request.completion() for request in requests]

    def prompt_logprobs(self, prompts: Sequence[Sequence[int]], adapter: str = CURRENT) -> list[list[float]]:
        """Compute the log-probability of token i+1 given tokens 0..i, past the scheduler on fresh KV; works while
        paused. `adapter` as for `generate`. Raises ConfigError, NotFound, PeerLost, Closed."""
        tokens = self.runner.check(prompts)
        with self._exclusive(Deadline.after(self.config.timeout_s)):
            with self._changed:
                named = self.adapter if adapter == CURRENT else self._named(adapter)
            return self._ranks.prompt_logprobs(tokens, named)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the LoRAs that are loaded now, retired ones that still run included."""
        return self.runner.loras

    # -- called by the bridge ---------------------------------------------------------------------------------------

    def pause(self, mode: str = "abort", deadline: Deadline | None = None) -> None:
        """Stop scheduling: running requests finish first ("drain"), end as they are ("abort") or stay ("keep").

        New calls of `generate` wait. On an engine that is already paused only "abort" has an effect. Raises
        ConfigError, or DeadlineExceeded, after which the engine runs as before.
        """
        if mode not in PAUSE_MODES:
            expected, remedy = " | ".join(PAUSE_MODES), "choose one of these for inflight"
            raise ConfigError("unknown pause mode", where="inflight", expected=expected, got=repr(mode), remedy=remedy)
        deadline = deadline or Deadline.after(self.config.timeout_s)
        late = "the engine could not be paused in time", "give a longer timeout_s, or inflight='abort'"
        with self._changed:
            before = self._gate_open, self._scheduling
            self._gate_open = False
            try:
                if mode == "drain" and self._scheduling:
                    self._wait(lambda: not self._ordinary(), deadline, *late)
                self._scheduling = False
                self._wait(lambda: not self._stepping, deadline, *late)
            except DeadlineExceeded:
                self._gate_open, self._scheduling = before
                self._changed.notify_all()
                raise
            if mode == "abort":
                self._finish(self._ordinary())

    def resume(self) -> None:
        """Schedule again; kept requests go on. Idempotent."""
        with self._changed:
            self._gate_open = self._scheduling = True
            self._changed.notify_all()

    @property
    def paused(self) -> bool:
        return not self._scheduling

    def publish(self, version: int, adapter: str | None = None) -> None:
        """Set the version that completions report and the LoRA that "current" means from now on; requests that have
        begun keep theirs. Raises NotFound for a LoRA that is not loaded, or retired."""
        with self._changed:
            if adapter is not None:
                self._named(adapter)
            self.weight_version, self.adapter = version, adapter
            told = self._version_of if adapter is None else {**self._version_of, adapter: version}
            self._version_of = {name: told[name] for name in self.adapters if name in told}
            self._changed.notify_all()  # the LoRA that was published before may be free to go

    def retire(self, names: Iterable[str]) -> None:
        """Drop these LoRAs in every rank, between two steps, as soon as no request uses them and none of them is the
        published one; does not wait for requests. New requests cannot name them any more. Unknown names are ignored.
        Raises PeerLost, Closed."""
        with self._changed:
            self._retired |= set(names).intersection(self.adapters)
        with self._exclusive(Deadline.after(self.config.timeout_s)):
            self._drop_unused()

    def end_users(self, names: Iterable[str]) -> None:
        """End, as aborted, the ordinary requests that use one of these LoRAs or have named one; a request that waits
        for "current" takes the LoRA that is published when it begins. Works while paused."""
        chosen = set(names)
        with self._changed:
            self._finish([r for r in self._ordinary() if not r.follows and r.lora in chosen])

    def refuse(self, reason: str | None) -> None:
        """Make `generate` raise EngineQuarantined, also for calls that wait or run now; None lifts it."""
        with self._changed:
            self.refusal = reason
            if reason is not None:
                self._finish(self._ordinary(), self._quarantined(reason))
            self._changed.notify_all()

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget cached prefixes. False, and nothing forgotten, while requests hold keys and values, unless
        `reset_running_requests` preempts them: they are then computed again when scheduling goes on."""
        with self._exclusive(Deadline.after(self.config.timeout_s)), self._changed:
            if reset_running_requests:
                self._scheduler.preempt(list(self._scheduler.running))
            return self._scheduler.pool.reset()

    def run_job(self, job: bytes, deadline: Deadline) -> None:
        """Run an opaque job of the bridge in every rank, between two steps; returns when all ranks have.

        Raises DeadlineExceeded, PeerLost, or the error of a rank.
        """
        with self._exclusive(deadline):
            self._drop_unused()  # a job may need the slot
            self._ranks.run_job(job, deadline)

    def close(self) -> None:
        """End running requests, the thread and the children. Idempotent; in a forked child, whose parent goes on with
        them, nothing happens."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._closed = True
            self._finish(
                self._everything(),
                Closed(
                    "the engine was closed",
                    where="the embedded engine",
                    expected="a running engine",
                    got="a closed one",
                    remedy="start another Engine",
                ),
            )
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(self.config.timeout_s)
        self._ranks.close()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- the stepping thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._may_step)
                if self._closed:
                    return
            with self._execution:
                try:
                    self._drop_unused()
                except Exception:
                    log.exception("a LoRA could not be dropped")
                self._step()

    def _step(self) -> None:
        """Schedule, compute and record one step. Errors end the requests that took part, or all of them when it is not
        known which did, and never this thread: without it every caller would wait for ever."""
        chosen: list[GenerationRequest] | None = None
        try:
            with self._changed:
                if self._closed:
                    return
                self._end_without_lora()
                planned = self._scheduler.schedule(
                    not self._scheduling, self.weight_version, self.adapter, self._version_of
                )
                if planned is None:
                    return
                self._stepping = True
            chosen, batch = planned
            logits = self._ranks.forward(batch)
            tokens, logprobs = sample(logits, [r.sampling for r in chosen], [r.stream for r in chosen])
            with self._changed:
                self.steps += 1
                self._scheduler.advance(chosen, tokens, logprobs)
        except Exception as error:
            failure = (
                error
                if isinstance(error, BridgeError)
                else BridgeError(
                    f"a step failed: {error!r}",
                    where="the embedded engine",
                    expected="a step without errors",
                    got=type(error).__name__,
                    remedy=REPORT,
                )
            )
            failure.__cause__ = None if failure is error else error
            with self._changed:
                for request in self._everything() if chosen is None else chosen:
                    try:
                        if not request.done:
                            self._scheduler.finish(request, "abort", failure)
                    except Exception:  # the scheduler's lists are broken; the request is marked, its caller goes on
                        log.exception("a request that failed could not be removed from the scheduler")
        finally:
            with self._changed:
                self._stepping = False
                self._changed.notify_all()

    @contextmanager
    def _exclusive(self, deadline: Deadline) -> Iterator[None]:
        """Hold the execution lock: no step is under way, not even between its forward and its bookkeeping."""
        with self._changed:
            self._check_closed()
            self._visitors += 1
        try:
            if not self._execution.acquire(timeout=max(deadline.remaining_s, 0.001)):
                raise DeadlineExceeded(
                    "the engine's step outlasted the deadline",
                    where="the embedded engine",
                    expected="a step that ends before the deadline",
                    got="none yet",
                    remedy="pause the engine first",
                )
            try:
                yield
            finally:
                self._execution.release()
        finally:
            with self._changed:
                self._visitors -= 1
                self._changed.notify_all()

    def _drop_unused(self) -> None:
        """Drop the retired LoRAs without users. Called with the execution lock held."""
        with self._changed:
            names = self._unused()
        try:
            for name in sorted(names):
                self._ranks.drop_lora(name)
        finally:  # ranks that cannot be told are lost for good
            with self._changed:
                self._retired.difference_update(names)

    # -- helpers, called with the lock held --------------------------------------------------------------------------

    def _may_step(self) -> bool:
        if self._closed or self._visitors:
            return self._closed
        return self._scheduler.has_work(not self._scheduling) or bool(self._unused())

    def _unused(self) -> set[str]:
        """Retired LoRAs that neither a request nor the published version uses."""
        if not self._retired:
            return set()
        return self._retired - {self.adapter, *(r.lora for r in self._everything())}

    def _named(self, adapter: object) -> str | None:
        """The LoRA of a request that names one. Raises ConfigError, NotFound."""
        if not isinstance(adapter, str):
            expected = f"{CURRENT!r}, {BASE!r} or the name of a loaded LoRA"
            raise ConfigError(
                "a LoRA is asked for by name",
                where="adapter",
                expected=expected,
                got=repr(adapter),
                remedy="leave it out for the one that was pushed last",
            )
        if adapter == BASE:
            return None
        if adapter in self._retired:
            remedy = 'ask for "current"'
            raise NotFound(
                "this LoRA is retired",
                where="adapter",
                expected="a LoRA that is loaded",
                got=repr(adapter),
                remedy=remedy,
            )
        self.runner.check_lora(adapter)
        return adapter

    def _end_without_lora(self) -> None:
        """End requests whose LoRA was dropped: a rank without it would leave the others in the middle of a step."""
        if self.runner.lora is None:
            return
        loaded = {None, *self.adapters}
        for request in self._everything():
            wanted = self.adapter if request.follows else request.lora
            if wanted not in loaded:
                remedy = 'ask for "current"'
                error = NotFound(
                    "the LoRA of this request was dropped",
                    where="adapter",
                    expected="a LoRA that is loaded",
                    got=repr(wanted),
                    remedy=remedy,
                )
                self._finish([request], error)

    def _everything(self) -> list[GenerationRequest]:
        return [*self._scheduler.running, *self._scheduler.waiting]

    def _ordinary(self) -> list[GenerationRequest]:
        return [r for r in self._everything() if not r.privileged]

    def _finish(self, requests: Sequence[GenerationRequest], error: BridgeError | None = None) -> None:
        """End requests as aborted, with `error` if there is one."""
        for request in requests:
            self._scheduler.finish(request, "abort", error)
        self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], deadline: Deadline | None, what: str, remedy: str) -> None:
        timeout = None if deadline is None else deadline.remaining_s
        if not self._changed.wait_for(lambda: ready() or self._closed, timeout):
            raise DeadlineExceeded(
                what, where="the embedded engine", expected="an end before the deadline", got="none yet", remedy=remedy
            )

    def _check_closed(self) -> None:
        if self._closed:
            raise Closed(
                "the engine was closed",
                where="the embedded engine",
                expected="a running engine",
                got="a closed one",
                remedy="start another Engine",
            )

    def _quarantined(self, reason: str) -> EngineQuarantined:
        remedy = "push a verified version, or restart the engine"
        return EngineQuarantined(
            "this engine refuses to generate",
            where="the embedded engine",
            expected="a verified version",
            got=reason,
            remedy=remedy,
        )
