"""Ways in which a push once went wrong in silence, each kept from coming back."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge.errors import DeadlineExceeded, TransportError
from tests.conftest import perturb, tiny_qwen2
from tests.push.test_push_embedded import attached, drift

__all__ = ["attached"]


def test_a_second_bridge_on_one_engine_is_refused(attached: Any) -> None:
    model = tiny_qwen2()
    engine, b = attached(model)
    b.push(model.named_parameters())
    with pytest.raises(bridge.Busy):
        bridge.attach(engine)
    perturb(model)
    assert b.push(model.named_parameters()).verified is True
    assert drift(engine, model) < 1e-4
    b.close()
    bridge.attach(engine).close()


def test_live_edits_are_not_adopted_as_the_committed_version(attached: Any) -> None:
    model = tiny_qwen2()
    engine, b = attached(model)
    b.push(model.named_parameters())
    with torch.no_grad():
        engine.runner.model.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] += 1
    assert not b.health().healthy
    other = model.to(torch.float64)
    broken = [(n, p * float("nan")) for n, p in other.named_parameters()]
    with pytest.raises(bridge.NonFinite):
        b.push(broken)
    assert not b.health().healthy, "a push that was refused must not bless what lies in the engine"


def test_a_retry_after_a_failed_plan_does_not_mix_versions(attached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_qwen2()
    engine, b = attached(model)
    layer = [(n, p) for n, p in model.named_parameters() if ".layers.1." in n]
    with torch.no_grad():
        for _, parameter in layer:
            parameter.mul_(1.1)
    b.push(layer, partial=True)
    before = engine.prompt_logprobs([[1, 2, 3, 4, 5]])
    from engine_side.load.loader import Loader

    real = Loader.read_back

    def fails_once(self: Loader, into: Any) -> Any:
        monkeypatch.setattr(Loader, "read_back", real)
        raise RuntimeError("read-back failed")

    monkeypatch.setattr(Loader, "read_back", fails_once)
    perturb(model)
    with pytest.raises(bridge.BridgeError):
        b.push(model.named_parameters())
    real_apply = Loader.apply

    def half(self: Loader, slot: int, changed: Any = None) -> Any:
        monkeypatch.setattr(Loader, "apply", real_apply)
        real_apply(self, slot, changed)
        raise RuntimeError("after the write")

    monkeypatch.setattr(Loader, "apply", half)
    with pytest.raises(bridge.PushAborted):
        b.push(model.named_parameters())
    assert engine.prompt_logprobs([[1, 2, 3, 4, 5]]) == before


@pytest.mark.parametrize("kind", ["sealed", "receipt", "aborted"])
def test_a_full_disk_neither_blocks_nor_lies(attached: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from bridge.journal.ledger import Ledger

    model = tiny_qwen2()
    engine, b = attached(model)
    b.push(model.named_parameters())
    real = Ledger.record

    def full(self: Ledger, what: str, **fields: Any) -> None:
        if what == kind:
            raise TransportError("the journal cannot be written", got="no space left")
        real(self, what, **fields)

    perturb(model)
    monkeypatch.setattr(Ledger, "record", full)
    if kind == "sealed":
        with pytest.raises(TransportError):
            b.push(model.named_parameters())
    elif kind == "aborted":
        with pytest.raises(bridge.NonFinite):
            b.push([(n, p * float("inf")) for n, p in model.named_parameters()])
    else:
        receipt = b.push(model.named_parameters())
        assert any("journal" in note for note in receipt.notes)
        assert drift(engine, model) < 1e-4
    monkeypatch.setattr(Ledger, "record", real)
    b.push(model.named_parameters())
    assert drift(engine, model) < 1e-4


@pytest.mark.parametrize("error", [RuntimeError, bridge.PeerLost])
@pytest.mark.parametrize("always", [False, True])
def test_an_engine_that_fails_to_resume_never_hangs_its_callers(
    attached: Any, monkeypatch: pytest.MonkeyPatch, always: bool, error: type[Exception]
) -> None:
    from engine_side.engines.embedded import EmbeddedDriver

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
    """The engine's adapter fails at this so many times, then does it. What was asked, in order."""
    from engine_side.engines.embedded import EmbeddedDriver

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
    from engine_side.engines.embedded import EmbeddedDriver

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
    from engine_side.engines.embedded import EmbeddedDriver

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


def test_a_foreign_error_on_the_way_back_quarantines(attached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine_side.engines.embedded import EmbeddedDriver

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
    from engine_side.load.loader import Loader

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


def test_verified_says_only_what_was_shown() -> None:
    trainer = nn.Linear(4, 4)
    with bridge.attach(nn.Linear(4, 4)) as b:
        b.push(trainer.named_parameters())
        assert b.push(trainer.named_parameters(), verify=["coverage"]).verified is False
        assert b.push(trainer.named_parameters(), verify=["read-back"]).verified == "partial"
        assert b.push(trainer.named_parameters(), verify="weights").verified is True


@pytest.mark.parametrize("block_size", [16, 32])
def test_a_stale_prefix_cache_is_found_whatever_the_block_size(
    attached: Any, monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    from engine_side.engines.embedded import EmbeddedDriver

    model = tiny_qwen2()
    _, b = attached(model, block_size=block_size)
    b.push(model.named_parameters())
    perturb(model, scale=0.2)
    monkeypatch.setattr(EmbeddedDriver, "reset_caches", lambda self: True)
    with pytest.raises(bridge.PushAborted, match="cache"):
        b.push(model.named_parameters())


def test_a_short_engine_still_has_a_canary(attached: Any) -> None:
    model = tiny_qwen2()
    _, b = attached(model, max_seq_len=16)
    perturb(model)
    receipt = b.push(model.named_parameters())
    assert receipt.engines[0].canary is not None
    assert receipt.verified is True


def test_a_push_that_is_under_way_can_be_awaited_after_close(attached: Any) -> None:
    model = tiny_qwen2()
    _, b = attached(model)
    pending = b.push(model.named_parameters(), wait=False)
    b.close()
    assert pending.result().verified is True


def test_an_examination_pauses_a_serving_engine(attached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine_side.driver.output_checks import OutputChecks
    from engine_side.engines.embedded import EmbeddedDriver

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
