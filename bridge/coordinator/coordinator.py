"""The daemon's half of a push: who may push, which slot, and what every engine does with a sealed version.

It owns the arena files, the ledger and the fan-out to the engine services, and never sees a tensor's value. It runs in
the TrainerActor (or in the user's process for `bridge.attach`), so a push that has been sealed outlives the trainer.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bridge.config import Config
from bridge.coordinator import manifest_agreement
from bridge.coordinator.layouts import Plans
from bridge.coordinator.receipts import receipt_of, scope_of
from bridge.coordinator.reports import LEVELS_OF, Verdict, unserved
from bridge.coordinator.two_phase_commit import Fleet, Target
from bridge.coordinator.versions import (
    ROLLBACK,
    Held,
    OpenPush,
    Plan,
    References,
    Served,
    after,
    mode_of_reload,
    to_reload,
)
from bridge.errors import (
    BridgeError,
    Busy,
    Closed,
    ConfigError,
    NotFound,
    ProtocolError,
    StaleVersion,
)
from bridge.journal.ledger import EngineState, Ledger
from bridge.model.lora_format import split
from bridge.model.receipt import Receipt
from bridge.ports import EnginePort
from bridge.protocol.codec import ErrorInfo
from bridge.protocol.coordinator_messages import (
    Ask,
    BeginRequest,
    Begun,
    CancelRequest,
    CloseRequest,
    Compared,
    CompareRequest,
    DaemonIs,
    Done,
    Explained,
    ExplainRequest,
    Finished,
    FromCoordinator,
    Health,
    HealthRequest,
    History,
    HistoryRequest,
    Options,
    Planned,
    PlanRequest,
    Refused,
    RollbackRequest,
    SubmitRequest,
    ToCoordinator,
    WaitRequest,
)
from bridge.protocol.deadline import Deadline
from bridge.shm.mailbox import Mailbox
from bridge.shm.orphans import clean_orphans

log = logging.getLogger(__name__)

HEALTH_TRIES = 5
COMPARE_TIMEOUT_S = 120.0
LEASE_GRACE_S = 2.0
"""How long an unsubmitted push is kept after its trainer's lease was found free: a trainer that is just connecting."""


