"""`Bridge`: the trainer's handle, and one push from the iterable to the receipt.

    1. (this process)  lease, names, ties: `TrainerPort.collect`
    2. (everyone)      plan, the first time or when the layout changed: PlanRequest
    3. (this process)  snapshot into the arena's free slot, digests, finite check, canary reference; seal
    4. (coordinator)   engines pause, load, verify, commit or go back: SubmitRequest, then WaitRequest

After step 3 the trainer's tensors may change. After SubmitRequest is answered the push no longer needs this process.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Unpack, overload

import torch

from bridge.arena import Arena
from bridge.config import Config
from bridge.deadline import Deadline
from bridge.digest import seal_slot
from bridge.errors import BridgeError, Busy, Closed, ConfigError
from bridge.fanout import LEVELS_OF
from bridge.handles import CALL_TIMEOUT_S, EngineHandle, PendingPush, PushOptions, receipt_or_raise
from bridge.health import HealthReport, assess, local_facts
from bridge.lease import Lease
from bridge.manifest import TensorInfo, validate
from bridge.messages import (
    Ask,
    BeginRequest,
    Begun,
    CancelRequest,
    DaemonIs,
    Done,
    Explained,
    ExplainRequest,
    Finished,
    Health,
    HealthRequest,
    History,
    HistoryRequest,
    Options,
    Planned,
    PlanRequest,
    Reference,
    RollbackRequest,
    SubmitRequest,
    ToCoordinator,
)
from bridge.ports import CoordinatorPort, EnginePort, Snapshot, TrainerPort, expect
from bridge.receipt import LEVELS, Receipt

log = logging.getLogger(__name__)

T = TypeVar("T")
Named = Iterable[tuple[str, torch.Tensor]]
MAX_VERSION = 1 << 53
MODES = ("auto", "full")
INFLIGHT = ("drain", "abort", "keep")
KV = ("reset", "keep")


class Bridge:
    """The trainer's end of a bridge. Made by `bridge.launch`, `bridge.connect` and `bridge.attach`; one trainer process
    holds the lease at a time. Methods may be called from one thread; `push` blocks unless `wait=False`."""

    def __init__(
        self,
        name: str,
        coordinator: CoordinatorPort,
        engines: Sequence[EnginePort],
        trainer: TrainerPort,
        config: Config,
        *,
        on_close: Callable[[], None] | None = None,
        on_shutdown: Callable[[], None] | None = None,
        guard: Callable[[frozenset[int]], None] | None = None,
        state: Path | None = None,
    ) -> None:
        self.name = name
        self.engines = [EngineHandle(port) for port in engines]
        self.config = config
        self._coordinator = coordinator
        self._trainer = trainer
        self._on_close = on_close
        self._on_shutdown = on_shutdown
        self._guard = guard
        self._state = state
        self._pushing = threading.Lock()
        self._lease: Lease | None = None
        self._planned: tuple[tuple[TensorInfo, ...], bool, Planned] | None = None
        self._arena: Arena | None = None
        self._longest: int | None = None
        self._closed = False
        self._warned = False

    def __enter__(self) -> Bridge:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Bridge {self.name}, {len(self.engines)} engine(s){', closed' if self._closed else ''}>"

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def bind(self, model: torch.nn.Module) -> None:
        """Tell the bridge the live model behind the names: checkpoint names, ties, persistent buffers and the canary's
        reference come from it. Nothing of it is ever written. Call once, before the first push."""
        self._require_open()
        self._trainer.bind(model)
        self._planned = None

    @overload
    def push(self, named: Named, *, wait: Literal[True] = True, **options: Unpack[PushOptions]) -> Receipt: ...
    @overload
    def push(self, named: Named, *, wait: Literal[False], **options: Unpack[PushOptions]) -> PendingPush: ...
    def push(
        self,
        named: Named,
        *,
        version: int | None = None,
        mode: str = "auto",
        verify: str | Iterable[str] | None = None,
        partial: bool = False,
        inflight: str = "abort",
        kv: str = "reset",
        allow_nonfinite: bool = False,
        wait: bool = True,
        timeout_s: float | None = None,
    ) -> Receipt | PendingPush:
        """Bring every engine to these weights, verified, or leave every engine as it was.

        Args:
            named: `(name, tensor)` pairs, any iterable, read once; any device, dtype and stride.
            version: default the highest ever issued plus one.
            mode: "auto" or "full" (every tensor as it stands).
            verify: "off", "transfer", "weights" or "outputs"; or an iterable of level names (`bridge.receipt.LEVELS`).
                Default "outputs" with a bound model, else "weights".
            partial: a subset is meant; what is not sent stays as it is. No canary then, unless `verify` asks for one:
                the trainer's other tensors need not be what the engine holds.
            inflight: what happens to running requests: "drain", "abort" or "keep", as far as the engine can.
            kv: "reset" or "keep" the engines' KV and prefix caches.
            allow_nonfinite: let NaN and infinity pass.
            wait: False returns a PendingPush as soon as the snapshot is sealed.
            timeout_s: deadline of everything after the snapshot.

        Returns the Receipt (a PendingPush with `wait=False`). When it returns or raises, the tensors may change.

        Raises ConfigError (Busy, LeaseHeld, Closed), IntegrityError (which tensor, where, expected, got) and
        StaleVersion before any engine was written; PushAborted *from* the cause after that, every engine put back.
        """
        self._require_open()
        options, wants_reference = self._options(mode, verify, partial, inflight, kv, timeout_s)
        version = None if version is None else _whole("version", version)
        if not self._pushing.acquire(blocking=False):
            raise Busy("another push of this process is in flight", where=self.name, remedy="wait for its receipt")
        try:
            self._hold_lease()
            pending = self._seal_and_submit(named, version, options, wants_reference, allow_nonfinite)
        finally:
            self._pushing.release()
        return pending.result() if wait else pending

    def _seal_and_submit(
        self, named: Named, version: int | None, options: Options, wants_reference: bool | None, allow_nonfinite: bool
    ) -> PendingPush:
        started = time.perf_counter()
        snapshot = self._trainer.collect(named, partial=options.partial)
        if self._guard is not None:
            self._guard(self._trainer.storages())
        planned, arena = self._agree(snapshot, options.partial)
        planned_at = time.perf_counter()
        begin = BeginRequest(planned.plan, version, f"pid {os.getpid()} on {socket.gethostname()}")
        begun = self._call(begin, Begun)
        try:
            arena.begin(begun.slot)
            written = self._trainer.write(
                snapshot,
                arena,
                begun.slot,
                begun.base,
                allow_nonfinite=allow_nonfinite,
                threads=self.config.copy_threads,
            )
            reference, options, notes = self._reference(options, wants_reference)
            seal = seal_slot(arena, begun.slot, begun.version, written.digests)
            phases = {"plan": planned_at - started, "snapshot": time.perf_counter() - planned_at}
            submit = SubmitRequest(begun.version, seal.root, options, phases, written.nbytes, reference, notes)
            self._call(submit, Done)
        except BaseException:
            # what went wrong is worth more than a second failure on the way out; an unsealed push is dropped anyway
            with contextlib.suppress(BridgeError):
                self._call(CancelRequest(begun.version), Done)
            raise
        return PendingPush(self._coordinator, begun.version, options.timeout_s)

    def _agree(self, snapshot: Snapshot, partial: bool) -> tuple[Planned, Arena]:
        """The plan for this layout: the last one while nothing changed, else everybody is asked."""
        last = self._planned
        if last is not None and self._arena is not None and last[0] is snapshot.tensors and last[1] == partial:
            return last[2], self._arena
        request = PlanRequest(snapshot.tensors, partial, self._trainer.bound, self.config.plan_timeout_s)
        planned = self._call(request, Planned, self.config.plan_timeout_s)
        limits = [info.max_prompt for info in self.status().engines if info.max_prompt is not None]
        self._longest = min(limits, default=None)
        if self._arena is None or str(self._arena.path) != planned.path:
            if self._arena is not None:
                self._arena.close()
            self._arena = Arena.open(Path(planned.path), validate(planned.manifest), writable=True)
        self._planned = (snapshot.tensors, partial, planned)
        return planned, self._arena

    def _reference(self, options: Options, wanted: bool | None) -> tuple[Reference | None, Options, tuple[str, ...]]:
        """The trainer's canary, when it is wanted. `wanted` None: only where the model can give one, else a note."""
        if wanted is False:
            return None, options, ()
        try:
            if wanted is None and options.partial:
                # What was not sent may have moved on in the trainer: then the two models differ, and rightly so.
                raise ConfigError("only a subset was sent", remedy="verify='outputs' when the rest is unchanged")
            return self._trainer.reference(self._longest), options, ()
        except ConfigError as error:
            if wanted:
                raise
            lower = Options(
                "weights",
                LEVELS_OF["weights"],
                options.inflight,
                options.kv,
                options.partial,
                options.mode,
                options.reason,
                options.timeout_s,
            )
            return None, lower, (f"no canary: {error}",)

    def _options(
        self,
        mode: str,
        verify: str | Iterable[str] | None,
        partial: bool,
        inflight: str,
        kv: str,
        timeout_s: float | None,
    ) -> tuple[Options, bool | None]:
        """Checked options, and whether a canary reference is wanted (None: if the model can give one)."""
        _one_of("mode", mode, MODES)
        _one_of("inflight", inflight, INFLIGHT)
        _one_of("kv", kv, KV)
        wanted: bool | None
        if verify is None:
            name = "outputs" if self._trainer.bound else "weights"
            levels = LEVELS_OF[name]
            wanted = None if self._trainer.bound else False
            if not self._trainer.bound and not self._warned:
                self._warned = True
                log.warning("%s: no model is bound, so no canary runs; b.bind(model) adds it", self.name)
        elif isinstance(verify, str):
            name = _one_of("verify", verify, tuple(LEVELS_OF))
            levels = LEVELS_OF[name]
            wanted = "canary" in levels
        elif not isinstance(verify, Iterable):
            raise ConfigError(
                "no such choice", where="verify", expected=" | ".join((*LEVELS_OF, "level names")), got=repr(verify)
            )
        else:
            levels = tuple(_one_of("verify", level, LEVELS) for level in verify)
            name = "+".join(levels) or "off"
            wanted = bool({"canary", "cache"} & set(levels))
        if wanted and not self._trainer.bound:
            raise ConfigError(
                "the canary needs the live model", where="verify", got=name, remedy="b.bind(model), or verify='weights'"
            )
        timeout = self.config.push_timeout_s if timeout_s is None else timeout_s
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise ConfigError("a deadline must be positive", where="timeout_s", got=repr(timeout_s))
        reason = "a model without LoRA: every tensor as it stands" if mode == "auto" else "asked for"
        return Options(name, levels, inflight, kv, partial, "full", reason, timeout), wanted

    # ---- questions --------------------------------------------------------------------------------------------------

    def status(self) -> DaemonIs:
        """Engines, versions and whether a push is in flight."""
        return self._call(Ask(), DaemonIs)

    def health(self, timeout_s: float = 120.0) -> HealthReport:
        """Examine the live run: actors, versions, the last receipt, a fresh canary against the stored reference, a
        fresh read-back against the arena, orphans. Blocks; writes nothing."""
        facts = self._call(HealthRequest(timeout_s), Health, timeout_s + CALL_TIMEOUT_S).facts
        return assess(facts, local_facts(self.config.shm_dir))

    def history(self, last: int = 20) -> list[dict[str, Any]]:
        """The newest receipts from the journal, as plain data, oldest first."""
        return list(self._call(HistoryRequest(last), History).receipts)

    def explain(self, name: str) -> list[dict[str, str]]:
        """Where a canonical tensor goes on every engine rank: parameter, region, strategy and why. Raises NotFound."""
        return list(self._call(ExplainRequest(name), Explained).rows)

    def rollback(self, timeout_s: float = 300.0) -> Receipt:
        """Serve the version before the last committed one again, verified by bits or probes. One level; version numbers
        go on from the highest ever issued. Raises StaleVersion when there is none, Busy during a push."""
        self._require_open()
        self._hold_lease()
        finished = self._call(RollbackRequest(timeout_s), Finished, timeout_s + CALL_TIMEOUT_S)
        version = finished.receipt.version if finished.receipt else 0
        return receipt_or_raise(finished, version)

    def close(self) -> None:
        """Give up the lease and what this process holds. Idempotent. A daemon goes on (`weighbridge down` stops it); an
        attached engine stays the user's. Later calls raise Closed."""
        if self._closed:
            return
        self._closed = True
        self._trainer.close()
        if self._arena is not None:
            self._arena.close()
            self._arena = None
        try:
            if self._on_close is not None:
                self._on_close()
        finally:
            if self._lease is not None:
                self._lease.release()
                self._lease = None

    def shutdown(self) -> None:
        """Close this Bridge and stop its daemon: engines gracefully, shared memory unlinked, and the local Ray if we
        started it and nothing else of ours runs there. What `weighbridge down` does. For `attach` the same as close."""
        self.close()
        if self._on_shutdown is not None:
            self._on_shutdown()

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _call(self, request: ToCoordinator, kind: type[T], timeout_s: float = CALL_TIMEOUT_S) -> T:
        self._require_open()
        return expect(self._coordinator.call(request, Deadline.after(timeout_s)), kind)

    def _hold_lease(self) -> None:
        if self._lease is None:
            self._lease = Lease.acquire(self.name, directory=self._state)

    def _require_open(self) -> None:
        if self._closed:
            raise Closed("this Bridge was closed", where=self.name, remedy="bridge.connect(name) opens a new one")


def _whole(what: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or not 0 <= number <= MAX_VERSION:
        raise ConfigError(
            "not a version", where=what, expected=f"a whole number from 0 to {MAX_VERSION}", got=repr(value)
        )
    return number


def _one_of(what: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ConfigError("no such choice", where=what, expected=" | ".join(allowed), got=repr(value))
    return value
