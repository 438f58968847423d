"""The coordinator: the daemon's half of a push. It decides who may push and into which slot, and runs sealed pushes.

It owns the arena files, the ledger and the fleet, and never sees a tensor's value. It runs in the TrainerActor (or in
the user's process for `bridge.attach`), so a push that has been sealed outlives the trainer.

Two rules keep it responsive. Whatever calls an engine runs on the owner thread, one job after the other. The lock
guards the open push and the results only, and is never held across such a call, so a status is answered at once while
a push plans, loads or hangs.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import msgspec

from bridge.coordinator.engines import Fleet
from bridge.coordinator.examination import examine
from bridge.coordinator.health import Examined, Facts, HealthReport, assess
from bridge.coordinator.layouts import Layouts
from bridge.coordinator.owner_thread import OwnerThread
from bridge.coordinator.push_run import PushRunner
from bridge.coordinator.reports import scope_of
from bridge.coordinator.rollback import find_rollback
from bridge.coordinator.unused_tensors import unproven_of
from bridge.coordinator.versions import AgreedPlan, Held, OpenPush, Served, Versions
from bridge.errors import BridgeError, Busy, Closed, ConfigError, DeadlineExceeded, NotFound, ProtocolError
from bridge.journal.ledger import Ledger
from bridge.model.lora_format import split
from bridge.ports import EnginePort
from bridge.protocol.codec import ErrorInfo
from bridge.protocol.coordinator_messages import (
    Accepted,
    BeginRequest,
    Begun,
    CancelRequest,
    CloseRequest,
    Compared,
    CompareRequest,
    DaemonStatus,
    Explained,
    ExplainRequest,
    Finished,
    FromCoordinator,
    HealthFacts,
    HealthRequest,
    History,
    HistoryRequest,
    Planned,
    PlanRequest,
    RollbackRequest,
    StatusRequest,
    SubmitRequest,
    ToCoordinator,
    Unproven,
    WaitRequest,
)
from bridge.protocol.deadline import Deadline
from bridge.protocol.rank_jobs import ExplainJob, RankExplanation
from bridge.shm.arena import Seal
from bridge.shm.mailbox import Mailbox
from bridge.shm.orphans import clean_orphans
from bridge.shm.seal import differing_tensors

log = logging.getLogger(__name__)

LEASE_GRACE_S = 2.0
"""How long an unsubmitted push is kept after its trainer's lease was found free: a trainer that is just connecting."""
RESULTS_KEPT = 8