class Coordinator:
    """One per daemon. `handle` may be called from several threads; pushes run one at a time on their own thread."""

    def __init__(
        self,
        name: str,
        engines: Sequence[EnginePort],
        ledger: Ledger,
        *,
        node: str,
        shm_dir: Path | None = None,
        start_timeout_s: float = Config().start_timeout_s,
    ) -> None:
        if not engines:
            raise ConfigError(
                "a bridge without engines has nobody to push to", where=name, remedy="attach or launch an engine first"
            )
        self.name = name
        self.ledger = ledger
        self._earlier = ledger.committed  # by a daemon of this name before us
        self.node = node
        self._shm_dir = shm_dir
        self._lock = threading.RLock()
        self._finished = threading.Condition(self._lock)
        self._closed = False
        self._committed: Served | None = None
        self._previous: Served | None = None
        self._reloads = 0
        self._nonce = secrets.token_hex(3)  # an engine remembers adapter names longer than a journal lasts
        self._push: OpenPush | None = None
        self._results: dict[int, Finished] = {}
        self._references: dict[int, References] = {}
        self._epoch = 1
        self._runner: threading.Thread | None = None
        self.fleet = Fleet(engines)
        self._plans = Plans(name, self.fleet, ledger.path, shm_dir)
        starting = Deadline.after(start_timeout_s)
        infos = self.fleet.hello(starting)
        for info in infos:
            if info.node != node:
                raise ConfigError(
                    "an engine on another node cannot be reached yet",
                    where=info.id,
                    expected=f"node {node}, where the arena lies",
                    got=f"node {info.node}",
                    remedy="start the engine on the trainer's node",
                )
        clean_orphans(shm_dir)
        self._mailbox = Mailbox.create(name, sum(info.ranks for info in infos), directory=shm_dir, journal=ledger.path)
        try:
            self.fleet.assign_pages(str(self._mailbox.path), name, starting)
            left = self.fleet.serve_lora()
            if left is not None:  # by a bridge before this one; its bytes are not ours, but it is what is served
                self._committed = Served(0, None, None, left)
        except BaseException:
            self._mailbox.close()
            self._mailbox.unlink()
            raise

    # ---- requests ---------------------------------------------------------------------------------------------------

    def handle(self, request: ToCoordinator) -> FromCoordinator:
        """Answer one request. Errors of our tree come back as Refused; anything else is a bug and comes back as one."""
        try:
            return self._answer(request)
        except BridgeError as error:
            return Refused(ErrorInfo.of(error))
        except Exception as error:  # process boundary: the client must get an answer whatever broke here
            log.exception("request %s failed", type(request).__name__)
            return Refused(ErrorInfo.of(error))

    def _answer(self, request: ToCoordinator) -> FromCoordinator:
        if self._closed and not isinstance(request, CloseRequest | WaitRequest):
            raise Closed("this daemon was closed", where=self.name)
        match request:
            case Ask():
                return self._describe()
            case PlanRequest():
                return self._make_plan(request)
            case BeginRequest():
                return self._begin(request)
            case CompareRequest():
                return self._compare(request)
            case CancelRequest():
                return self._cancel(request)
            case SubmitRequest():
                return self._submit(request)
            case WaitRequest():
                return self._wait(request)
            case RollbackRequest():
                return self._rollback(request)
            case HealthRequest():
                return Health(self._health_facts(request))
            case HistoryRequest():
                return History(tuple(self.ledger.receipts(request.last)))
            case ExplainRequest():
                return self._explain(request)
            case CloseRequest():
                self.close()
                return Done()

    def _describe(self) -> DaemonIs:
        with self._lock:
            return DaemonIs(
                name=self.name,
                engines=tuple(self.fleet.hello(Deadline.after(30), strict=False)),
                committed=self._committed.version if self._committed else None,
                highest=self.ledger.highest,
                epoch=self._epoch,
                node=self.node,
                pid=os.getpid(),
                busy=self._push.version if self._push else None,
                **_served_now(self._committed),
            )

    # ---- plan -------------------------------------------------------------------------------------------------------

    def _make_plan(self, request: PlanRequest) -> Planned:
        with self._lock:
            self._refuse_when_busy()
            plan = self._plans.serving(request)
            if plan is None:
                plan = self._new_plan(request)
            return Planned(plan.id, self._epoch, plan.arena.manifest, str(plan.arena.path))

    def _new_plan(self, request: PlanRequest) -> Plan:
        deadline = Deadline.after(request.timeout_s)
        plan = self._plans.make(request, self._held(), deadline)
        if plan.adapter is None:
            carried = self._plans.carry(plan, self._committed, deadline)
            if carried is not self._committed:
                self._committed, self._previous = carried, None
        self._plans.use(plan)
        self._plans.drop_unheld(self._held())
        return plan

    def _held(self) -> tuple[Held, ...]:
        """The bytes of every version that can be returned to."""
        return tuple(h for served in (self._committed, self._previous) if served is not None for h in served.held)

    # ---- begin, cancel, submit, wait --------------------------------------------------------------------------------

    def _refuse_when_busy(self) -> None:
        push = self._push
        if push is None:
            return
        holder = self.ledger.holder
        # who pushes holds the lease: once another process has it, the one that began is gone
        gone = time.monotonic() - push.since > LEASE_GRACE_S if holder is None else str(holder) != push.holder
        if not push.submitted and gone:
            log.warning("push %d was begun by %s, which is gone; dropped", push.version, push.holder)
            self._drop_open_push()
            return
        raise Busy(
            "another push is in flight",
            where=self.name,
            got=f"version {push.version} by {push.holder}",
            remedy="wait for its receipt before the next push",
        )

    def _drop_open_push(self) -> None:
        push, self._push = self._push, None
        if push is not None and push.version:
            self._note("aborted", version=push.version, reason="dropped before it was sealed")

    def _note(self, kind: str, **fields: object) -> str | None:
        """A journal entry that nothing depends on: the trainer must not be told that a push failed because of it."""
        try:
            self.ledger.record(kind, **fields)
        except BridgeError as error:
            log.error("the journal lacks an entry (%s): %s", kind, error)
            return f"the journal lacks an entry ({kind}): {error}"
        return None

    def _begin(self, request: BeginRequest) -> Begun:
        with self._lock:
            self._refuse_when_busy()
            plan = self._plans.current(request.plan)
            if plan.adapter is not None:
                self.fleet.require_serving(self._committed.version if self._committed is not None else None)
            if request.over is not None and request.over != self._weights_version():
                return Begun(0, None, None)
            version = 0 if request.compare else self.ledger.issue(request.version)
            kept = self._committed.of(plan) if self._committed is not None else None
            taken = kept.slot if kept is not None else None
            slot = next(s for s in range(plan.arena.slots) if s != taken)
            self._previous = None
            self._plans.drop_unheld(self._held())
            plan.slots.pop(slot, None)
            self._push = OpenPush(version, plan, slot, request.holder)
            return Begun(version, slot, taken)

    def _weights_version(self) -> int | None:
        weights = self._committed.weights if self._committed is not None else None
        return weights.version if weights is not None else None

    def _compare(self, request: CompareRequest) -> Compared:
        with self._lock:
            push = self._push
            if push is None or push.version != 0 or push.submitted:
                raise ProtocolError("nothing was begun to compare with", where=self.name)
            seal = push.plan.arena.seal_of(push.slot)
            if seal is None or seal.root != request.root:
                raise ProtocolError("the slot is not sealed as announced", where=self.name)
            self._push = None
            kept = self._committed.of(push.plan) if self._committed is not None else None
            if kept is None:
                return Compared(False)
            differing = manifest_agreement.differing_names(push.plan.arena, kept.slot, push.slot)
            if not differing:  # what was verified once may have been written to since
                differing = self.fleet.same_weights(push.plan.id, push.slot, Deadline.after(COMPARE_TIMEOUT_S))
            return Compared(True, differing, self._weights_version())

    def _cancel(self, request: CancelRequest) -> Done:
        with self._lock:
            if self._push is not None and self._push.version == request.version and not self._push.submitted:
                self._drop_open_push()
            return Done()

    def _submit(self, request: SubmitRequest) -> Done:
        with self._lock:
            push = self._push
            if push is None or push.version != request.version or push.submitted:
                raise ProtocolError("this push was not begun", got=f"version {request.version}")
            seal = push.plan.arena.seal_of(push.slot)
            if seal is None or seal.version != request.version or seal.root != request.root:
                raise ProtocolError("the version is not sealed as announced", where=f"version {request.version}")
            self._refuse_half_a_change(push, request.options)
            self.ledger.record(
                "sealed", version=push.version, root=request.root.hex(), slot=push.slot, arena=str(push.plan.arena.path)
            )
            push.plan.slots[push.slot] = push.version
            push.submitted = True
            if request.reference is not None:
                self._references[push.version] = References(request.reference, request.base)
            self._start(lambda: self._run(push, request))
            return Done()

    def _refuse_half_a_change(self, push: OpenPush, options: Options) -> None:
        """Weights that take the place of an adapter must all come: what is not sent would lose its delta."""
        now = self._committed
        takes_away = push.plan.adapter is None and options.mode != "base" and now is not None and now.name is not None
        if takes_away and options.partial:
            raise ConfigError(
                "a subset of the weights cannot take the place of an adapter that is served",
                where=f"the adapter {now.name if now else ''}",
                expected="all weights, or the base alone",
                got=f"partial=True, mode={options.mode!r}",
                remedy="push all weights once, or mode='base' or 'adapter'",
            )

    def _start(self, run: Callable[[], None]) -> None:
        self._runner = threading.Thread(target=run, name=f"weighbridge-{self.name}", daemon=True)
        self._runner.start()

    def _wait(self, request: WaitRequest) -> Finished:
        deadline = Deadline.after(request.timeout_s)
        with self._finished:
            while request.version not in self._results:
                if deadline.expired:
                    if self._push is None or self._push.version != request.version:
                        raise NotFound("no such push", where=self.name, got=f"version {request.version}")
                    return Finished(None)
                self._finished.wait(deadline.remaining_s)
            return self._results[request.version]

    # ---- one push ---------------------------------------------------------------------------------------------------

    def _run(self, push: OpenPush, request: SubmitRequest) -> None:
        push.mode = request.options.mode
        push.keeps_lora = push.mode == "base"
        try:
            result = self._push_sealed(push, request)
        except Exception as error:  # thread boundary: a waiting trainer must get an answer whatever broke here
            log.exception("push %d failed", push.version)
            self.fleet.put_back(self._committed, f"an error of ours: {error}")
            result = Finished(None, ErrorInfo.of(error), aborted=True, serving=self.fleet.serving())
        with self._finished:
            self._results[push.version] = result
            for old in sorted(self._results)[:-8]:
                del self._results[old]
            self._push = None
            self._finished.notify_all()

    def _target(self, push: OpenPush, options: Options, root: bytes) -> Target:
        now = self._committed
        kept = now.of(push.plan) if now is not None else None
        references = self._references.get(push.version, References())
        references = references.for_slot_of(push.plan)
        seal = push.plan.arena.seal_of(push.slot)
        return Target(
            plan=push.plan.id,
            slot=push.slot,
            version=push.version,
            sealed=seal.version if seal is not None else push.version,
            root=root,
            options=options,
            reference=references.served,
            base_reference=references.base,
            changed=manifest_agreement.changed(push.plan.arena, kept.slot, push.slot) if kept is not None else None,
            previous=kept.slot if kept is not None else None,
            base=now.version if now else None,
            adapter=self._lora_name(push),
            load_lora=push.plan.adapter is not None,
        )

    def _lora_name(self, push: OpenPush) -> str | None:
        """What "current" means once this push serves: the adapter that it brings, under a name that was never used; the
        one before over new base weights; none over weights that have it merged in."""
        if push.plan.adapter is not None:
            self._reloads += push.holder == ROLLBACK
            again = f"-again{self._reloads}" if push.holder == ROLLBACK else ""
            return f"{self.name}-v{push.version}-{self._nonce}{again}"
        now = self._committed
        if now is None or now.name is None or not push.keeps_lora:
            return None
        return now.name if self.fleet.hold_lora(now.name, Deadline.after(30)) else None

    def _push_sealed(self, push: OpenPush, request: SubmitRequest) -> Finished:
        target, before = self._target(push, request.options, request.root), self._committed
        verdict = self.fleet.advance(target, before, on_commit=lambda: self._commit(push, target.adapter))
        if verdict.verified and not request.base_proven:
            verdict.verified = "partial"
        if verdict.error is None and before is not None and before.name is not None and target.adapter is None:
            gone = f"the adapter {before.name} is not served any more: these weights took the place of its base"
            verdict.notes = (*verdict.notes, gone)
        receipt = receipt_of(push, request, target, verdict)
        unwritten = self._note("receipt", version=push.version, receipt=receipt.to_dict())
        if unwritten is not None:
            receipt = msgspec.structs.replace(receipt, notes=(*receipt.notes, unwritten))
        if verdict.error is None:
            self._journal_quarantines(verdict)
            return self._committed_as(receipt)
        self._note("aborted", version=push.version, reason=str(verdict.error))
        self._journal_quarantines(verdict)
        with self._lock:
            push.plan.slots.pop(push.slot, None)
            self._references.pop(push.version, None)
        return Finished(receipt, ErrorInfo.of(verdict.error), aborted=verdict.touched, serving=self.fleet.serving())

    def _committed_as(self, receipt: Receipt) -> Finished:
        lost = unserved(receipt.version, receipt.engines)
        return Finished(receipt, None if lost is None else ErrorInfo.of(lost), serving=self.fleet.serving())

    def _journal_quarantines(self, verdict: Verdict) -> None:
        for report in verdict.reports:
            if report.state == EngineState.QUARANTINED.value:
                self._note("quarantined", engine=report.id, reason=report.error or "")

    def _commit(self, push: OpenPush, name: str | None) -> None:
        """The point of no return: journalled before any engine resumes; nothing serves an unrecorded version."""
        with self._lock:
            self.ledger.record("committed", version=push.version, engines=tuple(self.fleet.serving()))
            self._advance_to(after(push, name, self._committed))

    def _advance_to(self, served: Served) -> None:
        self._previous, self._committed = self._committed, served
        keep = {served.version, self._previous.version if self._previous else -1}
        self._references = {v: ref for v, ref in self._references.items() if v in keep}

    # ---- rollback, questions, end -----------------------------------------------------------------------------------

    def _rollback(self, request: RollbackRequest) -> FromCoordinator:
        with self._lock:
            self._refuse_when_busy()
            back, now = self._previous, self._committed
            if back is None or now is None:
                raise StaleVersion(
                    "there is no previous version to return to",
                    where=self.name,
                    expected="the version before the last committed one, one level deep",
                    got=f"committed: {now.version if now else None}",
                )
            held = to_reload(back, now, self.name)
            push = OpenPush(back.version, held.plan, held.slot, ROLLBACK, submitted=True)
            push.keeps_lora = back.name is not None
            self._push = push
        verify = "outputs" if back.version in self._references else "weights"
        mode = mode_of_reload(back, held)
        options = Options(verify, LEVELS_OF[verify], mode=mode, reason="rollback", timeout_s=request.timeout_s)
        seal = held.plan.arena.seal_of(held.slot)
        try:
            if seal is None:
                raise ProtocolError("the previous version is no longer sealed", got=f"version {back.version}")
            submit = SubmitRequest(back.version, seal.root, options, {}, 0)
            target = self._target(push, options, seal.root)
            served = Served(back.version, back.weights, back.adapter, target.adapter, back.mode)
            verdict = self.fleet.advance(target, now, on_commit=lambda: self._commit_rollback(served))
            receipt = receipt_of(push, submit, target, verdict)
            self._note("receipt", version=back.version, receipt=receipt.to_dict())
        except Exception as failure:  # as in `_run`: whatever broke, engines are not left paused
            self.fleet.put_back(now, f"the rollback failed: {failure}")
            raise
        finally:
            with self._lock:
                self._push = None
        if verdict.error is None:
            return self._committed_as(receipt)
        error = ErrorInfo.of(verdict.error)
        return Finished(receipt, error, aborted=verdict.touched, serving=self.fleet.serving())

    def _commit_rollback(self, served: Served) -> None:
        with self._lock:
            self.ledger.record("rolled_back", version=served.version, engines=tuple(self.fleet.serving()))
            self._committed, self._previous = served, None

    def _explain(self, request: ExplainRequest) -> Explained:
        with self._lock:
            plan = self._plans.weights
            of_lora = self._plans.adapter
            if of_lora is not None and (plan is None or split(request.name) is not None):
                plan = of_lora
            if plan is None:
                raise NotFound("nothing was pushed yet, so there is no plan to explain", where=self.name)
        rows = self.fleet.explain(plan.id, request.name, Deadline.after(60))
        if not rows and not any(request.name in (info.name, *info.aliases) for info in plan.tensors):
            raise NotFound(
                "no such tensor in the plan",
                where=request.name,
                expected=f"a checkpoint name, such as {plan.tensors[0].name}",
                remedy="the manifest holds what the last push sent",
            )
        return Explained(rows)

    def _health_facts(self, request: HealthRequest) -> dict[str, object]:
        deadline = Deadline.after(request.timeout_s)
        engines: list[dict[str, object]] | None = None
        for _ in range(HEALTH_TRIES):
            with self._lock:
                held, push = self._committed, self._push
                references = self._references.get(held.version, References()) if held else References()
            if held is None or held.weights is None:
                break
            found = self.fleet.examine(held, held.weights, references.served, references.with_lora, deadline)
            with self._lock:
                # a push that was committed meanwhile makes a report about the version before; look again
                if self._committed is held:
                    engines = found
                    break
        last = self.ledger.receipts(1)
        return {
            "name": self.name,
            "committed": held.version if held else None,
            "earlier": self._earlier if held is None or held.version == 0 else None,
            "highest": self.ledger.highest,
            "busy": push.version if push else None,
            "watched": list(scope_of(held.weights.plan)) if held and held.weights else [],
            "adapter": held.name if held else None,
            "last_receipt": last[-1] if last else None,
            "engines": self.fleet.describe(deadline) if engines is None else engines,
        }

    def close(self) -> None:
        """Stop every engine gracefully and unlink the shared memory. Idempotent; waits for a running push."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            runner = self._runner
        if runner is not None and runner is not threading.current_thread():
            runner.join(timeout=60)
        self.fleet.close(Deadline.after(30))
        self._plans.close()
        self._mailbox.close()
        self._mailbox.unlink()
        self.ledger.close()


def _served_now(served: Served | None) -> dict[str, Any]:
    """What a client is told of the version that is served, besides its number."""
    if served is None:
        return {}
    weights, adapter = served.weights, served.adapter if served.name is not None else None
    return {
        "mode": served.mode,
        "weights": weights.version if weights is not None else None,
        "adapter": adapter.version if adapter is not None else None,
    }
