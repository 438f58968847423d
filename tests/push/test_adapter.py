"""Adapter pushes: A and B as a versioned adapter of the engine, over the base that it was trained on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from bridge.errors import (
    ConfigError,
    PushAborted,
    UnexpectedTensor,
    UnsupportedLora,
)
from engine_side.embedded.lora.manager import LoraManager
from tests.conftest import perturb, tiny_qwen2, tiny_qwen3_moe
from tests.push.lora_rig import LoraRig, apart
from tests.push.rig import PROMPTS, refused

Make = Callable[..., LoraRig]


# ---- versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [{}, {"tensor_parallel_size": 2}, {"layout": "packed"}, {"wrap_levels": 2}])
def test_versions_follow_each_other(make: Make, engine: dict[str, Any]) -> None:
    rig = make(engine=engine)
    base = rig.base_truth()
    names = []
    for version in (1, 2, 3):
        rig.step()
        receipt = rig.push(mode="adapter")
        assert (receipt.version, receipt.mode, receipt.verified) == (version, "adapter", True), receipt
        names.append(receipt.engines[0].adapter)
        assert rig.engine.adapters == (names[-1],), "the one before is dropped, the new one is there"
        assert rig.serves(rig.truth())
        assert rig.serves(base, "base")
        assert apart(rig.answers(), rig.answers("base")) > 0.01, "the adapter acts"
    assert len(set(names)) == 3, "a name is never used twice"
    completion = rig.b.engines[0].generate(PROMPTS, bridge.Sampling(max_tokens=2))[0]
    assert completion.weight_version == 3
    assert rig.b.health().healthy


def test_auto_chooses_the_adapter_and_says_why(make: Make) -> None:
    receipt = make().push()
    assert receipt.mode == "adapter"
    assert receipt.reason


def test_only_the_adapter_travels(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    rig.step()
    receipt = rig.push(mode="adapter")
    lora = sum(
        p.numel() for n, p in rig.model.named_parameters() if "lora_A" in n.split(".") or "lora_B" in n.split(".")
    )
    assert receipt.nbytes == lora * 4


def test_the_trained_parameters_alone_will_do(make: Make) -> None:
    rig = make()
    rig.b.push(((n, p) for n, p in rig.model.named_parameters() if p.requires_grad), mode="adapter")
    assert rig.serves(rig.truth())


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 7}},
        {"adapter": "policy"},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["v_proj"]},
    ],
)
def test_what_the_table_allows_arrives_right(make: Make, lora: dict[str, Any]) -> None:
    rig = make(**lora)
    assert rig.push(mode="adapter").verified is True
    assert rig.serves(rig.truth())


def test_scale_set_at_run_time(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    for module in rig.model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    receipt = rig.push(mode="adapter")
    assert receipt.wire_nbytes > 0
    assert rig.serves(rig.truth())


def test_two_active_adapters_become_one(make: Make) -> None:
    from peft import LoraConfig

    rig = make()
    rig.model.add_adapter("other", LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj", "down_proj"]))
    rig.model.base_model.set_adapter(["default", "other"])
    rig.step()
    assert rig.push(mode="adapter").verified is True
    assert rig.serves(rig.truth())


def test_experts(make: Make) -> None:
    rig = make(tiny_qwen3_moe(), target_modules=["q_proj"],
               target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])  # fmt: skip
    assert rig.push(mode="adapter").verified is True
    assert rig.serves(rig.truth())


def test_bf16(make: Make) -> None:
    rig = make(tiny_qwen2(dtype=torch.bfloat16))
    assert rig.push(mode="adapter").verified is True
    assert rig.serves(rig.truth(), limit=0.1)


# ---- requests in the middle of a sequence ---------------------------------------------------------------------------


def _long_request(rig: LoraRig, tokens: int = 200) -> tuple[threading.Thread, list[Any]]:
    out: list[Any] = []
    sampling = bridge.Sampling(max_tokens=tokens, temperature=0.0)
    thread = threading.Thread(target=lambda: out.extend(rig.b.engines[0].generate([PROMPTS[0]], sampling)))
    before = rig.engine.steps
    thread.start()
    while rig.engine.steps < before + 5:
        time.sleep(0.002)
    return thread, out


def test_keep_ends_with_the_version_it_began_with(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    alone = rig.b.engines[0].generate([PROMPTS[0]], bridge.Sampling(max_tokens=200, temperature=0.0))[0]
    thread, out = _long_request(rig)
    old = rig.engine.adapter
    rig.step()
    rig.step()
    receipt = rig.push(mode="adapter", inflight="keep")
    assert thread.is_alive(), "the request was over before the push: nothing was tested"
    assert set(rig.engine.adapters) == {old, receipt.engines[0].adapter}, "the old one stays while it is used"
    thread.join(60)
    assert out[0].weight_version == 1
    assert out[0].token_ids == alone.token_ids
    assert out[0].finish_reason == "length"
    deadline = time.monotonic() + 10
    while rig.engine.adapters != (receipt.engines[0].adapter,):
        assert time.monotonic() < deadline, rig.engine.adapters
        time.sleep(0.01)
    assert rig.serves(rig.truth())


def test_abort_ends_them(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    thread, out = _long_request(rig)
    rig.step()
    receipt = rig.push(mode="adapter", inflight="abort")
    thread.join(60)
    assert out[0].finish_reason == "abort"
    assert 0 < len(out[0].token_ids) < 200
    assert rig.engine.adapters == (receipt.engines[0].adapter,)


# ---- with the other modes -------------------------------------------------------------------------------------------


def test_a_base_push_goes_under_a_living_adapter(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    acting = rig.engine.adapter
    other = tiny_qwen2(seed=5)
    for name, parameter in rig.model.get_base_model().named_parameters():
        clean = name.replace(".base_layer", "")
        if clean in dict(other.named_parameters()):
            parameter.data.copy_(dict(other.named_parameters())[clean])
    receipt = rig.push(mode="base")
    assert (receipt.mode, receipt.verified) == ("base", True)
    assert rig.engine.adapter == acting
    assert rig.serves(rig.truth()), "new base, and the adapter still acts"
    assert rig.serves(rig.base_truth(), "base")


def test_merged_weights_take_the_adapter_away(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    receipt = rig.push(mode="merged")
    assert (receipt.mode, receipt.verified) == ("merged", True)
    assert rig.engine.adapter is None
    assert rig.engine.adapters == ()
    assert rig.serves(rig.truth()), "else the delta acts twice"


def test_an_adapter_over_merged_weights_is_refused_until_the_base_is_back(make: Make) -> None:
    rig = make()
    rig.push(mode="merged")
    before = rig.answers()
    with refused(UnsupportedLora, 5, "base", "mode='base'") as caught:
        rig.push(mode="adapter")
    assert any("q_proj" in name for name in caught.value.names)
    assert rig.answers() == before
    assert rig.push().mode == "merged", "auto finds the way that is open"
    assert rig.push(mode="base").verified is True
    assert rig.push(mode="adapter").verified is True
    assert rig.serves(rig.truth())


def test_another_base_in_the_engine_is_found_by_its_bits(make: Make) -> None:
    rig = make()
    norm = rig.model.get_base_model().model.norm.weight
    norm.data[0] = norm.data[0] * (1 + 1e-6)  # far below what a canary sees
    with refused(UnsupportedLora, 5, "model.norm.weight", "base"):
        rig.push(mode="adapter")


def _replace_parameter(model: Any) -> None:
    head = model.get_base_model().lm_head
    head.base_layer.weight = torch.nn.Parameter(head.base_layer.weight.detach() * 1.01, requires_grad=False)


def _edit_in_place(model: Any) -> None:
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.data *= 1.02


def _merge_and_unmerge(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def _edit_a_norm(model: Any) -> None:
    model.get_base_model().model.norm.weight.data *= 1.02


@pytest.mark.parametrize("move", [_replace_parameter, _edit_in_place, _merge_and_unmerge, _edit_a_norm])
@pytest.mark.parametrize("verify", ["weights", "outputs"])
def test_a_base_that_moved_after_it_was_compared(make: Make, move: Callable[[Any], None], verify: str) -> None:
    rig = make(tiny_qwen2(dtype=torch.bfloat16), target_modules=["q_proj", "lm_head"])
    rig.push(mode="adapter")
    before = rig.answers()
    move(rig.model)
    with refused(UnsupportedLora, 5, "base", "mode='base'"):
        rig.push(mode="adapter", verify=verify)
    assert rig.answers() == before
    assert rig.push(verify=verify).mode == "merged", "auto goes the way that is open"
    rig.push(mode="base", verify=verify)
    assert rig.push(mode="adapter", verify=verify).verified is True


def test_a_base_push_of_other_values_than_the_live_ones_proves_nothing(make: Make) -> None:
    rig = make()
    averaged = [(n, p.detach() * 0.9) for n, p in rig.model.named_parameters()]
    rig.b.push(averaged, mode="base", verify="weights")
    with refused(UnsupportedLora, 5, "base"):
        rig.push(mode="adapter", verify="weights")


# ---- back -----------------------------------------------------------------------------------------------------------


def test_rollback_brings_the_adapter_before_back(make: Make) -> None:
    rig = make()
    first = rig.push(mode="adapter")
    truth = rig.truth()
    rig.step()
    rig.push(mode="adapter")
    receipt = rig.b.rollback()
    assert receipt.version == 1
    assert rig.serves(truth)
    assert rig.engine.adapter != first.engines[0].adapter, "a name is never used twice"
    assert len(rig.engine.adapters) == 1
    assert rig.push(mode="adapter").version == 3


def test_rollback_of_the_first_adapter_leaves_the_base(make: Make) -> None:
    rig = make()
    base = rig.base_truth()
    rig.push(mode="adapter")
    assert rig.b.rollback().version == 0
    assert rig.serves(base)
    assert rig.engine.adapters == ()


def test_rollback_of_a_base_push_keeps_the_adapter(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    truth = rig.truth()
    perturb(rig.model.get_base_model().model.norm, seed=3, scale=0.2)
    rig.push(mode="base")
    assert not rig.serves(truth)
    assert rig.b.rollback().version == 1
    assert rig.serves(truth)


# ---- faults ---------------------------------------------------------------------------------------------------------


def _spoil(monkeypatch: pytest.MonkeyPatch, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    load = LoraManager.load

    def spoiled(self: Any, name: str, tensors: Any, spec: Any) -> None:
        load(self, name, how({n: t.clone() for n, t in tensors.items()}), spec)

    monkeypatch.setattr(LoraManager, "load", spoiled)


def _one_wrong(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(n for n in tensors if n.endswith("v_proj.lora_B.weight"))
    tensors[name][0, 0] += 1e-4
    return tensors


def _swapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    k, v = (next(n for n in tensors if n.endswith(f"{p}_proj.lora_B.weight")) for p in "kv")
    tensors[k], tensors[v] = tensors[v], tensors[k]
    return tensors


def _doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t * 2 if n.endswith("lora_B.weight") else t for n, t in tensors.items()}


@pytest.mark.parametrize("how", [_one_wrong, _swapped, _doubled])
def test_a_wrong_slot_is_read_back(make: Make, monkeypatch: pytest.MonkeyPatch, how: Any) -> None:
    rig = make()
    rig.push(mode="adapter")
    before, name = rig.answers(), rig.engine.adapter
    rig.step()
    with monkeypatch.context() as patch:
        _spoil(patch, how)
        with pytest.raises(PushAborted) as caught:
            rig.push(mode="adapter")
    levels = {level.level for r in caught.value.receipt.engines[0].ranks for level in r.levels if not level.ok}
    assert levels == {"read-back"}
    assert rig.answers() == before
    assert (rig.engine.adapter, rig.engine.adapters) == (name, (name,))
    assert not rig.engine.paused
    assert rig.push(mode="adapter").verified is True
    assert rig.serves(rig.truth())


def test_an_adapter_that_does_not_act_is_found(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine_side.embedded.runner import ModelRunner

    rig = make()
    score = ModelRunner.prompt_logprobs
    monkeypatch.setattr(ModelRunner, "prompt_logprobs", lambda self, prompts, adapter=None: score(self, prompts, None))
    with pytest.raises(PushAborted, match=r"does not act|canary"):
        rig.push(mode="adapter")


def test_health_finds_a_slot_that_somebody_wrote_to(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    assert rig.b.health().healthy
    view = next(v for v in rig.engine.runner.lora.views(rig.engine.adapter) if v.name.endswith("lora_B.weight"))
    view.live[0, 0] += 1.0
    report = rig.b.health()
    assert not report.healthy
    assert any(view.name in check.name for check in report.checks if not check.ok)


def test_an_adapter_that_somebody_took_away(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its base is as it was: that is no reason for a quarantine, and the next adapter does not need it."""
    rig = make()
    rig.push(mode="adapter")
    rig.engine.runner.lora.remove(rig.engine.adapter)
    assert not rig.b.health().healthy
    rig.step()
    with monkeypatch.context() as patch:
        _spoil(patch, _one_wrong)
        with pytest.raises(PushAborted):
            rig.push(mode="adapter")
    assert rig.b.status().engines[0].state == "SERVING"
    assert rig.serves(rig.base_truth(), "base")
    assert rig.push(mode="adapter").verified is True
    assert rig.serves(rig.truth())


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_an_engine_without_slots(make: Make) -> None:
    rig = make(engine={"max_loras": 0})
    with refused(UnsupportedLora, 5, "LoRA"):
        rig.push(mode="adapter")
    receipt = rig.push()
    assert receipt.mode == "merged"
    assert rig.serves(rig.truth())


