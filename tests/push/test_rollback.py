"""Back by one version, by bits: after jumps, failures and subsets, in every layout; numbers are never given twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from bridge.errors import EngineQuarantined, MissingTensor, NonFinite, PushAborted, StaleVersion
from engine_side.embedded.config import LAYOUTS
from tests.conftest import tiny_qwen2, tiny_qwen3_moe
from tests.push import faults
from tests.push.rig import Rig, refused

Save = Callable[[Any], Path]
MAKERS = {"dense": tiny_qwen2, "moe": tiny_qwen3_moe}
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def folders(checkpoint: Save) -> dict[str, Path]:
    return {name: checkpoint(make()) for name, make in MAKERS.items()}


@pytest.fixture
def rig_of(folders: dict[str, Path]) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(kind: str = "dense", **options: Any) -> Rig:
        made.append(Rig(folders[kind], MAKERS[kind](), **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


def nothing_to_return_to(rig: Rig) -> None:
    now = rig.b.status().committed
    with rig.unmoved(then_push=False), refused(StaleVersion, 6, "no previous version", "one level deep", str(now)):
        rig.b.rollback()


@LAYOUT
@pytest.mark.parametrize("kind", MAKERS)
def test_one_level_by_bits_and_numbers_go_on(rig_of: Callable[..., Rig], layout: str, kind: str) -> None:
    rig = rig_of(kind, layout=layout)
    assert rig.good_push(version=10).version == 10
    ten = rig.seen()
    assert rig.good_push().version == 11
    assert not rig.seen().same(ten)
    receipt = rig.b.rollback()
    assert (receipt.version, receipt.reason, receipt.error) == (10, "rollback", None)
    assert receipt.verified in (True, "partial"), "a rollback is verified like a push"
    assert rig.seen().same(ten)
    info = rig.b.status()
    assert (info.committed, info.highest, info.engines[0].serving) == (10, 11, 10)
    assert rig.b.engines[0].generate([[1, 2, 3]], bridge.Sampling(max_tokens=1))[0].weight_version == 10
    assert rig.b.health().healthy
    nothing_to_return_to(rig)
    with refused(StaleVersion, 6, "above 11"):
        rig.push(version=11)
    assert rig.good_push().version == 12
    rig.b.rollback()
    assert rig.seen().same(ten)


@LAYOUT
@pytest.mark.parametrize("kind", MAKERS)
def test_back_to_the_engines_own_checkpoint(rig_of: Callable[..., Rig], layout: str, kind: str) -> None:
    """Version 0 can be returned to as well, read back or from the checkpoint where storage is packed."""
    rig = rig_of(kind, layout=layout)
    nothing_to_return_to(rig)
    zero = rig.seen()
    rig.good_push()
    assert rig.b.rollback().version == 0
    assert rig.seen().same(zero)
    assert rig.b.status().engines[0].serving == 0
    assert rig.b.health().healthy
    rig.good_push()


@LAYOUT
@pytest.mark.parametrize("kind", MAKERS)
def test_a_first_push_that_fails_at_its_end(
    rig_of: Callable[..., Rig], layout: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything was written and verified, then the caches cannot be reset: all of it has to come back."""
    rig = rig_of(kind, layout=layout)
    answers = iter([False])
    reset = rig.engine.reset_prefix_cache
    with rig.unmoved(), monkeypatch.context() as patch:
        patch.setattr(rig.engine, "reset_prefix_cache", lambda **k: next(answers, True) and reset(**k))
        perturbed = [(n, p + 0.01) for n, p in rig.named()]
        with pytest.raises(PushAborted, match="cache") as caught:
            rig.b.push(perturbed, verify="weights")
    assert caught.value.serving == {"engine0": 0}


