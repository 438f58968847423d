"""Real pushes into the embedded engine of this process, compared with transformers and with the trainer's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bridge
from engine_side.embedded.config import LAYOUTS
from tests.conftest import perturb, tiny_qwen2, tiny_qwen3_moe
from tests.push.rig import PROMPTS, drift


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