def test_a_rank_that_does_not_fit(make: Make) -> None:
    rig = make(r=9)
    with refused(UnsupportedLora, 5, "rank", "8", "9"):
        rig.push(mode="adapter")
    assert rig.push().mode == "merged"


def test_modules_that_the_engine_did_not_wrap(make: Make) -> None:
    rig = make(engine={"lora_targets": ("q_proj", "k_proj", "v_proj")})
    with refused(UnexpectedTensor, 5, "down_proj") as caught:
        rig.push(mode="adapter")
    assert any("gate_proj" in name for name in caught.value.names)
    assert rig.engine.adapters == ()


def test_no_mode_full_for_a_lora_model(make: Make) -> None:
    with refused(ConfigError, 2, "merged"):
        make().push(mode="full")


def test_no_lora_mode_for_a_plain_model(checkpoint: Callable[[Any], Path]) -> None:
    from tests.push.rig import Rig

    model = tiny_qwen2()
    rig = Rig(checkpoint(model), model)
    try:
        for mode in ("merged", "base", "adapter"):
            with refused(ConfigError, 2, "LoRA", mode):
                rig.push(mode=mode)
    finally:
        rig.close()


def test_lora_missing_from_what_is_sent(make: Make) -> None:
    rig = make()
    named = [(n, p) for n, p in rig.model.named_parameters() if "v_proj" not in n.split(".")]
    with pytest.raises(bridge.MissingTensor, match="v_proj"):
        rig.b.push(named, mode="adapter")
    assert rig.engine.adapters == ()


