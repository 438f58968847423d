"""Real pushes into the embedded engine of this process, compared with transformers and with the trainer's bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from engine_side.embedded.config import LAYOUTS, EngineConfig
from engine_side.embedded.engine import Engine
from tests.conftest import perturb, tiny_qwen2, tiny_qwen3_moe
from trainer_side.reference import reference_logprobs

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2]]
Save = Callable[[Any], Path]


def drift(engine: Engine, model: Any) -> float:
    got, want = engine.prompt_logprobs(PROMPTS), reference_logprobs(model, PROMPTS)
    pairs = [(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


@pytest.fixture
def attached(checkpoint: Save) -> Iterator[Callable[..., tuple[Engine, bridge.Bridge]]]:
    made: list[Any] = []

    def attach(model: Any, **engine_args: Any) -> tuple[Engine, bridge.Bridge]:
        engine = Engine(EngineConfig(str(checkpoint(model)), **engine_args))
        made.append(engine)
        b = bridge.attach(engine, model=model)
        made.append(b)
        return engine, b

    yield attach
    for thing in reversed(made):
        thing.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [tiny_qwen2, tiny_qwen3_moe], ids=["dense", "moe"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_every_layout_serves_the_trainers_weights(attached: Any, layout: str, make: Any, wrapped: bool) -> None:
    model = make()
    engine, b = attached(model, layout=layout, wrap_linears=wrapped)
    for step in range(3):
        perturb(model, seed=step)
        assert drift(engine, model) > 0.01, "the step must be visible, else this test shows nothing"
        receipt = b.push(model.named_parameters())
        assert receipt.verified in (True, "partial")
        assert receipt.version == step + 1
        assert drift(engine, model) < 1e-4
    assert b.health().healthy


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tied_embeddings_reach_both_ends(attached: Any, layout: str) -> None:
    model = tiny_qwen2(tied=True)
    engine, b = attached(model, layout=layout)
    perturb(model)
    b.push(model.named_parameters())
    assert drift(engine, model) < 1e-4


def test_bf16_push_is_the_trainers_cast(attached: Any) -> None:
    model = tiny_qwen2()
    engine, b = attached(model, dtype="bf16")
    perturb(model)
    receipt = b.push(model.named_parameters())
    assert receipt.verified is True
    live = dict(engine.runner.model.named_parameters())
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(live[name], dict(model.named_parameters())[name].to(torch.bfloat16))


def test_rollback_returns_the_previous_bits(attached: Any) -> None:
    model = tiny_qwen2()
    engine, b = attached(model)
    perturb(model, 1)
    b.push(model.named_parameters())
    first = engine.prompt_logprobs(PROMPTS)
    perturb(model, 2)
    b.push(model.named_parameters())
    assert engine.prompt_logprobs(PROMPTS) != first
    receipt = b.rollback()
    assert receipt.version == 1
    assert engine.prompt_logprobs(PROMPTS) == first
    with pytest.raises(bridge.StaleVersion):
        b.rollback()
    assert b.push(model.named_parameters()).version == 3
    assert drift(engine, model) < 1e-4


def test_unchanged_weights_write_nothing(attached: Any) -> None:
    model = tiny_qwen2()
    _, b = attached(model)
    b.push(model.named_parameters())
    b.push(model.named_parameters())
    receipt = b.push(model.named_parameters())
    assert receipt.wire_nbytes == 0
    assert receipt.verified is True


def test_rollouts_carry_the_version(attached: Any) -> None:
    model = tiny_qwen2()
    _, b = attached(model)
    sampling = bridge.Sampling(max_tokens=4, temperature=0.0)
    assert b.engines[0].generate([[1, 2, 3]], sampling)[0].weight_version == 0
    b.push(model.named_parameters())
    assert b.engines[0].generate([[1, 2, 3]], sampling)[0].weight_version == 1


def test_a_subset_changes_only_what_was_sent(attached: Any) -> None:
    model = tiny_qwen2()
    engine, b = attached(model)
    before = {n: p.clone() for n, p in engine.runner.model.named_parameters()}
    norms = [(n, p) for n, p in model.named_parameters() if n.endswith("norm.weight")]
    with torch.no_grad():
        for _, parameter in norms:
            parameter.mul_(1.5)
    with pytest.raises(bridge.MissingTensor):
        b.push(norms)
    b.push(norms, partial=True)
    for name, parameter in engine.runner.model.named_parameters():
        assert torch.equal(parameter, before[name]) is not name.endswith("norm.weight"), name
    b.push(model.named_parameters())
    assert drift(engine, model) < 1e-4