class Coordinator:
    """One per daemon. `handle` may be called from several threads.

    Args:
        engines: ports of all engines; at least one, all on this node.
        start_timeout_s: how long all engines together may take to be claimed; quantised ones try out then whether
            weights can be brought into them.

    Raises ConfigError without engines or for one on another node, Busy for an engine that another bridge drives.
    """

    def __init__(
        self,
        name: str,
        engines: Sequence[EnginePort],
        ledger: Ledger,
        *,
        node: str,
        shm_dir: Path | None = None,
        start_timeout_s: float = 900.0,
    ) -> None:
        if not engines:
            raise ConfigError(
                "a bridge without engines has nobody to push to",
                where=name,
                expected="at least one engine",
                got="none",
                remedy="attach or launch an engine first",
            )
        self.name = name
        self.ledger = ledger
        self.node = node
        self._earlier = ledger.committed  # by a daemon of this name before us
        self._lock = threading.Lock()
        self._open: OpenPush | None = None
        self._results: dict[int, Future[Finished]] = {}
        self._planning = False
        self._closed = False
        self._fleet = Fleet(engines)
        starting = Deadline.after(start_timeout_s)
        for info in self._fleet.hello(starting):
            if info.node != node:
                raise ConfigError(
                    "an engine on another node cannot be reached yet",
                    where=info.id,
                    expected=f"node {node}, where the arena lies",
                    got=f"node {info.node}",
                    remedy="start the engine on the trainer's node",
                )
        clean_orphans(shm_dir)
        pages = sum(info.ranks for info in self._fleet.infos.values())
        self._mailbox = Mailbox.create(name, pages, directory=shm_dir, journal=ledger.path)
        try:
            self._fleet.claim(str(self._mailbox.path), name, starting)
        except BaseException:
            self._mailbox.close()
            self._mailbox.unlink()
            raise
        # all left with one adapter by a bridge before this one: its bytes are not ours, but it is served
        left = {info.adapter for info in self._fleet.infos.values()}
        self._versions = Versions(Served(0, None, None, left.pop()) if len(left) == 1 and None not in left else None)
        self._layouts = Layouts(name, self._fleet, ledger.path, shm_dir)
        self._runner = PushRunner(name, self._fleet, ledger, self._versions)
        self._owner = OwnerThread(f"weighbridge-{name}")

    # ---- requests ---------------------------------------------------------------------------------------------------

    def handle(self, request: ToCoordinator, deadline: Deadline) -> FromCoordinator:
        """Answer one request. Blocks for those that concern engines, at most until the deadline. Raises errors of our
        tree; anything else is a bug, and is raised as a BridgeError that says so."""
        if self._closed and not isinstance(request, CloseRequest | WaitRequest):
            raise Closed(
                "this daemon was closed",
                where=self.name,
                expected="a daemon that runs",
                got="a closed one",
                remedy="start or attach a new one",
            )
        try:
            match request:
                case BeginRequest():
                    return self._begin(request, deadline)
                case SubmitRequest():
                    return self._submit(request)
                case WaitRequest():
                    return self._wait(request)
                case StatusRequest():
                    return self._status()
                case PlanRequest():
                    return self._plan(request, deadline)
                case CompareRequest():
                    return self._owner.run(lambda: self._compare(request, deadline), deadline, "the comparison")
                case CancelRequest():
                    with self._lock:
                        if self._open is not None and self._open.version == request.version:
                            self._drop_open_push()
                    return Accepted()
                case RollbackRequest():
                    return self._roll_back(request, deadline)
                case HealthRequest():
                    return HealthFacts(msgspec.to_builtins(self._health(deadline)))
                case HistoryRequest():
                    return History(tuple(self.ledger.receipts(request.last)))
                case ExplainRequest():
                    return self._explain(request, deadline)
                case CloseRequest():
                    self.close()
                    return Accepted()
        except BridgeError:
            raise
        except Exception as error:  # process boundary: the client must get an answer whatever broke here
            log.exception("request %s failed", type(request).__name__)
            raise ErrorInfo.of(error).rebuild(self.name) from error

    def _status(self) -> DaemonStatus:
        """Tell the state as it is known now. Waits for no lock and no push, and for engines at most a moment."""
        push, served = self._open, self._versions.committed
        # while a push occupies the engines, its own reports are the newest facts
        occupied = self._planning or (push is not None and push.submitted is not None)
        lora = served.lora if served is not None and served.lora_name is not None else None
        return DaemonStatus(
            name=self.name,
            engines=tuple(self._fleet.infos.values()) if occupied else self._fleet.current_infos(),
            committed=served.version if served else None,
            highest=self.ledger.highest,
            node=self.node,
            pid=os.getpid(),
            busy=push.version if push else None,
            mode=served.mode if served else None,
            weights=self._versions.weights_version,
            adapter=lora.version if lora is not None else None,
        )

    # ---- plan, begin, submit, wait ----------------------------------------------------------------------------------

    def _plan(self, request: PlanRequest, deadline: Deadline) -> Planned | Unproven:
        with self._lock:
            self._refuse_when_busy()
            plan: AgreedPlan | Unproven | None = self._layouts.serving(request)
        if plan is None:
            plan = self._owner.run(lambda: self._make_plan(request, deadline), deadline, "planning the layout")
        if isinstance(plan, Unproven):
            return plan
        unused = plan.unused
        return unproven_of(unused, request) or Planned(
            plan.id, plan.arena.manifest, str(plan.arena.path), tuple(unused.everywhere), dict(unused.partners)
        )

    def _make_plan(self, request: PlanRequest, deadline: Deadline) -> AgreedPlan | Unproven:
        self._planning = True
        try:
            plan = self._layouts.serving(request) or self._layouts.make(request, self._versions, deadline)
            if isinstance(plan, Unproven):
                return plan
            with self._lock:  # a push that was begun through the former plan keeps its arena
                in_use = self._open.plan if self._open is not None else None
            self._layouts.drop_unheld(self._versions, in_use)
            return plan
        finally:
            self._planning = False

    def _refuse_when_busy(self) -> None:
        """Raise Busy while a push is open. One whose trainer is gone before it was submitted is dropped."""
        push = self._open
        if push is None:
            return
        holder = self.ledger.holder
        # who pushes holds the lease: once another process has it, the one that began is gone
        gone = time.monotonic() - push.since > LEASE_GRACE_S if holder is None else str(holder) != push.holder
        if push.submitted is not None or not gone:
            raise Busy(
                "another push is in flight",
                where=self.name,
                expected="one push at a time",
                got=f"version {push.version} by {push.holder}",
                remedy="wait for its receipt before the next push",
            )
        log.warning("push %d was begun by %s, which is gone; dropped", push.version, push.holder)
        self._drop_open_push()

    def _drop_open_push(self) -> None:
        """Drop the open push, unless it was submitted. Called under the lock."""
        push = self._open
        if push is not None and push.submitted is None:
            self._open = None
            if push.version:
                self._runner.note("aborted", version=push.version, reason="dropped before it was sealed")

    def _begin(self, request: BeginRequest, deadline: Deadline) -> Begun:
        with self._lock:
            self._refuse_when_busy()
            if not self._planning:  # which may replace the plan that this push means
                plan = self._layouts.current(request.plan)
                if plan.lora is None or not self._fleet.not_serving(self._versions.committed_version):
                    return self._open_push(plan, request)

        def after_planning() -> None:
            if self._layouts.current(request.plan).lora is not None:  # it goes over weights that every engine serves
                self._fleet.require_serving(self._versions.committed_version)

        what = "planning the layout" if self._planning else "asking the engines again"
        self._owner.run(after_planning, deadline, what)
        with self._lock:
            self._refuse_when_busy()
            return self._open_push(self._layouts.current(request.plan), request)

    def _open_push(self, plan: AgreedPlan, request: BeginRequest) -> Begun:
        versions = self._versions
        if request.over is not None and request.over != versions.weights_version:
            return Begun(0, None, None)
        version = 0 if request.compare else self.ledger.issue(request.version)
        kept = versions.committed.held_in(plan) if versions.committed is not None else None
        base = kept.slot if kept is not None else None
        slot = 0 if base is None else (base + 1) % plan.arena.slots
        versions.previous = None  # its bytes are about to be overwritten
        self._open = OpenPush(version, plan, slot, request.holder)
        return Begun(version, slot, base)

    def _compare(self, request: CompareRequest, deadline: Deadline) -> Compared:
        with self._lock:
            push = self._open
            if push is None or push.version != 0 or push.submitted is not None:
                raise ProtocolError(
                    "nothing was begun to compare with",
                    where=self.name,
                    expected="a slot that was asked for",
                    got="none",
                    remedy="push again",
                )
            seal = _require_sealed(push, request.root)
            self._open = None
        committed = self._versions.committed
        kept = committed.held_in(push.plan) if committed is not None else None
        if kept is None:
            return Compared(False)
        specs = push.plan.arena.manifest.tensors
        found = differing_tensors(kept.seal, seal)
        names = tuple(specs[k].name for k in (range(len(specs)) if found is None else found))
        if not names:  # what was verified once may have been written to since
            names = self._fleet.differing_weights(push.plan, push.slot, deadline)
        return Compared(True, names, self._versions.weights_version)

    def _submit(self, request: SubmitRequest) -> Accepted:
        with self._lock:
            push = self._open
            if push is None or push.version != request.version or push.submitted is not None:
                raise ProtocolError(
                    "this push was not begun, or was dropped",
                    where=self.name,
                    expected="the push that was begun last",
                    got=f"version {request.version}",
                    remedy="push again",
                )
            seal = _require_sealed(push, request.root)
            now, settings = self._versions.committed, request.settings
            lora = now.lora_name if now is not None else None
            if push.plan.lora is None and settings.mode != "base" and lora is not None and settings.partial:
                raise ConfigError(  # what is not sent would lose the adapter's delta
                    "a subset of the weights cannot take the place of an adapter that is served",
                    where=f"the adapter {lora}",
                    expected="all weights, or the base alone",
                    got=f"partial=True, mode={settings.mode!r}",
                    remedy="push all weights once, or mode='base' or 'adapter'",
                )
            arena = str(push.plan.arena.path)
            self.ledger.record("sealed", version=push.version, root=request.root.hex(), slot=push.slot, arena=arena)
            push.submitted = held = Held(push.version, push.plan, push.slot, seal)
            self._results[push.version] = self._owner.submit(lambda: self._run(push, lambda: self._push(held, request)))
            for old in sorted(self._results)[:-RESULTS_KEPT]:
                del self._results[old]
            return Accepted()

    def _push(self, held: Held, request: SubmitRequest) -> Finished:
        if self._layouts.outdated:
            self._layouts.drop_unheld(self._versions, held.plan)
        return self._runner.push(held, request)

    def _run(self, push: OpenPush, bring: Callable[[], Finished]) -> Finished:
        """Run a push or a rollback on the owner thread. It always has a result, and leaves the coordinator free."""
        try:
            return bring()
        except BaseException as error:  # thread boundary: a waiting trainer must get an answer whatever broke here
            return self._runner.give_up(push.version, error)
        finally:
            with self._lock:
                self._open = None

    def _wait(self, request: WaitRequest) -> Finished:
        result = self._results.get(request.version)
        if result is None:
            raise NotFound(
                "no such push",
                where=self.name,
                expected="the version of a push that was submitted",
                got=f"version {request.version}",
                remedy="b.history() lists the pushes that have ended",
            )
        try:
            return result.result(request.timeout_s)
        except TimeoutError:
            return Finished(None)

    # ---- rollback, questions, end -----------------------------------------------------------------------------------

    def _roll_back(self, request: RollbackRequest, deadline: Deadline) -> Finished:
        with self._lock:
            self._refuse_when_busy()
            find_rollback(self._versions, self.name, request.timeout_s)  # refuses before it waits for its turn

        def in_turn() -> Finished:
            with self._lock:
                self._refuse_when_busy()
                back, held, settings = find_rollback(self._versions, self.name, request.timeout_s)
                self._open = push = OpenPush(back.version, held.plan, held.slot, "a rollback", submitted=held)
            return self._run(push, lambda: self._runner.roll_back(back, held, settings))

        return self._owner.run(in_turn, deadline, "the rollback")

    def _explain(self, request: ExplainRequest, deadline: Deadline) -> Explained:
        plan, lora = self._layouts.weights, self._layouts.lora
        if lora is not None and (plan is None or split(request.name) is not None):
            plan = lora
        if plan is None:
            raise NotFound(
                "nothing was pushed yet, so there is no plan to explain",
                where=self.name,
                expected="a version that was pushed",
                got="none",
                remedy="push once",
            )
        job = ExplainJob(plan.id, request.name)
        found = self._owner.run(lambda: self._fleet.run_all(job, RankExplanation, deadline), deadline, "explaining")
        rows = tuple(
            {"engine": engine, "rank": str(rank), **row}
            for engine, ranks in found.items()
            for rank, answer in enumerate(ranks)
            for row in answer.rows
        )
        if not rows and not any(request.name in (info.name, *info.aliases) for info in plan.tensors):
            raise NotFound(
                "no such tensor in the plan",
                where=request.name,
                expected=f"a checkpoint name, such as {plan.tensors[0].name}",
                got=repr(request.name),
                remedy="the manifest holds what the last push sent",
            )
        return Explained(rows)

    def _health(self, deadline: Deadline) -> HealthReport:
        """Examine the engines, unless a push occupies them, and weigh the findings: an examination waits for no push,
        and no push finds a paused engine waiting for an examination."""
        push, served = self._open, self._versions.committed
        why = f"version {push.version} is being pushed" if push is not None else "a layout is being planned"
        engines: list[Examined] | None = None
        if push is None and not self._planning:
            try:
                served, engines = self._owner.run(
                    lambda: (self._versions.committed, examine(self._fleet, self._versions, deadline)),
                    deadline,
                    "the examination",
                )
            except DeadlineExceeded as error:
                why = str(error)
        if engines is None:
            late = Busy(
                why,
                where=self.name,
                expected="engines that can be examined now",
                got="engines that somebody else uses",
                remedy="ask for the health again",
            )
            engines = [Examined(info, late) for info in self._fleet.infos.values()]
        facts = Facts(
            name=self.name,
            engines=engines,
            committed=served.version if served else None,
            earlier=self._earlier if served is None or served.version == 0 else None,
            busy=push.version if push else None,
            watched=scope_of(served.weights.plan) if served and served.weights else (),
            last_receipt=next(iter(self.ledger.receipts(1)), None),
        )
        return assess(facts)

    def close(self) -> None:
        """Let a running push end, stop every engine gracefully and unlink the shared memory. Idempotent. Blocks."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if not self._owner.close(Deadline.after(60)):
            log.warning("%s is closed while a push still waits for an engine", self.name)
        self._fleet.close(Deadline.after(30))
        self._layouts.close()
        self._mailbox.close()
        self._mailbox.unlink()
        self.ledger.close()


def _require_sealed(push: OpenPush, root: bytes) -> Seal:
    seal = push.plan.arena.seal_of(push.slot)
    if seal is None or seal.version != push.version or seal.root != root:
        raise ProtocolError(
            "the slot is not sealed as announced",
            where=f"version {push.version}",
            expected="the seal of this push",
            got="another, or none",
            remedy="push again",
        )
    return seal