@LAYOUT
def test_a_failed_push_leaves_nothing_older_to_return_to(
    rig_of: Callable[..., Rig], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slots: a push that got as far as its snapshot has written over the version before the served one."""
    rig = rig_of(layout=layout)
    rig.good_push()
    rig.good_push()
    rig.step()
    with rig.unmoved(then_push=False), monkeypatch.context() as patch:
        faults.Breaker(patch, 2)
        with pytest.raises(PushAborted):
            rig.push()
    two = rig.seen()
    nothing_to_return_to(rig)
    assert rig.good_push().version == 4
    assert rig.b.rollback().version == 2
    assert rig.seen().same(two)


@LAYOUT
def test_what_is_refused_before_its_snapshot_costs_no_rollback(rig_of: Callable[..., Rig], layout: str) -> None:
    rig = rig_of(layout=layout)
    rig.good_push()
    one = rig.seen()
    rig.good_push()
    with rig.unmoved(then_push=False):
        with pytest.raises(MissingTensor):
            rig.b.push(rig.named()[1:])
        with pytest.raises(StaleVersion):
            rig.push(version=1)
        with pytest.raises(bridge.ConfigError):
            rig.push(kv="maybe")
    assert rig.b.rollback().version == 1
    assert rig.seen().same(one)


@LAYOUT
def test_nan_then_rollback(rig_of: Callable[..., Rig], layout: str) -> None:
    rig = rig_of(layout=layout)
    one = rig.good_push() and rig.seen()
    bad = dict(rig.named())[faults.DOWN].clone()
    bad[0, 0] = math.nan
    with rig.unmoved(then_push=False), pytest.raises(NonFinite):
        rig.b.push(rig.replaced(faults.DOWN, bad))
    nothing_to_return_to(rig)
    rig.good_push()
    assert rig.b.rollback().version == 1
    assert rig.seen().same(one)


@LAYOUT
def test_nan_that_was_let_pass_is_taken_back(rig_of: Callable[..., Rig], layout: str) -> None:
    """With the bound model: trainer and engine agree that the answers are undefined, so the push verifies."""
    rig = rig_of(layout=layout)
    one = rig.good_push() and rig.seen()
    weight = rig.model.get_parameter(faults.DOWN)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = math.nan
    receipt = rig.push(allow_nonfinite=True)
    assert receipt.verified in (True, "partial")
    assert all(math.isnan(x) for row in rig.engine.prompt_logprobs([[1, 2, 3]]) for x in row)
    assert rig.b.rollback().version == 1
    assert rig.seen().same(one)
    with torch.no_grad():
        weight.copy_(kept)
    rig.good_push()


@LAYOUT
def test_back_over_a_subset(rig_of: Callable[..., Rig], layout: str) -> None:
    rig = rig_of(layout=layout)
    rig.good_push()
    one = rig.seen()
    before = {n: p.clone() for n, p in rig.named()}
    rig.step()
    layer = [(n, p) for n, p in rig.named() if n.startswith("model.layers.1.")]
    receipt = rig.b.push(layer, partial=True)
    assert receipt.verified in (True, "partial")
    assert receipt.version == 2
    sent = dict(layer)
    mixed = tiny_qwen2()
    mixed.load_state_dict({n: sent.get(n, before[n]) for n in before}, strict=False)
    assert rig.serves(mixed), "what was sent is new, what was not is as before"
    assert rig.b.rollback().version == 1
    assert rig.seen().same(one)
    rig.good_push()
    rig.b.rollback()
    assert rig.seen().same(one)


@LAYOUT
def test_a_subset_that_fails_leads_back(
    rig_of: Callable[..., Rig], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of(layout=layout)
    rig.good_push()
    for k in (0, 1, 3):
        rig.step()
        layer = [(n, p) for n, p in rig.named() if n.startswith("model.layers.1.")]
        with rig.unmoved(then_push=False), monkeypatch.context() as patch:
            faults.Breaker(patch, k)
            with pytest.raises(PushAborted, match=f"write {k} failed"):
                rig.b.push(layer, partial=True)
    rig.good_push()


@LAYOUT
def test_a_first_push_of_a_subset(rig_of: Callable[..., Rig], layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back to the checkpoint, then forth to the whole model, and back again to what the subset had made."""
    rig = rig_of(layout=layout)
    zero = rig.seen()
    rig.step()
    layer = [(n, p) for n, p in rig.named() if n.startswith("model.layers.1.")]
    with rig.unmoved(then_push=False), monkeypatch.context() as patch:
        faults.Breaker(patch, 2)
        with pytest.raises(PushAborted):
            rig.b.push(layer, partial=True)
    rig.b.push(layer, partial=True)
    assert not rig.seen().same(zero)
    rig.b.rollback()
    assert rig.seen().same(zero)
    rig.good_push()
    rig.b.rollback()
    assert rig.seen().same(zero)


@LAYOUT
def test_a_whole_model_after_a_subset(rig_of: Callable[..., Rig], layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine then holds its checkpoint with a subset over it; a push that fails must lead back to exactly that."""
    rig = rig_of(layout=layout)
    rig.step()
    rig.b.push([(n, p) for n, p in rig.named() if n.startswith("model.layers.1.")], partial=True)
    mixed = rig.seen()
    rig.step()
    with rig.unmoved(then_push=False), monkeypatch.context() as patch:
        faults.Breaker(patch, 5)
        with pytest.raises(PushAborted) as caught:
            rig.push()
        assert type(caught.value) is PushAborted
    rig.good_push()
    assert rig.b.rollback().version == 1
    assert rig.seen().same(mixed)


def test_a_rollback_that_fails_stays_where_it_was(rig_of: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rig_of()
    rig.good_push()
    one = rig.seen()
    rig.good_push()
    with rig.unmoved(then_push=False), monkeypatch.context() as patch:
        faults.Breaker(patch, 3)
        with pytest.raises(PushAborted, match="write 3 failed") as caught:
            rig.b.rollback()
        assert caught.value.serving == {"engine0": 2}
    assert rig.b.rollback().version == 1, "the version before is still there"
    assert rig.seen().same(one)


def test_a_rollback_that_is_corrupt_is_refused(rig_of: Callable[..., Rig]) -> None:
    """Bits of the previous version changed in the arena meanwhile: found before anything is written."""
    rig = rig_of()
    rig.good_push()
    rig.good_push()
    arena = rig.b.arena
    assert arena is not None
    slot = next(s for s in range(arena.slots) if getattr(arena.seal_of(s), "version", 0) == 1)
    arena.flat(slot)[arena.manifest.by_name[faults.DOWN].offset] ^= 1
    with rig.unmoved(), pytest.raises(bridge.DigestMismatch, match="down_proj"):
        rig.b.rollback()


def test_rollback_cannot_lift_a_quarantine(rig_of: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine serves nothing after a push and its way back failed; no older version is kept, a push mends it."""
    rig = rig_of()
    rig.good_push()
    rig.step()
    with monkeypatch.context() as patch:
        faults.Breaker(patch, 3, always=True)
        with pytest.raises(EngineQuarantined):
            rig.push()
    with refused(StaleVersion, 6, "no previous version"):
        rig.b.rollback()
    assert rig.b.status().engines[0].state == "QUARANTINED"
    rig.good_push()
    assert rig.b.rollback().version == 1


def test_numbers_survive_the_bridge(rig_of: Callable[..., Rig]) -> None:
    """A named journal remembers the highest version ever issued, whatever became of it."""
    rig = rig_of(name="numbers")
    rig.good_push(version=41)
    rig.good_push()
    rig.b.rollback()
    with pytest.raises(NonFinite):
        rig.b.push(rig.replaced(faults.DOWN, torch.full_like(dict(rig.named())[faults.DOWN], math.inf)))
    rig.b.close()
    rig.b = bridge.attach(rig.engine, model=rig.model, name="numbers")
    assert rig.b.status().highest == 43
    with refused(StaleVersion, 6, "above 43"):
        rig.push(version=43)
    assert rig.good_push().version == 44


@LAYOUT
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_quarantined_engine_is_no_source_of_a_version(
    rig_of: Callable[..., Rig], layout: str, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new layout is planned while the engine holds the ruins of a push: they must never be restored as a version."""
    rig = rig_of(layout=layout)
    if not first:
        rig.good_push()
    before = rig.seen()
    rig.step()
    with monkeypatch.context() as patch:
        faults.Breaker(patch, 3, always=True)
        with pytest.raises(EngineQuarantined):
            rig.push()
    with monkeypatch.context() as patch:
        faults.Breaker(patch, 5)
        with pytest.raises(PushAborted):
            rig.b.push([(n, p.to(torch.bfloat16)) for n, p in rig.named()], verify="weights")
    state = rig.b.status().engines[0].state
    assert state == "QUARANTINED" or rig.seen().same(before)
    assert state == "SERVING", "the version before lies in the older arena still"
    rig.good_push()


@pytest.mark.parametrize("layout", ["canonical", "packed"])
def test_a_changed_dtype_keeps_the_way_back(
    rig_of: Callable[..., Rig], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of(layout=layout)
    rig.good_push()
    one = rig.seen()
    rig.step()
    halves = [(n, p.to(torch.bfloat16)) for n, p in rig.named()]
    with rig.unmoved(then_push=False), monkeypatch.context() as patch:
        faults.Breaker(patch, 5)
        with pytest.raises(PushAborted):
            rig.b.push(halves, verify="weights")
    rig.b.push(halves, verify="weights")
    assert rig.b.rollback().version == 1
    assert rig.seen().same(one)
