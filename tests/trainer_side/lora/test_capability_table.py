"""Which mode is chosen, why, and what each refuses: every verdict comes from the table."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import ConfigError, UnsupportedLora
from bridge.model.lora_format import LoraLimits
from tests.conftest import tiny_qwen2
from tests.trainer_side.lora.peft_rows import CAUSAL, ROWS, Toy, build
from trainer_side.lora import LoraModel, adapter_tensors
from trainer_side.lora.capability import capability_table
from trainer_side.lora.layers.features import MODES, Feature

ROOM = [LoraLimits(64, 4), LoraLimits(16, 2)]


def of(name: str) -> Any:
    return build(next(row for row in (*ROWS, *CAUSAL) if row.name == name), torch.float32)


def allowed(lora: LoraModel) -> dict[str, str | None]:
    """Mode -> why not."""
    return {mode: refused(lora, mode) for mode in MODES}


def refused(lora: LoraModel, mode: str) -> str | None:
    try:
        choice = lora.choose(mode, ROOM)
    except UnsupportedLora as error:
        return f"{error}; {len(error.names)} names" if error.names else "no names"
    return None if choice.mode == mode else f"another mode: {choice.mode}"


CASES = {
    "linear": {},
    "two adapters": {"adapter": "the base bias is not sent"},
    "embedding": {},
    "lora_bias": {"adapter": "the base bias is not sent in adapter mode"},
    "dora": {"adapter": "magnitude has no adapter form"},
    "kasa": {},
    "bd-lora, A": {},
    "convolutions": {"adapter": "linear layers and embeddings"},
    "attention": {"adapter": "in_proj LoRA is not supported"},
    "experts": {},
    "experts, both": {"adapter": "no block of rows"},
    "bias all": {"adapter": "trainable outside LoRA"},
    "bias lora_only": {"adapter": "trainable outside LoRA"},
    "modules_to_save": {"base": "trainable outside LoRA", "adapter": "trainable outside LoRA"},
    "tokens": {"base": "trainable outside LoRA", "adapter": "trainable outside LoRA"},
    "tokens, tied": {"base": "trainable outside LoRA", "adapter": "trainable outside LoRA"},
    "tied, head only": {},
}


@pytest.mark.parametrize("name", CASES)
def test_what_each_mode_carries(name: str) -> None:
    verdicts = allowed(LoraModel(of(name)))
    for mode, verdict in verdicts.items():
        reason = CASES[name].get(mode)
        assert (verdict is None) == (reason is None), verdict
        if reason is not None and verdict is not None:
            assert reason in verdict
            assert 'mode="merged"' in verdict


def test_the_names_of_what_is_refused() -> None:
    lora = LoraModel(of("modules_to_save"))
    with pytest.raises(UnsupportedLora) as error:
        lora.choose("base", ROOM)
    assert set(error.value.names) == {
        f"base_model.model.head.modules_to_save.default.{name}" for name in ("weight", "bias")
    }
    with pytest.raises(UnsupportedLora) as error:
        LoraModel(of("dora")).choose("adapter", ROOM)
    assert "base_model.model.linear.lora_magnitude_vector.default.weight" in error.value.names
    trained = LoraModel(of("bias lora_only"))
    with pytest.raises(UnsupportedLora) as error:
        trained.choose("adapter", ROOM)
    assert error.value.names == ("base_model.model.linear.base_layer.bias",)


def test_full_is_no_mode_for_lora() -> None:
    for mode in ("full", "half"):
        with pytest.raises(ConfigError, match="merged"):
            LoraModel(of("linear")).choose(mode, ROOM)


@pytest.mark.parametrize(
    ("limits", "mode", "why"),
    [
        (ROOM, "adapter", "rank 3"),
        ([LoraLimits(64, 4), None], "merged", "started without LoRA"),
        ([LoraLimits(64, 4), LoraLimits(2, 4)], "merged", "rank 3 where 2 is the most"),
        ([], "merged", "no engine"),
    ],
)
def test_auto_asks_every_engine(limits: list[LoraLimits | None], mode: str, why: str) -> None:
    lora = LoraModel(of("all linear"))
    choice = lora.choose("auto", limits)
    assert choice.mode == mode
    assert why in choice.reason
    if mode == "merged":
        with pytest.raises(UnsupportedLora, match=why):
            lora.choose("adapter", limits)


def test_auto_says_why_not_adapter() -> None:
    choice = LoraModel(of("dora")).choose("auto", ROOM)
    assert choice.mode == "merged"
    assert "linear: the magnitude has no adapter form" in choice.reason


def test_states() -> None:
    model = of("all linear")
    lora = LoraModel(model)
    assert lora.choose("auto", ROOM).mode == "adapter"
    with model.disable_adapter():
        choice = lora.choose("auto", ROOM)
        assert choice.mode == "merged"
        assert "disabled" in choice.notes[0]
        assert lora.choose("base", ROOM).notes == ()
        with pytest.raises(UnsupportedLora, match="no active adapter"):
            lora.choose("adapter", ROOM)
    model.merge_adapter()
    choice = lora.choose("auto", ROOM)
    assert choice.mode == "merged"
    assert "[default]" in choice.notes[0]
    verdicts = allowed(lora)
    assert "base holds merged adapters (default)" in str(verdicts["base"])
    assert "apply twice" in str(verdicts["adapter"])
    with model.disable_adapter():
        choice = lora.choose("auto", ROOM)
        assert "inexact" in choice.notes[0]
        assert "base holds merged adapters" in str(allowed(lora)["base"])
    model.unmerge_adapter()
    assert lora.choose("auto", ROOM).mode == "adapter"


def test_a_parameter_that_is_unfrozen_later_is_noticed() -> None:
    model = of("all linear")
    lora = LoraModel(model)
    assert lora.choose("auto", ROOM).mode == "adapter"
    model.base_model.model.model.norm.weight.requires_grad_(True)
    choice = lora.choose("auto", ROOM)
    assert choice.mode == "merged"
    assert "trainable outside LoRA" in choice.reason
    with pytest.raises(UnsupportedLora) as error:
        lora.choose("adapter", ROOM)
    assert error.value.names == ("base_model.model.model.norm.weight",)
    assert lora.choose("base", ROOM).mode == "base"


def tuned(kind: str) -> Any:
    import peft

    configs = {
        "ia3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]),
        "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=3),
        "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(tiny_qwen2(), configs[kind]())


@pytest.mark.parametrize("kind", ["ia3", "loha", "adalora", "vera", "prompt", "prefix"])
def test_what_is_not_lora_is_refused_in_every_mode_by_name(kind: str) -> None:
    model = tuned(kind)
    assert LoraModel.present(model)
    lora = LoraModel(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    for mode in ("auto", *MODES):
        with pytest.raises(UnsupportedLora) as error:
            lora.choose(mode, ROOM)
        assert trained & set(error.value.names)
        assert "no mode can carry this" in str(error.value)


def test_convolutions_without_a_single_weight() -> None:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Toy(), LoraConfig(r=3, lora_alpha=32, target_modules=["grouped"]))
    verdicts = allowed(LoraModel(model))
    assert verdicts["base"] is None
    assert "no single weight" in str(verdicts["merged"])
    assert 'mode="base"' in str(verdicts["merged"])


def test_lora_bias_without_a_base_bias() -> None:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Toy(), LoraConfig(r=3, lora_alpha=32, target_modules=["slim"], lora_bias=True))
    verdicts = allowed(LoraModel(model))
    assert verdicts["base"] is None
    for mode in ("merged", "adapter"):
        assert "no bias to carry lora_bias" in str(verdicts[mode])
        assert "base_model.model.slim.lora_B.default.bias" in refused_names(model, mode)
    with pytest.raises(UnsupportedLora, match="adapter mode cannot carry"):
        LoraModel(model).choose("auto", ROOM)


def refused_names(model: nn.Module, mode: str) -> tuple[str, ...]:
    with pytest.raises(UnsupportedLora) as error:
        LoraModel(model).choose(mode, ROOM)
    return error.value.names


def test_an_unknown_variant_is_never_taken_for_plain_lora() -> None:
    class Strange:
        pass

    model = of("linear")
    model.base_model.model.linear.lora_variant["default"] = Strange()
    for verdict in allowed(LoraModel(model)).values():
        assert "Strange" in str(verdict)


@pytest.mark.parametrize("beside", ["an adapter on the meta device", "a lora_bias that nothing carries"])
def test_an_unknown_variant_is_found_beside_another_reason(beside: str) -> None:
    from peft import LoraConfig, get_peft_model

    class Strange:
        pass

    biased = beside.startswith("a lora_bias")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Toy(), LoraConfig(r=3, target_modules=["slim"], lora_bias=biased))
    layer = model.base_model.model.slim
    layer.lora_variant["default"] = Strange()
    if not biased:
        layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.to("meta"))
    verdict = allowed(LoraModel(model))["base"]
    assert "Strange" in str(verdict)


def test_alora_is_refused_with_the_mode_that_can() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3, lora_alpha=32, target_modules=["q_proj"], alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny_qwen2(), config)
    verdicts = allowed(LoraModel(model))
    assert verdicts["base"] is None
    assert "depends on the token" in str(verdicts["merged"])
    assert "engines do not support it" in str(verdicts["adapter"])


def test_meta_tensors_are_refused() -> None:
    model = of("linear")
    layer = model.base_model.model.linear
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.to("meta"))
    for mode in ("merged", "adapter"):
        with pytest.raises(UnsupportedLora, match="gather"):
            LoraModel(model).choose(mode, ROOM)


def test_people_get_the_same_refusals() -> None:
    with pytest.raises(UnsupportedLora, match="magnitude"):
        adapter_tensors(of("dora"))


def test_the_table_in_markdown() -> None:
    lines = capability_table().splitlines()
    assert lines[0] == "| feature | base | merged | adapter |"
    assert len(lines) == len(Feature) + 2
    assert all(line.count("|") == 5 for line in lines)
    assert any(line.startswith("| DoRA | yes | yes | refused: ") for line in lines)
