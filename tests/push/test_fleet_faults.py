"""Two engines behind one coordinator, with named faults: late, broken and hung engines, and what is left afterwards."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge import entry_points
from bridge.client import Bridge
from bridge.config import from_environment
from bridge.coordinator.coordinator import Coordinator
from bridge.coordinator.owner_thread import OwnerThread
from bridge.errors import Closed, ConfigError, DeadlineExceeded, PushAborted, TransportError, UnexpectedTensor
from bridge.journal.ledger import Ledger
from bridge.ports import InProcessPort
from bridge.protocol.deadline import Deadline
from bridge.session import Session
from engine_side.driver.service import EngineService
from engine_side.engines.registry import adapt
from engine_side.load.loader import Loader
from tests.conftest import unlinked_and_held


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


class FleetSession(Session):
    """A coordinator of this process over several attached modules."""

    def __init__(self, modules: list[Any], folder: Path) -> None:
        node, ports = socket.gethostname(), []
        self.services = []
        for index, module in enumerate(modules):
            driver = adapt(module, entry_points.load(entry_points.ROUTES))
            self.services.append(EngineService(f"engine{index}", driver, node=node))
            ports.append(InProcessPort(f"engine{index}", self.services[-1]))
        ledger = Ledger.open("fleet", directory=folder)
        config = from_environment()
        self.own = Coordinator("fleet", ports, ledger, node=node, shm_dir=config.shm_dir)
        super().__init__("fleet", InProcessPort("fleet", self.own), ports, folder)

    def _end(self) -> None:
        self.own.close()


Fleet = tuple[FleetSession, Bridge]


def bridge_over(session: FleetSession) -> Bridge:
    return Bridge(session, entry_points.load(entry_points.TRAINER)(), from_environment())


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    session = FleetSession([net(1), net(1)], tmp_path)
    made = bridge_over(session)
    yield session, made
    made.close()


def push(made: Bridge, seed: int, **options: Any) -> bridge.Receipt:
    receipt: bridge.Receipt = made.push(net(seed).named_parameters(), **options)
    return receipt


def states(made: Bridge) -> list[tuple[str, int | None]]:
    return [(info.state, info.serving) for info in made.status().engines]


def eventually(wanted: list[tuple[str, int | None]], made: Bridge) -> bool:
    end = time.monotonic() + 20
    while states(made) != wanted and time.monotonic() < end:
        time.sleep(0.05)
    return states(made) == wanted


@contextlib.contextmanager
def held_back(session: FleetSession, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """An injected fault: jobs for engine1's ranks wait until the event is set."""
    driver, go_on = session.services[1].driver, threading.Event()
    dispatch = driver.dispatch

    def late(job: bytes, deadline: Deadline) -> None:
        assert go_on.wait(30)
        dispatch(job, deadline)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "dispatch", late)
        yield go_on
        go_on.set()


def test_an_engine_that_is_late_for_a_push_goes_back_to_the_version_before(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the time of a way back for it, however short the coordinator waits for its answer."""
    session, made = fleet
    version = push(made, 2).version
    with held_back(session, monkeypatch) as go_on:
        with pytest.raises(PushAborted, match="engine1"):
            push(made, 3, timeout_s=0.5)
        time.sleep(4)  # longer than it was waited for
        go_on.set()
        assert eventually([("SERVING", version)] * 2, made)
    assert push(made, 4).verified is True


def test_a_rollback_that_never_had_its_turn_leaves_the_coordinator_free(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, made = fleet
    push(made, 2)
    push(made, 3)
    with held_back(session, monkeypatch):
        asking = threading.Thread(target=lambda: made.explain("0.weight"), daemon=True)
        asking.start()
        time.sleep(0.3)
        monkeypatch.setattr("bridge.client.CALL_TIMEOUT_S", 0.0)
        with pytest.raises(DeadlineExceeded, match="the rollback"):
            made.rollback(timeout_s=0.3)
        monkeypatch.undo()
        assert made.status().busy is None
    asking.join(20)
    assert made.rollback().version == 1


def test_health_says_so_when_another_question_holds_the_engines(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    session, made = fleet
    push(made, 2)
    with held_back(session, monkeypatch):
        asking = threading.Thread(target=lambda: made.explain("0.weight"), daemon=True)
        asking.start()
        time.sleep(0.3)
        report = made.health(0.3)
        assert [check for check in report.checks if "not examined" in check.got]
        assert report.status != "unhealthy"
    asking.join(20)
    assert not [check for check in made.health().checks if "not examined" in check.got]


def test_an_engine_that_is_lost_on_the_way_back_is_told_although_nothing_was_written(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, made = fleet
    push(made, 2)
    service = session.services[1]

    def refused(*_: Any) -> Any:
        raise ConfigError("a module of the engine was replaced after it was attached")

    def gone() -> None:
        raise bridge.PeerLost("the engine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(service, "_write", refused)
        patch.setattr(service.driver, "resume", gone)
        with pytest.raises(bridge.EngineQuarantined) as caught:
            push(made, 3)
    assert caught.value.serving["engine1"] is None
    assert push(made, 4).verified is True


def test_engines_that_differ_are_not_put_back_to_the_weights_of_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No version 0 is true of both, so none of them may serve what the other one held."""
    modules = [net(1), net(2)]
    apply = Loader.apply

    def breaks(loader: Loader, slot: int, changed: Any = None) -> Any:
        outcome = apply(loader, slot, changed)
        if loader.host.model is modules[0]:
            raise TransportError("on purpose")
        return outcome

    made = bridge_over(FleetSession(modules, tmp_path))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Loader, "apply", breaks)
            with pytest.raises(bridge.EngineQuarantined, match="on purpose"):
                push(made, 3)
        assert states(made) == [("QUARANTINED", None)] * 2
        assert push(made, 4).verified is True
        assert states(made) == [("SERVING", 2)] * 2
    finally:
        made.close()


