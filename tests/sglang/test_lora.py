"""With `enable_lora=True`: weights through the wrappers, adapters in memory beside those that the user loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from tests.rigs import difference
from tests.sglang.rig import PROMPTS
from trainer_side.reference import reference_logprobs

pytestmark = pytest.mark.timeout(300)
CASES = [("qwen2", 1), ("qwen2-tied", 1), ("llama", 1), ("qwen3", 1), ("phi3", 1), ("gemma2", 1), ("qwen2", 2)]
LIMIT = 0.03


def jiggle(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.15).to(parameter.dtype))


def scale_base(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.mul_(1.06)


def own_update_changes_no_wrapped_layer(rig: Any, model: Any) -> None:
    """SGLang's own update with the names that a trainer with adapters has reports success and loads none of them."""
    before = rig.inside("bits")
    named = [(n.removeprefix("base_model.model."), p.detach().clone()) for n, p in model.named_parameters()]
    sent = [(n, p) for n, p in named if n.endswith(".base_layer.weight")]
    assert sent
    assert rig.own_update(sent)[0] is True
    assert rig.inside("bits") == before


@pytest.mark.parametrize(("family", "tp"), CASES, ids=str)
def test_adapters_and_the_base_below_them(rigs: Any, tmp_path: Path, family: str, tp: int) -> None:
    import peft

    rig = rigs.get(family, tp=tp, lora=True)
    fused = ["qkv_proj", "o_proj", "down_proj"]
    parts = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=fused if family == "phi3" else parts)
    model = peft.get_peft_model(rig.model, config)
    jiggle(model, 1)
    model.save_pretrained(tmp_path)
    assert rig.engine.load_lora_adapter("mine", str(tmp_path)).success
    assert difference(rig.said("mine"), reference_logprobs(model, PROMPTS)) < LIMIT
    rig.b.bind(model)

    receipt = rig.b.push(model.named_parameters(), mode="adapter")
    assert receipt.verified is True
    first = rig.b.engines[0].generate(PROMPTS, bridge.Sampling(max_tokens=4, temperature=0.0))
    jiggle(model, 2)
    receipt = rig.b.push(model.named_parameters(), mode="adapter")
    assert receipt.verified is True
    assert rig.b.engines[0].generate(PROMPTS, bridge.Sampling(max_tokens=4, temperature=0.0)) != first
    served = receipt.engines[0].adapter
    assert difference(rig.said(served), reference_logprobs(model, PROMPTS)) < LIMIT
    assert rig.inside("adapters") == sorted(["mine", served]), "the adapter before was dropped, the user's stays"

    scale_base(model)
    if family == "qwen2":  # others raise a KeyError that ends SGLang's scheduler
        own_update_changes_no_wrapped_layer(rig, model)
    assert rig.b.push(model.named_parameters(), mode="base").verified is True
    with model.disable_adapter():
        assert difference(rig.said(), reference_logprobs(model, PROMPTS)) < LIMIT
    assert difference(rig.said("mine"), rig.said()) > 0.1, "the user's adapter still acts"
    jiggle(model, 3)
    assert rig.b.push(model.named_parameters(), mode="adapter").verified is True
    assert rig.b.push(model.named_parameters(), mode="merged").verified is True
    assert difference(rig.said(), reference_logprobs(model, PROMPTS)) < LIMIT
