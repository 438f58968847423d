"""What can go wrong in a push, around it and around attach: the engine serves what it served, or refuses to serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bridge
from bridge.errors import Busy, ConfigError, EngineQuarantined, MissingTensor, PushAborted
from tests.contract.scenarios import closed, quarantine
from tests.rigs import EngineRig, difference, refuses_what_does_not_fit

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("k", [0, 1, 5, 9, "last"])
def test_a_push_that_fails_midway_leads_back(rig: EngineRig, k: int | str) -> None:
    before, said, version = rig.bits(), rig.said(), rig.version
    rig.step()
    with rig.broken_writes(rig.last_write if k == "last" else int(k)), pytest.raises(PushAborted):
        rig.push()
    assert str(rig.b.status().engines[0].serving) == version
    assert rig.version == version
    assert rig.bits() == before
    assert rig.said() == said, "packed weights too"


def test_an_engine_that_cannot_be_put_back_refuses(rig: EngineRig) -> None:
    rig.step()
    quarantine(rig)
    rig.wake()
    with pytest.raises(EngineQuarantined):
        rig.said()
    with closed(rig), pytest.raises(EngineQuarantined):
        rig.said()
    assert rig.push().verified is True
    rig.right()


def test_a_subset_leaves_the_rest_bit_identical(rig: EngineRig) -> None:
    before = rig.bits()
    kept = {n: p.detach().clone() for n, p in rig.model.named_parameters()}
    rig.step()
    layer = [(n, p) for n, p in rig.model.named_parameters() if ".layers.1." in n]
    with pytest.raises(MissingTensor):
        rig.b.push(layer)
    with torch.no_grad():
        for name, parameter in rig.model.named_parameters():
            if ".layers.1." not in name:
                parameter.copy_(kept[name])
    assert rig.b.push(layer, partial=True).verified is True
    after = rig.bits()
    assert {n for n in before if before[n] != after[n]} == {n for n in before if ".layers.1." in n}
    rig.right()


def test_only_norms(rig: EngineRig) -> None:
    norms = [(n, p) for n, p in rig.model.named_parameters() if "norm" in n]
    with torch.no_grad():
        for _, parameter in norms:
            parameter.mul_(1.25)
    assert rig.b.push(norms, partial=True).verified is True
    rig.right()


def test_caches_that_are_not_reset_are_found(rig: EngineRig) -> None:
    """Weights of seeds of their own: the check weighs one token, which may be as likely over old KV by chance."""
    rig.step(101)
    assert rig.push().verified is True
    rig.step(102)
    with rig.stale_caches(), pytest.raises(PushAborted, match="cache"):
        rig.push()


def test_weights_that_somebody_wrote_to_are_found(rig: EngineRig) -> None:
    rig.scale("model.norm.weight", 0.5)
    assert rig.b.health().status == "unhealthy"


def test_rollback(rig: EngineRig) -> None:
    said = rig.said()
    rig.step()
    rig.push()
    assert difference(rig.said(), said) > 0.1
    rig.b.rollback()
    assert rig.said() == said


def test_a_second_bridge_is_refused_and_leaves_the_first_as_it_was(rig: EngineRig) -> None:
    before = rig.hooks()
    with pytest.raises(Busy):
        bridge.attach(rig.handle, model=rig.model)
    assert rig.hooks() == before


def test_a_refused_attach_leaves_the_engine_as_it_was(rig: EngineRig, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*args: Any, **options: Any) -> Any:
        raise RuntimeError("on purpose")

    with closed(rig):
        before = rig.hooks()
        assert not before.get("threads")
        with pytest.raises(ConfigError, match="not a name"):
            bridge.attach(rig.handle, name="no/such name")
        with monkeypatch.context() as patch:
            patch.setattr("bridge.session.Coordinator", breaks)
            with pytest.raises(RuntimeError, match="on purpose"):
                bridge.attach(rig.handle)
        assert rig.hooks() == before


def test_prompts_and_samplings_that_do_not_fit(rig: EngineRig) -> None:
    """Of some of them SGLang's schedulers would die, and the trainer with them."""
    refuses_what_does_not_fit(rig.b.engines[0], rig.model.config.vocab_size, rig.longest)