# ---- one engine, one bridge after the other -------------------------------------------------------------------------


def test_a_kept_request_ends_when_merged_weights_take_its_base_away(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    thread, out = _long_request(rig)
    rig.push(mode="merged", inflight="keep")
    thread.join(60)
    assert out[0].finish_reason == "abort", "its adapter over merged weights would act twice"
    assert rig.engine.adapters == ()
    assert rig.serves(rig.truth())


def test_a_kept_request_goes_on_over_new_base_weights(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    thread, out = _long_request(rig)
    rig.push(mode="base", inflight="keep")
    thread.join(60)
    assert out[0].finish_reason == "length"


def test_the_next_bridge_finds_the_adapter_that_is_served(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    truth, name = rig.truth(), rig.engine.adapter
    rig.b.close()
    rig.b = bridge.attach(rig.engine, model=rig.model)
    assert rig.b.status().engines[0].adapter == name
    assert rig.push(mode="base").verified is True
    assert rig.engine.adapter == name
    assert rig.serves(truth)
    with pytest.raises(bridge.NonFinite):
        rig.b.push([(n, p.detach() * float("nan")) for n, p in rig.model.named_parameters()], mode="base")
    assert (rig.engine.adapter, rig.serves(truth)) == (name, True)
    rig.step()
    receipt = rig.push(mode="adapter")
    assert rig.engine.adapters == (receipt.engines[0].adapter,), "the one of the bridge before is dropped"


def test_bridges_one_after_the_other_leave_no_slot_behind(make: Make) -> None:
    rig = make(engine={"max_loras": 2})
    for _ in range(5):
        rig.step()
        assert rig.push(mode="adapter").verified is True
        assert len(rig.engine.adapters) == 1
        rig.b.close()
        rig.b = bridge.attach(rig.engine, model=rig.model)


def test_a_failed_push_of_the_next_bridge_leaves_adapter_and_label(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make()
    rig.push(mode="adapter")
    truth, name = rig.truth(), rig.engine.adapter
    rig.b.close()
    rig.b = bridge.attach(rig.engine, model=rig.model)
    rig.step()
    with monkeypatch.context() as patch:
        _spoil(patch, _one_wrong)
        with pytest.raises(PushAborted):
            rig.push(mode="adapter")
    assert (rig.engine.adapter, rig.engine.weight_version) == (name, 1)
    assert rig.serves(truth)


def test_a_subset_of_merged_weights_cannot_take_an_adapter_away(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    truth = rig.truth()
    subset = [(n, p) for n, p in rig.model.named_parameters() if "q_proj" in n.split(".")]
    with refused(ConfigError, 2, "adapter", "partial"):
        rig.b.push(subset, mode="merged", partial=True)
    assert rig.serves(truth)
    assert rig.push(mode="merged").verified is True


def test_a_weight_that_somebody_wrote_to_in_the_engine_is_no_base(make: Make) -> None:
    rig = make()
    weight = rig.engine.runner.model.get_parameter("model.norm.weight")
    with torch.no_grad():
        rig.push(mode="base")
        weight.mul_(1.001)
        rig.b.bind(rig.model)
        with refused(UnsupportedLora, 5, "model.norm.weight"):
            rig.push(mode="adapter", verify="weights")


def test_rollback_over_a_base_push_to_an_adapter(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    rig.push(mode="base")
    truth = rig.truth()
    rig.step()
    rig.push(mode="adapter")
    assert rig.b.rollback().version == 2
    assert rig.serves(truth)


@pytest.mark.parametrize("what", ["resume", "retire", "publish"])
def test_a_resume_that_fails_once_is_asked_again(make: Make, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    from engine_side.engines.embedded import EmbeddedDriver

    rig = make()
    rig.push(mode="adapter")
    rig.step()
    real, calls = getattr(EmbeddedDriver, what), []

    def once(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(what)
        if len(calls) == 1:
            raise ConfigError("injected")
        return real(self, *args, **options)

    monkeypatch.setattr(EmbeddedDriver, what, once)
    assert rig.push(mode="adapter").verified is True
    assert not rig.engine.paused
    assert rig.serves(rig.truth())
    rig.step()
    assert rig.push(mode="adapter").verified is True
    assert len(rig.engine.adapters) == 1
