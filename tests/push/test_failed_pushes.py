"""A push that fails between its steps leaves neither a mixture of versions nor a false record of one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bridge
from bridge.errors import TransportError
from bridge.journal.ledger import Ledger
from bridge.shm.arena import Arena
from engine_side.engines.embedded import EmbeddedDriver
from engine_side.load import version_zero
from engine_side.load.loader import Loader
from tests.conftest import perturb, tiny_qwen2
from tests.push.lora_rig import LoraRig
from tests.push.rig import GREEDY, drift


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
    real = version_zero.read_back

    def fails_once(*_: Any) -> Any:
        monkeypatch.setattr(version_zero, "read_back", real)
        raise RuntimeError("read-back failed")

    monkeypatch.setattr(version_zero, "read_back", fails_once)
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


def test_a_commit_that_cannot_be_journalled_is_taken_back_before_an_engine_serves_it(
    attached: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_qwen2()
    engine, b = attached(model)
    version = b.push(model.named_parameters()).version
    before = engine.prompt_logprobs([[1, 2, 3, 4, 5]])
    real, seen = Ledger.record, list[tuple[bool, int | None]]()

    def full(self: Ledger, what: str, **fields: Any) -> None:
        if what == "committed":
            seen.append((engine.paused, b.status().engines[0].serving))
            raise TransportError("the journal cannot be written", got="no space left")
        real(self, what, **fields)

    perturb(model)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "record", full)
        with pytest.raises(bridge.PushAborted, match="no space left"):
            b.push(model.named_parameters())
    assert seen == [(True, version)]
    assert engine.prompt_logprobs([[1, 2, 3, 4, 5]]) == before
    assert b.status().committed == b.status().engines[0].serving == version
    assert b.push(model.named_parameters()).verified is True


def test_what_a_version_left_in_the_cache_goes_with_it(attached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second vote generates under the new weights, and puts their KV into the prefix cache."""
    model = tiny_qwen2()
    _, b = attached(model)
    generate, record, asked = EmbeddedDriver.generate, Ledger.record, list[Any]()

    def heard(driver: EmbeddedDriver, prompts: Any, *args: Any, **options: Any) -> Any:
        asked.extend(prompts if options.get("past_gate") else ())
        return generate(driver, prompts, *args, **options)

    def full(self: Ledger, what: str, **fields: Any) -> None:
        if what == "committed":
            raise TransportError("the journal cannot be written", got="no space left")
        record(self, what, **fields)

    def answers() -> Any:
        return b.engines[0].generate([asked[0]], GREEDY)[0].logprobs

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedDriver, "generate", heard)
        b.push(model.named_parameters())
    before = answers()
    perturb(model)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "record", full)
        with pytest.raises(bridge.PushAborted, match="no space left"):
            b.push(model.named_parameters())
    assert answers() == pytest.approx(before, abs=1e-4)


@pytest.mark.filterwarnings("ignore:Model has:UserWarning")
def test_a_trainer_that_cannot_map_a_new_arena_can_go_on_with_the_layout_before(
    make: Callable[..., LoraRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two layouts differ: LoRA on one end of a tied model makes two tensors of it, and its base is one."""
    rig = make(tiny_qwen2(tied=True), target_modules=["q_proj", "lm_head"])
    assert rig.push(mode="merged").verified is True

    def full(*_: Any, **__: Any) -> Arena:
        raise TransportError("an arena cannot be mapped", got="no address space")

    with monkeypatch.context() as patch:
        patch.setattr("bridge.client.Arena", SimpleNamespace(open=full))
        with pytest.raises(TransportError, match="no address space"):
            rig.push(mode="base")
    assert rig.push(mode="merged").verified is True
    assert rig.serves(rig.truth())
    assert rig.push(mode="base").verified is True
    assert rig.serves(rig.base_truth())
