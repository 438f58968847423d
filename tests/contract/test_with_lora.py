"""An engine that takes LoRA: weights through its wrappers, LoRAs in memory beside those that its user loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import bridge
from bridge.errors import BridgeError, NotFound, UnexpectedTensor, UnsupportedLora
from tests.contract.scenarios import attempt, jiggle
from tests.rigs import PROMPTS, Case, EngineRig, difference
from trainer_side.reference import reference_logprobs

pytestmark = pytest.mark.timeout(300)
PARTS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
"""Some parts of fused layers and not others."""
FUSED = ["qkv_proj", "o_proj", "down_proj"]
LARGEST = 0.025
GREEDY = bridge.Sampling(max_tokens=4, temperature=0.0)


def a_user_loads_one(rig: EngineRig, model: Any, folder: Path) -> tuple[Any, float]:
    """What `said` takes for it, and how far the engine is from transformers with a LoRA that it has read itself."""
    if rig.no_user_loras:
        with pytest.raises(NotFound):
            rig.said("mine")
        return None, LARGEST
    model.save_pretrained(folder)
    mine = rig.user_lora(folder)
    noise = difference(rig.said(mine), reference_logprobs(model, PROMPTS))
    with model.disable_adapter():
        return mine, max(noise, difference(rig.said(), reference_logprobs(model, PROMPTS)))


def test_loras_and_the_base_below_them(rigs: Any, tmp_path: Path, lora_case: Case) -> None:
    family, ways = lora_case
    rig: EngineRig = rigs.get(family, **ways)
    rig.b.bind(rig.model)
    assert rig.push().verified is True
    parts = list(rig.lora_targets.get(family, FUSED if family == "phi3" else PARTS))
    model = peft.get_peft_model(rig.model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=parts))
    jiggle(model, 1)
    mine, noise = a_user_loads_one(rig, model, tmp_path)
    limit, users = min(3 * noise, LARGEST), rig.loras()
    rig.b.bind(model)

    assert rig.b.push(model.named_parameters(), mode="adapter").verified is True
    assert set(users) < set(rig.loras())
    first = rig.b.engines[0].generate(PROMPTS, GREEDY)
    jiggle(model, 2)
    receipt = rig.b.push(model.named_parameters(), mode="adapter")
    assert receipt.verified is True
    assert set(users) < set(rig.loras()), "the user's stays"
    assert len(rig.loras()) == len(users) + 1, "the LoRA before was dropped"
    assert rig.b.engines[0].generate(PROMPTS, GREEDY) != first
    assert difference(rig.said(rig.our_lora(receipt)), reference_logprobs(model, PROMPTS)) < limit

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.mul_(1.06)
    assert rig.b.push(model.named_parameters(), mode="base").verified is True
    with model.disable_adapter():
        assert difference(rig.said(), reference_logprobs(model, PROMPTS)) < limit
    assert set(users) <= set(rig.loras())
    if mine is not None:
        assert difference(rig.said(mine), rig.said()) > 0.2, "the user's LoRA still acts"
    jiggle(model, 3)
    assert rig.b.push(model.named_parameters(), mode="adapter").verified is True
    assert rig.b.push(model.named_parameters(), mode="merged").verified is True
    assert difference(rig.said(), reference_logprobs(model, PROMPTS)) < limit
    model.unload()
    rig.b.bind(rig.model)


@pytest.mark.parametrize(("parts", "rank"), [(("q_proj",), 32), (("q_proj", "lm_head"), 4)], ids=["rank", "module"])
def test_a_lora_that_the_engine_cannot_hold(rigs: Any, parts: tuple[str, ...], rank: int) -> None:
    """A rank above its slots, or a module that it did not wrap: refused, merged weights are what the message offers,
    and they are the trainer's policy."""
    rig: EngineRig = rigs.get("qwen2", lora=True)
    rig.b.bind(rig.model)
    assert rig.push().verified is True
    noise = difference(rig.said(), rig.wanted())
    model = peft.get_peft_model(rig.model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(parts)))
    jiggle(model, 5)
    rig.b.bind(model)
    try:
        done = attempt(lambda: rig.b.push(model.named_parameters(), mode="adapter"))
        if isinstance(done, BridgeError):
            assert isinstance(done, UnsupportedLora | UnexpectedTensor), done
            assert "merged" in str(done.remedy), done
            done = rig.b.push(model.named_parameters(), mode="merged")
        assert done.verified is True
        assert done.mode == "merged" or rank == 4
        said = rig.said(rig.our_lora(done)) if done.mode == "adapter" else rig.said()
        assert difference(said, reference_logprobs(model, PROMPTS)) < max(3 * noise, LARGEST)
    finally:
        model.unload()
        rig.b.bind(rig.model)
