"""Drive an SGLang engine through its own calls and the frontend that stands before it."""

from __future__ import annotations

import base64
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridge.errors import DeadlineExceeded, ProtocolError
from bridge.model.declared_losses import DeclaredLosses
from bridge.model.lora_format import LoraLimits
from bridge.protocol.codec import Sampling
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.frontend_client import CALL_S, FrontendClient
from engine_side.engines.common.published_state import BASE, asleep_error
from engine_side.engines.sglang.arguments import Arguments, require_supported
from engine_side.engines.sglang.scheduler_messages import (
    FACTS,
    JOB,
    LORAS,
    OPEN,
    SHUT,
    SchedulerAnswer,
    SchedulerFacts,
    read_answer,
)

RESUME = "call continue_generation, then try again"
"""Remedy for an engine that somebody else has paused: requests of the bridge would wait for them."""
_POLL_S = 0.005
_GRACE_S = 3.0
"""Seconds for all calls together that follow a deadline which the engine let pass: to resume it, or to refuse."""
_PROBE_S = 0.5
"""Seconds for each further call, once the grace is over."""
_ASKS_RANKS = (msg.GetState, msg.Generate, msg.Publish, msg.Retire)
"""Requests for which the frontend, if the engine holds LoRAs, waits for the schedulers."""


