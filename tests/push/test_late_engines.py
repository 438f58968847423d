"""An engine that is late or fails while it is paused, published to or woken: it serves, or refuses and says why."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge.errors import DeadlineExceeded
from engine_side.driver.output_checks import OutputChecks
from engine_side.engines.embedded import EmbeddedDriver
from engine_side.load.loader import Loader
from tests.conftest import perturb, tiny_qwen2
from tests.push.rig import drift


@pytest.mark.parametrize("error", [RuntimeError, bridge.PeerLost])
@pytest.mark.parametrize("always", [False, True])
def test_an_engine_that_fails_to_resume_never_hangs_its_callers(
    attached: Any, monkeypatch: pytest.MonkeyPatch, always: bool, error: type[Exception]
) -> None:
    model = tiny_qwen2()
    engine, b = attached(model)
    b.push(model.named_parameters())
    real = EmbeddedDriver.resume

    def fails(self: EmbeddedDriver) -> None:
        if not always:
            monkeypatch.setattr(EmbeddedDriver, "resume", real)
        raise error("resume failed")

    perturb(model)
    monkeypatch.setattr(EmbeddedDriver, "resume", fails)
    if always:
        with pytest.raises(bridge.EngineQuarantined, match="committed") as caught:
            b.push(model.named_parameters())
        receipt = caught.value.receipt
        assert caught.value.serving == {"engine0": None}
    else:
        receipt = b.push(model.named_parameters())
    monkeypatch.setattr(EmbeddedDriver, "resume", real)
    said = _said(b)
    assert receipt is not None
    assert receipt.verified is (not always)
    assert isinstance(said, bridge.EngineQuarantined) is always
    assert b.health().healthy is (not always)
    if always:
        assert b.push(model.named_parameters()).verified is True, "a good push lifts the quarantine"
    assert drift(engine, model) < 1e-4


def _fail(patch: pytest.MonkeyPatch, method: str, times: int, error: type[Exception] = DeadlineExceeded) -> list[str]:
    """The engine's driver fails in this method so many times, then does it; its calls, in order."""
    real = getattr(EmbeddedDriver, method)
    asked: list[str] = []

    def fails(self: EmbeddedDriver, *args: Any, **options: Any) -> Any:
        asked.append(method)
        if len(asked) <= times:
            raise error(f"{method} was late")
        return real(self, *args, **options)

    patch.setattr(EmbeddedDriver, method, fails)
    return asked


def _said(b: bridge.Bridge) -> Any:
    """What a caller gets, within 20 seconds."""
    ended: list[Any] = []

    def generate() -> None:
        try:
            ended.append(b.engines[0].generate([[1, 2, 3]], bridge.Sampling(max_tokens=2)))
        except bridge.BridgeError as error:
            ended.append(error)

    caller = threading.Thread(target=generate, daemon=True)
    caller.start()
    caller.join(20)
    assert ended, "generate hangs"
    return ended[0]


@pytest.mark.parametrize("method", ["publish", "resume", "retire"])
@pytest.mark.parametrize("way", ["push", "rollback", "after a failed push"])
def test_an_engine_that_was_late_once_serves(
    attached: Any, monkeypatch: pytest.MonkeyPatch, method: str, way: str
) -> None:
    model = tiny_qwen2()
    engine, b = attached(model)
    b.push(model.named_parameters())
    before = engine.prompt_logprobs([[1, 2, 3, 4, 5]])
    perturb(model)
    if way == "rollback":
        b.push(model.named_parameters())
    with monkeypatch.context() as patch:
        asked = _fail(patch, method, times=1)
        if way == "push":
            assert b.push(model.named_parameters()).verified is True
        elif way == "rollback":
            b.rollback()
        else:
            _fail(patch, "reset_caches", times=1, error=RuntimeError)
            with pytest.raises(bridge.PushAborted):
                b.push(model.named_parameters())
    assert asked, "the fault struck"
    assert b.status().engines[0].state == "SERVING"
    assert isinstance(_said(b), list)
    if way != "push":
        assert engine.prompt_logprobs([[1, 2, 3, 4, 5]]) == before
    assert [check for check in b.health().checks if not check.ok and check.name != "last receipt"] == []


