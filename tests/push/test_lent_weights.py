"""Pushes into engines that pack a layer's weights straight from the arena's memory, as they do with large ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bridge
from tests.conftest import tiny_qwen2, tiny_qwen3_moe
from tests.engine_side import embedded_models as tiny
from tests.push import faults
from tests.push.lora_rig import LoraRig, new_base, wrap
from tests.push.rig import Rig

Make = Callable[..., Rig]


@pytest.fixture
def make(small_weights_are_lent: list[int], checkpoint: Callable[[Any], Path]) -> Iterator[Make]:
    """`make(model, **config)`: a rig around an engine with packed layers that starts from the model's checkpoint."""
    made: list[Rig] = []

    def build(model: Any, **config: Any) -> Rig:
        made.append(Rig(checkpoint(model), model, **{"layout": "packed", "threads": 1, **config}))
        return made[-1]

    yield build
    for rig in made:
        rig.close()
    assert small_weights_are_lent, "no weight was lent: the test ran the ordinary path"


MODELS: dict[str, Callable[[], Any]] = {
    "dense": tiny_qwen2,
    "tied": lambda: tiny_qwen2(tied=True),
    "moe": tiny_qwen3_moe,
    "deepseek-v3": lambda: tiny.make_model("deepseek-v3"),
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize("model", MODELS)
def test_every_version_serves_alone(make: Make, model: str, wrapped: bool) -> None:
    rig = make(MODELS[model](), wrap_linears=wrapped)
    rig.good_push()
    first = rig.seen()
    rig.good_push()
    second = rig.seen()
    rig.step()
    with pytest.raises(bridge.NonFinite):
        rig.b.push([(n, p * float("nan")) for n, p in rig.named()])  # was written over the first version
    assert rig.seen().same(second), "what lies in the arena shows through"
    rig.good_push()
    rig.b.rollback()
    assert rig.seen().same(second)
    assert not rig.seen().same(first)
    assert rig.b.health().healthy
    rig.good_push()


def test_a_cast_on_the_way_is_not_lent_as_it_stands(make: Make) -> None:
    rig = make(tiny_qwen2(), dtype="bf16")
    rig.step()
    assert rig.push().verified is True
    assert rig.serves(rig.model, limit=0.1)


def test_a_subset_is_packed_with_what_was_there(make: Make) -> None:
    rig = make(tiny_qwen2())
    rig.good_push()
    rig.step()
    layer = [(n, p) for n, p in rig.model.named_parameters() if ".layers.1." in n]
    assert rig.b.push(layer, partial=True).verified is not False
    assert not rig.serves(rig.model)
    rig.b.push(rig.model.named_parameters())
    assert rig.serves(rig.model)


def test_a_post_load_step_that_was_skipped_is_found(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its storage moved there and back again, and the way back runs no attributes level: the next push is no fault."""
    rig = make(tiny_qwen2())
    rig.good_push()
    rig.step()
    with rig.unmoved(), monkeypatch.context() as patch:
        faults.skip_post_load(rig, patch)
        with pytest.raises(bridge.PushAborted, match="outputs off"):
            rig.push(verify="weights")


@pytest.mark.parametrize("k", [0, 3, 8])
def test_a_load_that_broke_off_is_taken_back(make: Make, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    rig = make(tiny_qwen2())
    rig.good_push()
    rig.step()
    with rig.unmoved(), monkeypatch.context() as patch:
        breaker = faults.Breaker(patch, k)
        with pytest.raises(bridge.PushAborted):
            rig.push()
        assert breaker.fired


@pytest.mark.parametrize("mode", ["merged", "base"])
def test_lora_pushes(small_weights_are_lent: list[int], checkpoint: Callable[[Any], Path], mode: str) -> None:
    base = tiny_qwen2()
    rig = LoraRig(checkpoint(base), wrap(base), layout="packed")
    try:
        for seed in (1, 2):
            new_base(rig, seed)
            rig.push(mode=mode)
            assert rig.serves(rig.truth() if mode == "merged" else rig.base_truth())
    finally:
        rig.close()
    assert small_weights_are_lent