class SglangDriver(FrontendClient):
    """The `EngineDriver` of an SGLang engine, whatever way leads to it.

    Attributes:
        max_prompt, vocabulary, cache_grain, losses: as `EngineDriver` has them; known once `facts` was called.
    """

    kind = "sglang"
    can_generate = True
    max_prompt: int
    vocabulary: int
    cache_grain: int
    losses: DeclaredLosses

    def __init__(self, get: Arguments, where: str, start: str, *, on_close: Callable[[], None] | None = None) -> None:
        """Make the driver; nothing is sent yet.

        Args:
            get: returns an argument that the engine was started with.
            where, start: as in `require_supported`, whose error is raised for an engine that cannot be driven.
            on_close: ends an engine that belongs to the driver.
        """
        super().__init__(on_close)
        require_supported(get, where, start)
        self.where = where
        self.ranks, self._on_cpu = int(get("tp_size")), str(get("device")) == "cpu"
        path, quantisation = Path(get("model_path")), get("quantization")
        self.checkpoint = path if path.is_dir() and str(get("load_format")) != "dummy" else None
        self.quantisation = None if quantisation is None else str(quantisation)
        # one slot less than SGLang has: it keeps one that is never pinned
        slots = max(0, int(get("max_loras_per_batch")) - 1)
        rank = get("max_lora_rank") if get("enable_lora") else None
        self.lora = None if rank is None else LoraLimits(int(rank), slots)
        self._push: Deadline | None = None  # of the push that has the engine paused
        self._grace: Deadline | None = None  # for an engine that has let a deadline pass

    # ---- the ways to the engine: each call blocks until it is answered; raises PeerLost, DeadlineExceeded -----------

    @abstractmethod
    def ask_frontend(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        """Return the frontend's answer; its errors are raised."""

    @abstractmethod
    def call_engine(self, method: str, deadline: Deadline, **arguments: Any) -> Any:
        """Make one of SGLang's calls, by the name that it has in the tokenizer manager and as a route:
        `pause_generation`, `continue_generation`, `flush_cache` (True when it did), `update_weight_version`,
        `abort_request`."""

    @abstractmethod
    def check_weights(self, words: list[str], deadline: Deadline) -> tuple[bool, str]:
        """Send a request of the bridge to all schedulers: (success, message)."""

    def refuse_shared(self, storages: frozenset[int]) -> None:
        """Do nothing: SGLang's weights lie in its schedulers' processes, never in the trainer's."""

    # ---- requests to the ranks -----------------------------------------------------------------------------------

    def dispatch(self, job: bytes, deadline: Deadline) -> None:
        """Run the job in every rank. Raises ProtocolError where a rank could not answer, PeerLost, DeadlineExceeded."""
        self.ask(JOB, base64.b64encode(job).decode(), deadline=deadline)

    def loaded_loras(self) -> tuple[str, ...]:
        """Return the names of the LoRAs that the ranks hold, whoever loaded them."""
        return () if self.lora is None else tuple(self.ask(LORAS).loras)

    def facts(self, deadline: Deadline | None = None) -> SchedulerFacts:
        """Ask rank 0's scheduler for its limits and whether it is paused."""
        facts = self.ask(FACTS, deadline=deadline).facts
        if facts is None:
            raise ProtocolError(
                "an SGLang scheduler left out the facts it was asked for",
                where=self.where,
                expected="facts of the engine",
                got="none",
                remedy="install the same weighbridge where SGLang runs and in the trainer's environment",
            )
        self.max_prompt, self.vocabulary, self.cache_grain = facts.max_prompt, facts.vocabulary, facts.page
        self.losses = DeclaredLosses(facts.kv, facts.kv_dtype, self.quantisation)
        return facts

    def ask(self, verb: str, text: str = "", *, deadline: Deadline | None = None) -> SchedulerAnswer:
        """Send a request to every rank and return rank 0's answer. Blocks. Raises as `read_answer`, PeerLost,
        DeadlineExceeded."""
        wait = deadline or self._until()
        wait.check("a job for SGLang's schedulers")
        if verb != FACTS:
            self._require_responsive()
        elif self._grace is not None:
            wait = self._until()
        with self._noting_lateness():
            ok, message = self.check_weights([verb, text], wait)
        self._grace = None
        return read_answer(self.where, ok, message)

    def _front(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        if isinstance(request, msg.Generate) and not request.past_gate:
            return self.ask_frontend(request, deadline)  # a user's: it may take its time
        if isinstance(request, _ASKS_RANKS) and self.lora is not None:
            self._require_responsive()
        with self._noting_lateness():
            return self.ask_frontend(request, deadline)

    def _call(self, method: str, **arguments: Any) -> Any:
        with self._noting_lateness():
            return self.call_engine(method, self._until(), **arguments)

    # ---- time ----------------------------------------------------------------------------------------------------

    def _until(self) -> Deadline:
        """Return the deadline of a call that was given none: that of the push, or, once the engine has let a deadline
        pass, one short grace for all calls together."""
        if self._grace is not None:
            return Deadline.after(_PROBE_S) if self._grace.expired else self._grace
        if self._push is None:
            return Deadline.after(CALL_S)
        return Deadline.after(_GRACE_S) if self._push.expired else self._push

    @contextmanager
    def _noting_lateness(self) -> Iterator[None]:
        """Begin the grace when the engine does not answer in time."""
        try:
            yield
        except DeadlineExceeded:
            self._grace = self._grace or Deadline.after(_GRACE_S)
            raise

    def _require_responsive(self) -> None:
        """An engine that has let a deadline pass has to answer a short question before it is given time for work."""
        if self._grace is not None:
            self.facts()

    # ---- pause and caches ----------------------------------------------------------------------------------------

    def pause(self, inflight: str, deadline: Deadline) -> None:
        """Hold new requests before the engine and pause it.

        Args:
            inflight: "drain" waits for running requests, "abort" ends them, "keep" lets SGLang take them back
                (its mode "retract") and compute them again under the weights that serve next.
        """
        self._push = deadline
        paused = self.state(deadline).paused
        self._tell(msg.Hold(), deadline)
        try:
            while inflight == "drain" and not paused and self.state(deadline).unfinished:
                deadline.check("requests in flight did not finish")
                time.sleep(_POLL_S)
            self._tell(msg.Hold(paused=True), deadline)
            self.call_engine("pause_generation", deadline, mode="retract")
            while not self.facts(deadline).paused:  # SGLang's pause has no answer of its own
                deadline.check("SGLang's pause")
            if inflight == "abort":
                self.call_engine("abort_request", deadline, rid="", abort_all=True)
        except BaseException:
            if not paused:
                self._go_on()
            raise

    def resume(self) -> None:
        """Let SGLang schedule again and requests pass. Idempotent."""
        state = self.state()
        if state.paused or state.held:
            self._go_on()
        self._push = None

    def _go_on(self) -> None:
        self._call("continue_generation", torch_empty_cache=not self._on_cpu)
        self._tell(msg.Release())

    def refuse(self, reason: str | None) -> None:
        """Let every request be refused with `reason` (None lifts it); requests inside the engine are ended. An engine
        that hangs refuses too: what is inside it ends when it can."""
        try:
            super().refuse(reason)
        except DeadlineExceeded:
            if reason is None:
                raise
        if reason is not None:
            self._push = None

    def reset_caches(self) -> bool:
        """Drop SGLang's KV and prefix caches. Returns False when SGLang refuses, as it does while requests run
        (https://github.com/sgl-project/sglang/issues/12099)."""
        self._require_responsive()
        return bool(self._call("flush_cache"))

    # ---- readiness, versions -------------------------------------------------------------------------------------

    def _require_ready(self) -> None:
        state = self.state()
        if state.refusal is not None or state.paused:
            return
        if self.facts().paused:
            raise asleep_error(self.where, RESUME)
        # the first forward of some of SGLang's models changes their module tree, which has to be over before a push
        # compares the tree with what it was
        sampling = Sampling(max_tokens=2, temperature=0.0)
        self._completions([[0, 0]], sampling, BASE, True, Deadline.after(CALL_S))

    def _set_weight_version(self, version: int) -> None:
        self._call("update_weight_version", new_version=str(version), abort_all_requests=False)

    def _open_scheduling(self, state: msg.FrontendState, deadline: Deadline | None) -> None:
        self.ask(OPEN, deadline=deadline)  # for the bridge's own requests alone: others are put aside

    def _close_scheduling(self) -> None:
        self.ask(SHUT)
