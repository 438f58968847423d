"""`Bridge`: the trainer's handle, and one push from the iterable to the receipt.

    1. (this process)  lease, names, ties: `TrainerPort.collect`
    2. (everyone)      plan, the first time or when the layout changed: PlanRequest
    3. (this process)  snapshot into the arena's free slot, digests, finite check, seal; canary reference
    4. (coordinator)   engines pause, load, verify, commit or go back: SubmitRequest, then WaitRequest

After step 3 the trainer's tensors may change. After SubmitRequest is answered the push no longer needs this process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Unpack, overload

import msgspec
import torch

from bridge.collection import Collection
from bridge.config import Config
from bridge.coordinator.base_weights_check import BaseWeightsCheck
from bridge.coordinator.health import HealthReport, orphaned_memory
from bridge.coordinator.unused_tensors import require_equal_partners
from bridge.errors import (
    BridgeError,
    Busy,
    Closed,
    ConfigError,
    EngineQuarantined,
    MissingTensor,
    ProtocolError,
    UnexpectedTensor,
    UnsupportedLora,
)
from bridge.handles import CALL_TIMEOUT_S, EngineHandle, PendingPush, receipt_or_raise, wait_for_receipt
from bridge.model.declared_losses import ROUNDS_TO, Rounding
from bridge.model.dtypes import CODES
from bridge.model.levels import LEVELS_OF
from bridge.model.manifest import validate
from bridge.model.receipt import Receipt
from bridge.ports import ModeChoice, Snapshot, SnapshotLayout, TrainerPort, Written, expect
from bridge.protocol.codec import ErrorInfo
from bridge.protocol.coordinator_messages import (
    Accepted,
    BeginRequest,
    Begun,
    CancelRequest,
    Compared,
    CompareRequest,
    DaemonStatus,
    EngineInfo,
    Explained,
    ExplainRequest,
    Finished,
    HealthFacts,
    HealthRequest,
    History,
    HistoryRequest,
    PlanAnswer,
    Planned,
    PlanRequest,
    Reference,
    RollbackRequest,
    StatusRequest,
    SubmitRequest,
    ToCoordinator,
    Unproven,
)
from bridge.protocol.deadline import Deadline
from bridge.push_settings import PushArguments, PushSettings, check_settings
from bridge.session import Session
from bridge.shm.arena import Arena

log = logging.getLogger(__name__)

DROPPED_WAIT_S = 5.0
"""How long the end of a Bridge that was dropped unclosed is waited for where it is dropped; it goes on after that."""

T = TypeVar("T")
Named = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class _Agreed:
    """A layout that all engines have planned, and its arena."""

    layout: SnapshotLayout
    partial: bool
    planned: Planned
    arena: Arena


@dataclass(frozen=True)
class _Slot:
    """The slot for the snapshot of `version`. Tensors that are not sent are carried over from slot `base`."""

    version: int
    index: int
    base: int | None


class Bridge:
    """The trainer's end of a bridge. Made by `bridge.launch`, `bridge.connect` and `bridge.attach`; one trainer process
    holds the lease at a time. Methods may be called from one thread; `push` blocks unless `wait=False`."""

    def __init__(self, session: Session, trainer: TrainerPort, config: Config) -> None:
        self.name = session.name
        self.engines = [EngineHandle(port) for port in session.engines]
        self.config = config
        self._session = session
        self._threads = config.copy_threads
        self._coordinator = session.coordinator
        self._trainer = trainer
        self._pushing = threading.Lock()
        self._agreed: dict[bool, _Agreed] = {}
        """By whether it is an adapter's."""
        self._engine_infos: tuple[EngineInfo, ...] | None = None
        self._base = BaseWeightsCheck(trainer)
        self._closed = False
        self._warned = False
        self._finalizer = weakref.finalize(self, _dropped, session, trainer, self._agreed)
        self._finalizer.atexit = False  # the session has an exit hook of its own

    def __enter__(self) -> Bridge:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def arena(self) -> Arena | None:
        """The arena of the weights, as it was agreed last; None before the first push of weights."""
        agreed = self._agreed.get(False)
        return None if agreed is None else agreed.arena

    def __repr__(self) -> str:
        return f"<Bridge {self.name}, {len(self.engines)} engine(s){', closed' if self._closed else ''}>"

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def bind(self, model: torch.nn.Module) -> None:
        """Bind the live model behind the names: checkpoint names, ties, persistent buffers and the canary's
        reference come from it, and everything about LoRA. Nothing of it is ever written. Call once, before the first
        push, and again after wrapping or replacing the model itself."""
        self._require_open()
        self._trainer.bind(model)
        self._base.forget()

    @overload
    def push(self, named: Named, *, wait: Literal[True] = True, **options: Unpack[PushArguments]) -> Receipt: ...
    @overload
    def push(self, named: Named, *, wait: Literal[False], **options: Unpack[PushArguments]) -> PendingPush: ...
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
        canary_limit: float | Literal["auto"] = "auto",
    ) -> Receipt | PendingPush:
        """Bring every engine to these weights, verified, or leave every engine as it was.

        Args:
            named: `(name, tensor)` pairs, any iterable, read once; any device, dtype and stride.
            version: default the highest ever issued plus one.
            mode: "full" (every tensor as it stands) for a model without LoRA. With LoRA "merged" (effective weights),
                "base" (the frozen weights, adapters in the engine stay) or "adapter" (A and B as a new version of the
                engine's adapter). "auto" chooses by the capability table and says why in the receipt.
            verify: "off", "transfer", "weights" or "outputs"; or an iterable of level names
                (`bridge.model.levels.LEVELS`). Default "outputs" with a bound model, else "weights".
            partial: a subset is meant; what is not sent stays as it is. No canary then, unless `verify` asks for one:
                the trainer's other tensors need not be what the engine holds.
            inflight: what happens to running requests: "drain", "abort" or "keep", as far as the engine can.
            kv: "reset" or "keep" the engines' KV and prefix caches.
            allow_nonfinite: let NaN and infinity pass.
            wait: False returns a PendingPush as soon as the snapshot is sealed.
            timeout_s: deadline of the snapshot and the canary's reference, and again of everything after them.
            canary_limit: mean |difference| in nats up to which the canary passes. "auto" is the floor of the engine's
                dtypes, raised by the measured noise of losses that the engine's configuration declares.

        Returns the Receipt (a PendingPush with `wait=False`). When it returns or raises, the tensors may change.

        Raises ConfigError (Busy, LeaseHeld, Closed), IntegrityError (which tensor, where, expected, got) and
        StaleVersion before any engine was written; PushAborted *from* the cause after that, every engine put back;
        EngineQuarantined or PeerLost when an engine was lost between the commit and its serving (the others serve).
        """
        given = PushArguments(
            version=version, mode=mode, verify=verify, partial=partial, inflight=inflight, kv=kv,
            allow_nonfinite=allow_nonfinite, timeout_s=timeout_s, canary_limit=canary_limit,
        )  # fmt: skip
        settings = check_settings(given, bound=self._trainer.bound, timeout_s=self.config.push_timeout_s)
        if verify is None and not self._trainer.bound and not self._warned:
            self._warned = True
            log.warning("%s: no model is bound, so no canary runs; b.bind(model) adds it", self.name)
        self._require_open(to_push=True)
        if not self._pushing.acquire(blocking=False):
            raise Busy(
                "another push of this process is in flight",
                where=self.name,
                expected="one push at a time",
                got="a second one",
                remedy="wait for its receipt",
            )
        try:
            pending = self._push(named, settings)
        finally:
            self._pushing.release()
        return wait_for_receipt(pending) if wait else pending

    def collect(self, **options: Unpack[PushArguments]) -> Collection:
        """Collect buckets, or a stream that does not fit into memory at once, into one push.

            with b.collect(version=7) as push:
                for bucket in buckets:
                    push.add(bucket)
            push.receipt

        Holds one copy of what was added in host memory until its snapshot is taken. Nothing is asked of the engines
        before the block ends; a block that raises is no push.

        Args:
            options: those of `push`, without `wait`.
        """
        return Collection(self, options)

    def keep(self, named: Named) -> list[tuple[str, torch.Tensor]]:
        """Copy named tensors to host memory, for a push that comes later. Raises as `Collection.add`."""
        self._require_open()
        return self._trainer.keep(named)

    def _push(self, named: Named, settings: PushSettings) -> PendingPush:
        """Choose the mode and send; where "auto" chose an adapter that the engines then refuse, merged weights."""
        if self._engine_infos is None:  # what does not change while an engine lives: its limits
            self._engine_infos = self.status().engines
        limits = [info.lora for info in self._engine_infos]
        choice = self._trainer.choose(settings.mode, limits)
        if choice.mode == "full":
            return self._send(named, settings, choice)
        if not isinstance(named, Mapping | Sequence):  # it may have to be read twice
            with contextlib.suppress(TypeError):  # left for `collect` to refuse
                named = list(named)
        try:
            return self._send(named, settings, choice)
        except (UnsupportedLora, UnexpectedTensor, EngineQuarantined) as error:
            if settings.mode != "auto" or choice.mode != "adapter":
                raise
            merged = self._trainer.choose("merged", limits)
            reason = f"merged weights, because the adapter was refused: {error}"
            try:
                return self._send(named, settings, ModeChoice("merged", reason, merged.notes))
            except MissingTensor as m:  # only the adapter's tensors came, which would have done for an adapter
                remedy = f"{m.remedy}; as an adapter it was refused: {error}"
                raise msgspec.structs.replace(ErrorInfo.of(m), remedy=remedy).rebuild() from error

    def _send(self, named: Named, settings: PushSettings, choice: ModeChoice) -> PendingPush:
        """Do everything of a push that needs this process: names, plan, snapshot, seal, and the hand-over."""
        started = time.perf_counter()
        settings = msgspec.structs.replace(settings, mode=choice.mode, reason=choice.reason)
        deadline = Deadline.after(settings.timeout_s)
        snapshot = self._trainer.collect(named, partial=settings.partial, mode=choice.mode, deadline=deadline)
        self._session.refuse_shared(snapshot.storages)
        agreed = self._agree(snapshot, settings.partial and snapshot.adapter is None)
        slot, doubt = self._begin(agreed, settings.version, over_base=snapshot.adapter is not None)
        planned_at, deadline = time.perf_counter(), Deadline.after(settings.timeout_s)
        try:
            written = self._write(snapshot, agreed, slot, settings, deadline)
            reference, base, settings, missed = self._reference(snapshot, agreed, settings, deadline)
            doubt = (*doubt, *self._trainer.doubts(snapshot), *missed)
            submit = SubmitRequest(
                version=slot.version,
                root=written.seal.root,
                settings=settings,
                phases={"plan": planned_at - started, "snapshot": time.perf_counter() - planned_at},
                wire_nbytes=written.nbytes,
                notes=(*choice.notes, *snapshot.notes, *doubt),
                reference=reference,
                base=base,
                proven=not doubt,
            )
            self._call(submit, Accepted)
        except BaseException:
            # what went wrong is worth more than a second failure on the way out; an unsealed push is dropped anyway
            with contextlib.suppress(BridgeError):
                self._call(CancelRequest(slot.version), Accepted)
            raise
        if choice.mode == "base" and not settings.partial:
            self._base.note_pushed(slot.version, snapshot)
        if snapshot.merged:
            self._base.note_merged(slot.version)
        return PendingPush(self._session, slot.version, settings.timeout_s)

    def _write(
        self, snapshot: Snapshot, agreed: _Agreed, slot: _Slot, settings: PushSettings, deadline: Deadline
    ) -> Written:
        written = self._trainer.write(
            snapshot,
            agreed.arena,
            slot.index,
            slot.base,
            version=slot.version,
            allow_nonfinite=settings.allow_nonfinite,
            threads=self._threads,
            deadline=deadline,
            unused=agreed.planned.unused,
        )
        if agreed.planned.partners:
            require_equal_partners(agreed.planned, written.seal)
        return written

    def _agree(self, snapshot: Snapshot, partial: bool) -> _Agreed:
        """Find the plan for this layout: the last one while nothing changed, else every engine plans it."""
        kind = snapshot.adapter is not None
        last = self._agreed.get(kind)
        if last is not None and last.layout is snapshot.layout and last.partial == partial:
            return last
        unsent = self._trainer.unsent(snapshot) if partial else ()
        request = PlanRequest(snapshot.layout.tensors, partial, self._trainer.bound, snapshot.adapter, unsent=unsent)
        try:
            planned = self._plan(request, snapshot)
        except UnexpectedTensor as error:
            raise self._trainer.explain(error) from error
        arena = last.arena if last is not None else None
        if arena is None or str(arena.path) != planned.path:
            if arena is not None:
                self._agreed.pop(kind, None)  # engines have left it, whether or not the next one can be opened
                arena.close()
            arena = Arena.open(Path(planned.path), validate(planned.manifest), writable=True)
        agreed = self._agreed[kind] = _Agreed(snapshot.layout, partial, planned, arena)
        return agreed

    def _plan(self, request: PlanRequest, snapshot: Snapshot) -> Planned:
        """Ask for a plan; where engines have no place for some tensors, show first that the bound model's logits do not
        depend on them. Raises UnexpectedTensor."""
        answer = self._call(request, PlanAnswer, self.config.plan_timeout_s)
        if isinstance(answer, Unproven):
            self._trainer.prove_independent(answer.names, snapshot, ", ".join(answer.engines))
            request = msgspec.structs.replace(request, independent=answer.names)
            answer = self._call(request, PlanAnswer, self.config.plan_timeout_s)
        return expect(answer, Planned, self.name)

    def _begin(self, agreed: _Agreed, version: int | None, *, over_base: bool) -> tuple[_Slot, tuple[str, ...]]:
        """Ask for a slot. An adapter is only right over the base that it was trained on, so before the first one the
        engines' weights are compared with it, bit for bit; the second answer says why that could not be done."""
        doubt = self._prove_base() if over_base and not self._base.holds else None
        slot = self._ask_slot(agreed, version, over=self._base.over if over_base else None)
        if slot is None:  # somebody has pushed other weights, or gone back, since
            doubt = self._prove_base()
            slot = self._ask_slot(agreed, version, over=self._base.over)
        if slot is None:
            raise Busy(
                "somebody else pushes weights at the same time",
                where=self.name,
                expected="the weights that were compared with the adapter's base",
                got="others, since",
                remedy="push again",
            )
        return slot, () if doubt is None else (doubt,)

    def _prove_base(self) -> str | None:
        # the callables are handed in for the call only: a check that kept them would keep this Bridge alive
        return self._base.prove(self._compare, lambda: self.status().weights)

    def _ask_slot(
        self, agreed: _Agreed, version: int | None, *, compare: bool = False, over: int | None = None
    ) -> _Slot | None:
        """A free slot; None when other weights are served than those that the push `over` brought."""
        holder = f"pid {os.getpid()} on {socket.gethostname()}"
        try:
            begun = self._call(BeginRequest(agreed.planned.plan, version, holder, compare, over), Begun)
        except ProtocolError:  # another trainer has had another layout planned since
            _close_arenas(self._agreed)
            raise
        return None if begun.slot is None else _Slot(begun.version, begun.slot, begun.base)

    def _compare(self, snapshot: Snapshot) -> Compared:
        """Bring a snapshot into a free slot and have it compared with the weights that every engine serves."""
        agreed = self._agree(snapshot, False)
        slot = self._ask_slot(agreed, None, compare=True)
        if slot is None:
            raise ProtocolError(
                "no slot to compare in", where=self.name, expected="a free slot", got="none", remedy="push again"
            )
        try:
            settings = PushSettings(allow_nonfinite=True, timeout_s=self.config.push_timeout_s)
            written = self._write(snapshot, agreed, slot, settings, Deadline.after(settings.timeout_s))
            return self._call(CompareRequest(written.seal.root), Compared, self.config.plan_timeout_s)
        except BaseException:
            with contextlib.suppress(BridgeError):
                self._call(CancelRequest(slot.version), Accepted)
            raise

    def _reference(
        self, snapshot: Snapshot, agreed: _Agreed, settings: PushSettings, deadline: Deadline
    ) -> tuple[Reference | None, Reference | None, PushSettings, tuple[str, ...]]:
        """Compute the trainer's canary (for an adapter also the base's), if it is wanted. Where it is the default and
        the model cannot give one, the levels of the weights are left and the last answer says why."""
        if settings.canary is False:
            return None, None, settings, ()
        if settings.canary is None and not any(info.can_generate for info in self._engine_infos or ()):
            return None, None, msgspec.structs.replace(settings, verify="weights", levels=LEVELS_OF["weights"]), ()
        try:
            longest = [i.max_prompt for i in self._engine_infos or () if i.max_prompt is not None]
            shortest = min(longest, default=None)
            roundings = self._roundings(agreed)
            found = self._trainer.reference(snapshot, shortest, settings.mode, roundings, deadline=deadline)
            return *found, settings, ()
        except ConfigError as error:
            if settings.canary:
                raise
            return None, None, msgspec.structs.replace(settings, levels=LEVELS_OF["weights"]), (f"no canary: {error}",)

    def _roundings(self, agreed: _Agreed) -> set[Rounding]:
        """Find what explains the losses that engines declare."""
        weights = self._agreed.get(False, agreed).planned.manifest
        codes = {tensor.dtype for tensor in weights.tensors} & CODES
        known = codes.pop() if len(codes) == 1 and codes <= ROUNDS_TO else None
        found = {info.losses.rounding(known) for info in self._engine_infos or ()}
        return {rounding for rounding in found if rounding is not None}

    # ---- questions --------------------------------------------------------------------------------------------------

    def status(self) -> DaemonStatus:
        """Tell engines, versions and whether a push is in flight. Answered at once, also during a push; an engine that
        does not answer is shown as it was last known."""
        return self._ask(StatusRequest(), DaemonStatus)

    def health(self, timeout_s: float = 120.0) -> HealthReport:
        """Examine the live run: actors, versions, the last receipt, a fresh canary against the stored reference, a
        fresh read-back against the arena, orphans.

        Blocks at most `timeout_s` seconds; writes nothing. It waits for no push: engines that one occupies are not
        examined, and the report says so.
        """
        report = msgspec.convert(self._ask(HealthRequest(), HealthFacts, timeout_s).facts, HealthReport)
        return HealthReport(report.name, (*report.checks, orphaned_memory(self.config.shm_dir)))

    def history(self, last: int = 20) -> list[dict[str, Any]]:
        """The newest receipts from the journal, as plain data, oldest first."""
        return list(self._ask(HistoryRequest(last), History).receipts)

    def explain(self, name: str) -> list[dict[str, str]]:
        """Tell where a canonical tensor goes on every engine rank: parameter, region, strategy and why. Raises
        NotFound."""
        return list(self._ask(ExplainRequest(name), Explained).rows)

    def rollback(self, timeout_s: float = 300.0) -> Receipt:
        """Serve the version before the last committed one again, verified by bits or probes. One level; version numbers
        go on from the highest ever issued. Raises StaleVersion when there is none, Busy during a push."""
        self._require_open(to_push=True)
        self._base.forget()
        finished = self._call(RollbackRequest(timeout_s), Finished, timeout_s + CALL_TIMEOUT_S)
        version = finished.receipt.version if finished.receipt else 0
        return receipt_or_raise(finished, version)

    def close(self) -> None:
        """Give up the lease and what this process holds. Idempotent. A daemon goes on (`weighbridge down` stops it); an
        attached engine stays the user's. Later calls raise Closed. In a forked child nothing of the parent is touched.

        Blocks for as long as a running push and the engines' own deadlines take. Raises ConfigError, and closes
        nothing, in a thread that runs the event loop of the attached engine: it would wait for itself.
        """
        if self._closed:
            return
        if not self._session.forked:
            self._session.refuse_caller()
        self._closed = True
        if self._finalizer.detach() is not None:
            _let_go(self._session, self._trainer, self._agreed)

    def shutdown(self) -> None:
        """Close this Bridge and stop its daemon: engines gracefully, shared memory unlinked, and the local Ray if we
        started it and nothing else of ours runs there. `weighbridge down` does the same. For `attach`, and in a forked
        child, no more than `close`."""
        self.close()
        self._session.shutdown()

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _ask(self, request: ToCoordinator, reply: type[T], timeout_s: float = CALL_TIMEOUT_S) -> T:
        self._require_open()
        return self._call(request, reply, timeout_s)

    def _call(self, request: ToCoordinator, reply: type[T], timeout_s: float = CALL_TIMEOUT_S) -> T:
        return self._coordinator.call(request, reply, Deadline.after(timeout_s))

    def _require_open(self, to_push: bool = False) -> None:
        if self._closed:
            remedy = "bridge.connect(name) or bridge.attach opens a new one"
            raise Closed(
                "this Bridge was closed", where=self.name, expected="an open Bridge", got="a closed one", remedy=remedy
            )
        if to_push:
            self._session.hold_lease()
        else:
            self._session.require_usable()


def _let_go(session: Session, trainer: TrainerPort, agreed: dict[bool, _Agreed]) -> None:
    """Close what a Bridge holds. In a forked child all of it is the parent's, and nothing is closed."""
    if session.forked:
        return
    trainer.close()
    _close_arenas(agreed)
    session.close()


def _close_arenas(agreed: dict[bool, _Agreed]) -> None:
    for each in agreed.values():
        each.arena.close()
    agreed.clear()


def _dropped(session: Session, trainer: TrainerPort, agreed: dict[bool, _Agreed]) -> None:
    """Close what a Bridge held that was collected without `close`; waits a few seconds for that.

    On a thread of its own: the collector may run in the middle of a call of the engine, under a lock that this needs.
    """
    if session.forked or session.closed:
        return

    def release() -> None:
        try:
            _let_go(session, trainer, agreed)
        except BridgeError as error:
            log.warning("%s was dropped, and could not be closed: %s", session.name, error)

    thread = threading.Thread(target=release, name=f"weighbridge-release-{session.name}", daemon=True)
    thread.start()
    with contextlib.suppress(ConfigError):  # this thread runs the engine's event loop, which the release needs
        session.refuse_caller()
        thread.join(DROPPED_WAIT_S)
