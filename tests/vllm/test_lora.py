"""With `enable_lora=True`: weights through the wrappers, adapters in memory beside those that the user loaded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from tests.rigs import difference
from tests.vllm.families import WITH_LORA
from tests.vllm.rig import PROMPTS
from trainer_side.reference import reference_logprobs

pytestmark = pytest.mark.timeout(300)
CASES = [*((family, "inproc") for family in WITH_LORA), ("qwen2", "mp"), ("qwen2", "tp2")]
TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "down_proj"],
    "deepseek-dense": ["q_b_proj", "o_proj"],
}
"""Some parts of fused layers and not others, where there are parts."""
LARGEST = 0.025


def jiggle(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.15).to(parameter.dtype))


@pytest.mark.parametrize(("family", "how"), CASES, ids=lambda value: str(value))
def test_adapters_and_the_base_below_them(rigs: Any, tmp_path: Path, family: str, how: str) -> None:
    import peft
    from vllm.lora.request import LoRARequest

    rig = rigs.get(family, how=how, lora=True)
    rig.b.bind(rig.model)
    rig.push()  # whatever the test before has left
    parts = TARGETS.get(family, ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=parts)
    model = peft.get_peft_model(rig.model, config)
    jiggle(model, 1)
    model.save_pretrained(tmp_path)
    users = LoRARequest("mine", 7, str(tmp_path))
    noise = difference(rig.said(users), reference_logprobs(model, PROMPTS))
    with model.disable_adapter():
        noise = max(noise, difference(rig.said(), reference_logprobs(model, PROMPTS)))
    limit = min(3 * noise, LARGEST)  # vLLM's own noise, with an adapter that it has read itself
    rig.b.bind(model)

    receipt = rig.b.push(model.named_parameters(), mode="adapter")
    assert receipt.verified is True
    assert 7 in rig.llm.llm_engine.list_loras()
    first = rig.b.engines[0].generate(PROMPTS, bridge.Sampling(max_tokens=4, temperature=0.0))
    jiggle(model, 2)
    assert rig.b.push(model.named_parameters(), mode="adapter").verified is True
    assert len(rig.llm.llm_engine.list_loras()) == 2, "the adapter before was dropped, the user's stays"
    assert rig.b.engines[0].generate(PROMPTS, bridge.Sampling(max_tokens=4, temperature=0.0)) != first

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.mul_(1.06)
    assert rig.b.push(model.named_parameters(), mode="base").verified is True
    with model.disable_adapter():
        assert difference(rig.said(), reference_logprobs(model, PROMPTS)) < limit
    assert 7 in rig.llm.llm_engine.list_loras()
    assert difference(rig.said(users), rig.said()) > 0.2, "the user's adapter still acts"
    jiggle(model, 3)
    assert rig.b.push(model.named_parameters(), mode="adapter").verified is True
    assert rig.b.push(model.named_parameters(), mode="merged").verified is True
    assert difference(rig.said(), reference_logprobs(model, PROMPTS)) < limit


def test_users_adapters_that_are_idle_make_room(rigs: Any, tmp_path: Path) -> None:
    """Three slots, all taken: the one used least recently leaves, and comes back when it is asked for. Pinned ones
    stay; where only such are left, their numbers are named, and "auto" does without an adapter."""
    import peft
    from vllm.lora.request import LoRARequest

    rig = rigs.get("qwen2", lora=True, how="inproc")
    model = peft.get_peft_model(rig.model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    engine = rig.llm.llm_engine
    users = [LoRARequest(f"mine{k}", k, str(tmp_path / str(k))) for k in (11, 12, 13)]
    for user in users:
        jiggle(model, user.lora_int_id)
        model.save_pretrained(user.lora_path)
        engine.add_lora(user)
        engine.pin_lora(user.lora_int_id)
    rig.b.bind(model)
    receipt = rig.b.push(model.named_parameters())
    assert receipt.mode == "merged"
    assert "11 (pinned)" in receipt.reason
    assert rig.b.push(model.named_parameters(), mode="base").verified is True
    for user in users:
        engine.remove_lora(user.lora_int_id)

    before = [rig.said(user) for user in users]
    assert engine.list_loras() == {11, 12, 13}
    assert rig.b.push(model.named_parameters(), mode="adapter").verified is True
    assert {12, 13} < set(engine.list_loras()), "11 was used least recently"
    assert [rig.said(user) for user in users] == before
    rig.said(users[2])
    engine.pin_lora(13)
    engine.add_lora(users[1])
    engine.pin_lora(12)
    with pytest.raises(bridge.BridgeError, match=r"12 \(pinned\)"):
        rig.b.push(model.named_parameters(), mode="adapter")
    for user in users:
        engine.remove_lora(user.lora_int_id)
    model.unload()


def test_a_rollout_does_not_outlive_the_base_below_its_adapter(rigs: Any) -> None:
    import peft

    rig = rigs.get("qwen2", lora=True, how="inproc")
    model = peft.get_peft_model(rig.model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    jiggle(model, 5)
    rig.b.bind(model)
    assert rig.b.push(model.named_parameters(), mode="base").verified is True
    assert rig.b.push(model.named_parameters(), mode="adapter").verified is True
    asked = bridge.Sampling(max_tokens=200, temperature=0.0)
    with ThreadPoolExecutor(1) as pool:
        rolling = pool.submit(rig.b.engines[0].generate, PROMPTS[:1], asked)
        while not (rig.llm.llm_engine.has_unfinished_requests() or rolling.done()):
            pass
        assert rig.b.push(model.named_parameters(), mode="merged", inflight="keep").verified is True
        (said,) = rolling.result(60)
    model.unload()
    rig.b.bind(rig.model)
    assert rig.push().verified is True
    assert said.finish_reason == "abort", "an adapter over weights that have it merged in would act twice"


def test_an_llm_without_the_backend_is_told_the_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import LLM

    from tests.vllm.families import make_model

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    make_model("llama").save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), skip_tokenizer_init=True, enforce_eager=True, max_model_len=128, dtype="bfloat16")
    try:
        with pytest.raises(bridge.ConfigError, match=r'WeightTransferConfig\(backend="bridge"\)'):
            bridge.attach(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
