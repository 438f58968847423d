"""vLLM's LoRA slots, which users and pushes share, and rollouts that use one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import bridge
from tests.contract.scenarios import jiggle, wait_for
from tests.families import make_model
from tests.rigs import PROMPTS

pytestmark = pytest.mark.timeout(300)


def test_users_adapters_that_are_idle_make_room(rigs: Any, tmp_path: Path) -> None:
    """Three slots, all taken: the one used least recently leaves, and comes back when it is asked for. Pinned ones
    stay; where only such are left, their numbers are named, and "auto" does without an adapter."""
    import peft
    from vllm.lora.request import LoRARequest

    rig = rigs.get("qwen2", lora=True)
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

    rig = rigs.get("qwen2", lora=True)
    model = peft.get_peft_model(rig.model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    jiggle(model, 5)
    rig.b.bind(model)
    assert rig.b.push(model.named_parameters(), mode="base").verified is True
    assert rig.b.push(model.named_parameters(), mode="adapter").verified is True
    asked = bridge.Sampling(max_tokens=200, temperature=0.0)
    with ThreadPoolExecutor(1) as pool:
        rolling = pool.submit(rig.b.engines[0].generate, PROMPTS[:1], asked)
        wait_for(lambda: rig.busy or rolling.done())
        assert rig.b.push(model.named_parameters(), mode="merged", inflight="keep").verified is True
        (said,) = rolling.result(60)
    model.unload()
    rig.b.bind(rig.model)
    assert rig.push().verified is True
    assert said.finish_reason == "abort", "an adapter over weights that have it merged in would act twice"


def test_an_llm_without_the_backend_is_told_the_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import LLM

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    make_model("llama").save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), skip_tokenizer_init=True, enforce_eager=True, max_model_len=128, dtype="bfloat16")
    try:
        with pytest.raises(bridge.ConfigError, match=r'WeightTransferConfig\(backend="bridge"\)'):
            bridge.attach(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