@pytest.mark.parametrize("method", ["publish", "resume"])
@pytest.mark.parametrize("way", ["push", "rollback"])
@pytest.mark.parametrize("mute", [False, True], ids=["refuses", "cannot be told to refuse"])
def test_an_engine_that_stays_late_after_the_commit_is_quarantined(
    attached: Any, monkeypatch: pytest.MonkeyPatch, method: str, way: str, mute: bool
) -> None:
    """Never held without a reason: callers are refused, and status says why."""

    def mutely(self: EmbeddedDriver, reason: str | None) -> None:
        if reason is not None:
            raise DeadlineExceeded("the refusal was late")

    model = tiny_qwen2()
    engine, b = attached(model)
    b.push(model.named_parameters())
    perturb(model)
    if way == "rollback":
        b.push(model.named_parameters())
    with monkeypatch.context() as patch:
        asked = _fail(patch, method, times=99)
        if mute:
            patch.setattr(EmbeddedDriver, "refuse", mutely)
        with pytest.raises(bridge.EngineQuarantined, match="late") as caught:
            b.push(model.named_parameters()) if way == "push" else b.rollback()
    assert caught.value.serving == {"engine0": None}
    assert asked
    info = b.status().engines[0]
    assert (info.state, info.serving) == ("QUARANTINED", None)
    assert "late" in info.detail
    assert isinstance(_said(b), bridge.EngineQuarantined)
    assert (engine.refusal is None) is mute, "so are those who ask the engine itself"
    assert b.push(model.named_parameters()).verified is True, "a good push lifts the quarantine"
    assert isinstance(_said(b), list)


@pytest.mark.parametrize("error", [DeadlineExceeded, bridge.PeerLost, RuntimeError])
@pytest.mark.parametrize("times", [1, 99])
def test_an_examination_leaves_no_engine_asleep(
    attached: Any, monkeypatch: pytest.MonkeyPatch, error: type[Exception], times: int
) -> None:
    model = tiny_qwen2()
    engine, b = attached(model)
    b.push(model.named_parameters())
    with monkeypatch.context() as patch:
        asked = _fail(patch, "resume", times, error)
        healthy = b.health().healthy
    lost = times > 1
    assert asked
    assert healthy is not lost
    assert isinstance(_said(b), bridge.EngineQuarantined) is lost
    assert b.status().engines[0].state == ("QUARANTINED" if lost else "SERVING")
    assert engine.paused is lost
    assert b.push(model.named_parameters()).verified is True
    assert isinstance(_said(b), list)


@pytest.mark.parametrize("wakes", [True, False])
def test_a_pause_for_an_examination_that_comes_too_late(
    attached: Any, monkeypatch: pytest.MonkeyPatch, wakes: bool
) -> None:
    """It falls asleep all the same, after nobody waits for it any more."""
    model = tiny_qwen2()
    engine, b = attached(model)
    b.push(model.named_parameters())

    def late(self: EmbeddedDriver, inflight: str, deadline: Any) -> None:
        self.engine.pause(inflight)
        raise DeadlineExceeded("the pause was late")

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedDriver, "pause", late)
        asked = _fail(patch, "resume", times=0 if wakes else 99)
        assert not b.health().healthy, "it was not examined"
    assert asked
    assert isinstance(_said(b), list if wakes else bridge.EngineQuarantined)
    assert engine.paused is not wakes
    assert b.status().engines[0].state == ("SERVING" if wakes else "QUARANTINED")
    assert b.health().healthy is wakes


def test_an_examination_pauses_a_serving_engine(attached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_qwen2()
    _, b = attached(model)
    b.push(model.named_parameters())
    calls: list[str] = []

    def spied(kind: type, name: str) -> None:
        real = getattr(kind, name)

        def spy(self: Any, *arguments: Any, **keywords: Any) -> Any:
            calls.append(name)
            return real(self, *arguments, **keywords)

        monkeypatch.setattr(kind, name, spy)

    spied(EmbeddedDriver, "pause")
    spied(OutputChecks, "scores")
    spied(EmbeddedDriver, "resume")
    assert b.health().healthy
    assert calls == ["pause", "scores", "resume"]


def test_a_foreign_error_on_the_way_back_quarantines(attached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_qwen2()
    _, b = attached(model)
    b.push(model.named_parameters())
    perturb(model)

    def fails(self: EmbeddedDriver) -> bool:
        raise RuntimeError("engine rpc failed")

    monkeypatch.setattr(EmbeddedDriver, "reset_caches", fails)
    with pytest.raises(bridge.EngineQuarantined):
        b.push(model.named_parameters())
    began = time.monotonic()
    with pytest.raises(bridge.EngineQuarantined):
        b.engines[0].generate([[1, 2, 3]], bridge.Sampling(max_tokens=2))
    assert time.monotonic() - began < 5


def test_quarantine_outlives_the_bridge() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    trainer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    b = bridge.attach(module)
    real = Loader.apply

    def torn(self: Loader, slot: int, changed: Any = None) -> Any:
        real(self, slot, changed)
        raise RuntimeError("torn")

    Loader.apply = torn  # type: ignore[method-assign]
    try:
        with pytest.raises(bridge.EngineQuarantined):
            b.push(trainer.named_parameters())
    finally:
        Loader.apply = real  # type: ignore[method-assign]
    b.close()
    with pytest.raises(bridge.EngineQuarantined):
        module(torch.zeros(1, 4))
    with bridge.attach(module) as again:
        assert again.status().engines[0].state == "QUARANTINED"
        assert not again.health().healthy
        again.push(trainer.named_parameters())
        assert torch.equal(module(torch.ones(1, 4)), trainer(torch.ones(1, 4)))