def test_a_version_that_no_new_arena_can_hold_is_returned_to_in_its_own(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines that cannot be read back: then the arena of the layout before is the only way back."""
    session, made = fleet
    version = push(made, 2).version
    apply, torn = Loader.apply, session.services[1].driver.module
    faults = iter([TransportError("on purpose")])

    def breaks(loader: Loader, slot: int, changed: Any = None) -> Any:
        outcome = apply(loader, slot, changed)
        fault = next(faults, None) if loader.host.model is torn else None
        if fault is not None:
            raise fault
        return outcome

    monkeypatch.setattr(session.own._fleet, "keep_current", lambda *_: None)
    monkeypatch.setattr(Loader, "apply", breaks)
    with pytest.raises(PushAborted, match="on purpose"):
        made.push([(name, tensor.detach().double()) for name, tensor in net(3).named_parameters()])
    assert states(made) == [("SERVING", version)] * 2
    for service in session.services:
        assert torch.equal(service.driver.module[1].weight, net(2)[1].weight)


def test_a_subset_is_no_way_back_for_what_it_does_not_hold(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    session, made = fleet
    made.push([("0.weight", net(2)[0].weight)], partial=True)
    apply, faults = Loader.apply, iter([TransportError("on purpose") for _ in session.services])

    def breaks(loader: Loader, slot: int, changed: Any = None) -> Any:
        outcome = apply(loader, slot, changed)
        if (fault := next(faults, None)) is not None:
            raise fault
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(session.own._fleet, "keep_current", lambda *_: None)
        patch.setattr(Loader, "apply", breaks)
        with pytest.raises(bridge.EngineQuarantined, match="on purpose"):
            push(made, 3)
    assert states(made) == [("QUARANTINED", None)] * 2
    assert push(made, 4).verified is True


def test_an_error_of_ours_between_the_votes_puts_every_engine_back(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, made = fleet
    version = push(made, 2).version

    def breaks(*_: Any) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr("bridge.coordinator.push_run.TwoPhaseCommit.vote", breaks)
        with pytest.raises(bridge.BridgeError, match="a bug"):
            push(made, 3)
    assert states(made) == [("SERVING", version)] * 2
    for service in session.services:
        assert torch.equal(service.driver.module[1].weight, net(2)[1].weight)
    assert push(made, 4).verified is True


def test_a_plan_that_fails_takes_nothing_else_away(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    session, made = fleet
    push(made, 2)
    plans = [len(service._arenas) for service in session.services]
    for _ in range(3):
        with pytest.raises(UnexpectedTensor):
            made.push([*net(3).named_parameters(), ("stray", torch.zeros(2))])
    monkeypatch.setattr(session.own._fleet, "keep_current", refuse_to_read_back)
    with pytest.raises(DeadlineExceeded, match="read back"):
        made.push([(name, tensor.detach().double()) for name, tensor in net(3).named_parameters()])
    monkeypatch.undo()
    assert push(made, 4).verified is True
    assert [len(service._arenas) for service in session.services] == plans


def test_a_rank_that_cannot_map_an_arena_is_named_and_keeps_nothing_of_it(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, made = fleet
    version = push(made, 2).version
    wider = [(name, tensor.detach().double()) for name, tensor in net(3).named_parameters()]
    map_onto, torn = Loader.map, session.services[1].driver.module

    def breaks(loader: Loader, *args: Any) -> None:
        map_onto(loader, *args)
        if loader.host.model is torn:
            raise TransportError("no room to map it")

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "map", breaks)
        for _ in range(2):
            with pytest.raises(TransportError, match="no room to map it") as caught:
                made.push(wider)
            assert "engine1 rank 0" in str(caught.value.where)
    assert states(made) == [("SERVING", version)] * 2
    assert push(made, 4).verified is True
    assert made.push(wider).verified is True
    made.push(wider)  # now nothing holds the first layout either
    folder = Path(os.environ["WEIGHBRIDGE_SHM_DIR"])
    assert len(list(folder.glob("weighbridge-fleet-*.data"))) == 1
    assert [path for path in unlinked_and_held(folder) if path.endswith(".data")] == []


def refuse_to_read_back(*_: Any) -> Any:
    raise DeadlineExceeded("an engine was late to read back")


def test_a_dropped_bridge_lets_go_at_once() -> None:
    module = net(1)
    made = bridge.attach(module)
    made.push(net(2).named_parameters())
    gc.disable()
    try:
        del made
        with bridge.attach(module) as again:
            assert again.push(net(3).named_parameters()).verified is True
    finally:
        gc.enable()


def test_a_job_after_the_end_is_refused_and_one_before_it_still_runs() -> None:
    owner = OwnerThread("a test")
    begun = owner.submit(lambda: 7)
    assert owner.close(Deadline.after(5))
    assert begun.result(1) == 7
    with pytest.raises(Closed):
        owner.run(lambda: 8, Deadline.after(5), "a job")


def test_a_job_that_ends_as_its_deadline_passes_gives_its_result() -> None:
    owner = OwnerThread("a test")
    assert owner.run(lambda: 7, Deadline.after(0), "a job") == 7
    with pytest.raises(DeadlineExceeded, match="a slow job has not ended in time"):
        owner.run(lambda: time.sleep(1), Deadline.after(0), "a slow job")
    owner.close(Deadline.after(5))
