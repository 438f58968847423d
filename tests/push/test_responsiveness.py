"""A coordinator answers while its engines do not: status, health, waiting and the end of a push under named faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge.coordinator import push_run
from bridge.protocol.engine_messages import EngineCheck, EngineCommit, EngineHello, EngineLoad, EngineRun

QUICK_S = 0.2


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


class StallingEngine:
    """An injected fault: requests of some kinds are not answered before `go_on` is called."""

    def __init__(self, made: bridge.Bridge, patch: pytest.MonkeyPatch, *kinds: type) -> None:
        self.reached, self.released = threading.Event(), threading.Event()
        self.threads: list[str] = []
        self._kinds = kinds
        port = made.engines[0]._port
        self._call = port.call
        patch.setattr(port, "call", self.call)

    def call(self, request: Any, reply: Any, deadline: Any) -> Any:
        if not isinstance(request, EngineHello):  # a status may ask for facts at any time
            self.threads.append(threading.current_thread().name)
        if isinstance(request, self._kinds):
            self.reached.set()
            assert self.released.wait(20)
        return self._call(request, reply, deadline)

    def go_on(self) -> None:
        self.released.set()


@contextmanager
def in_background(run: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run something on another thread; its result, or what it raised, is in the list at the end of the block."""
    out: list[Any] = []

    def work() -> None:
        try:
            out.append(run())
        except bridge.BridgeError as error:
            out.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    yield out
    thread.join(20)
    assert not thread.is_alive()


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


@pytest.fixture
def attached() -> Iterator[tuple[bridge.Bridge, nn.Module]]:
    trainer = net(1)
    with bridge.attach(net(2)) as made:
        yield made, trainer


@pytest.mark.parametrize("stage", [EngineRun, EngineLoad, EngineCommit])
def test_status_and_health_are_answered_while_an_engine_plans_loads_or_commits(
    stage: type, attached: tuple[bridge.Bridge, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, trainer = attached
    if stage is not EngineRun:
        made.push(trainer.named_parameters())
    engine = StallingEngine(made, monkeypatch, stage)
    with in_background(lambda: made.push(trainer.named_parameters())) as pushed:
        assert engine.reached.wait(10)
        took, status = seconds(made.status)
        assert took < QUICK_S
        assert status.engines[0].serving == (0 if stage is EngineRun else 1)
        took, report = seconds(made.health)
        assert took < QUICK_S
        (skipped,) = [check for check in report.checks if "not examined" in check.got]
        assert (skipped.ok, skipped.degraded) == (True, True)
        assert report.status != "unhealthy"
        engine.go_on()
    assert pushed[0].verified is True
    assert made.health().status == "degraded"  # no canary without a model
    assert not [check for check in made.health().checks if "not examined" in check.got]


def test_neither_status_nor_health_lengthens_a_pause(
    attached: tuple[bridge.Bridge, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, trainer = attached
    made.push(trainer.named_parameters())
    engine = StallingEngine(made, monkeypatch, EngineLoad)
    asking = threading.Event()

    def ask() -> None:
        while not asking.is_set():
            made.status()
            made.health()

    with in_background(lambda: made.push(trainer.named_parameters())) as pushed, in_background(ask):
        assert engine.reached.wait(10)
        engine.go_on()
        while not pushed:
            time.sleep(0.01)
        asking.set()
    assert pushed[0].pause_s < 1.0


def test_a_push_begun_during_an_examination_comes_after_it(
    attached: tuple[bridge.Bridge, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No engine is paused while another one is still being examined."""
    made, trainer = attached
    made.push(trainer.named_parameters())
    engine = StallingEngine(made, monkeypatch, EngineCheck)
    with in_background(made.health) as reports:
        assert engine.reached.wait(10)
        with in_background(lambda: made.push(trainer.named_parameters())) as pushed:
            time.sleep(0.3)
            assert not pushed
            assert made.status().engines[0].state == "SERVING"
            engine.go_on()
    assert pushed[0].verified is True
    assert pushed[0].pause_s < 0.3
    assert reports[0].status != "unhealthy"


def test_engines_are_called_by_one_thread(
    attached: tuple[bridge.Bridge, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, trainer = attached
    engine = StallingEngine(made, monkeypatch)
    made.push(trainer.named_parameters())
    made.push(trainer.named_parameters())
    made.health()
    made.rollback()
    made.explain("0.weight")
    assert set(engine.threads) == {f"weighbridge-{made.name}"}


def broken(*_: Any, **__: Any) -> Any:
    """Fail as code of ours does where nobody expects it."""
    raise RuntimeError("an error that nobody expects")


@pytest.mark.parametrize("also_the_way_back", [False, True])
def test_a_push_always_leaves_a_result_and_a_free_coordinator(
    also_the_way_back: bool, attached: tuple[bridge.Bridge, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, trainer = attached
    made.push(trainer.named_parameters())

    with monkeypatch.context() as patch:
        patch.setattr(push_run, "receipt_of", broken)
        if also_the_way_back:
            patch.setattr(push_run, "restore", broken)
        with pytest.raises(bridge.BridgeError, match="an error that nobody expects"):
            made.push(trainer.named_parameters())
    assert made.status().busy is None
    assert made.push(trainer.named_parameters()).verified is True


def test_a_rollback_that_breaks_leaves_a_free_coordinator(
    attached: tuple[bridge.Bridge, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, trainer = attached
    made.push(trainer.named_parameters())

    with monkeypatch.context() as patch:
        patch.setattr(push_run, "receipt_of", broken)
        with pytest.raises(bridge.BridgeError, match="an error that nobody expects"):
            made.rollback()
    assert made.push(trainer.named_parameters()).verified is True


def test_a_hung_plan_ends_at_its_deadline_and_is_named(
    attached: tuple[bridge.Bridge, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, trainer = attached
    engine = StallingEngine(made, monkeypatch, EngineRun)
    monkeypatch.setattr(made, "config", type(made.config)(plan_timeout_s=0.3))
    with pytest.raises(bridge.DeadlineExceeded, match="planning the layout has not ended in time") as caught:
        made.push(trainer.named_parameters())
    assert caught.value.remedy
    assert made.status().busy is None
    engine.go_on()
    monkeypatch.undo()
    assert made.push(trainer.named_parameters()).verified is True
