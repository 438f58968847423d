"""`WithoutLora`: the base model over the same weights, while the live one keeps its adapters."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import ConfigError
from tests.conftest import tiny_qwen2
from tests.trainer_side.lora.oracle import live_output, untouched
from tests.trainer_side.lora.peft_rows import CAUSAL, HIDDEN, ROWS, VOCABULARY, Toy, build
from trainer_side.lora.without_lora import WithoutLora

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
IDS = torch.tensor([[1, 5, 130, 7]])


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("row", CAUSAL, ids=str)
def test_computes_what_the_base_model_computes(row: Any) -> None:
    model = build(row, torch.float32)
    with_lora = logits(model)
    with untouched(model):
        base = WithoutLora().copy(model)
        plain = logits(base)
    model.base_model.disable_adapter_layers()
    assert torch.equal(plain, logits(model))
    if not row.name.startswith("bias"):
        assert not torch.allclose(plain, with_lora, atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_of_the_same_class_over_the_same_parameters(tied: bool) -> None:
    row = next(r for r in CAUSAL if r.name == ("tied, both ends alike" if tied else "all linear"))
    model = build(row, torch.float32)
    with untouched(model):
        base: Any = WithoutLora().copy(model)
        base.eval()
    reference = tiny_qwen2(tied=tied)
    assert type(base) is type(reference)
    assert [name for name, _ in base.named_parameters()] == [name for name, _ in reference.named_parameters()]
    live = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    for parameter in base.parameters():
        own = live[parameter.data_ptr()]
        assert parameter is not own
        assert (type(parameter), parameter.shape, parameter.stride()) == (type(own), own.shape, own.stride())
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == tied
    mine = {id(module) for module in base.modules()}
    assert mine.isdisjoint(id(module) for module in model.modules())
    assert len(mine) == len(list(reference.modules()))


def test_follows_an_optimizer_step_and_leaves_flags_alone() -> None:
    model = build(next(r for r in CAUSAL if r.name == "all linear"), torch.float32)
    model.train()
    base = WithoutLora().copy(model)
    with untouched(model):
        base.eval()
        for module in base.modules():
            module.register_forward_hook(lambda *_: None)
        base.note = 1  # type: ignore[assignment]
    assert all(module.training for module in model.modules())
    assert not any("note" in vars(module) for module in model.modules())
    before = logits(base)
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    with torch.no_grad():
        weight.mul_(1.5)
    assert not torch.equal(logits(base), before)


def test_adapters_injected_without_a_peft_model() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_qwen2()
    before = logits(model)
    settings = LoraConfig(r=3, lora_alpha=32, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    inject_adapter_in_model(settings, model)
    with untouched(model):
        assert torch.equal(logits(WithoutLora().copy(model)), before)
    assert not torch.allclose(logits(model), before, atol=1e-3)


@pytest.mark.parametrize("row", [r for r in ROWS if r.name != "attention"], ids=str)
def test_every_wrapper_is_taken_off(row: Any) -> None:
    model = build(row)
    with untouched(model):
        base: Any = WithoutLora().copy(model)
    assert type(base) is Toy
    for module in base.modules():
        assert not {"base_layer", "lora_A", "modules_to_save", "token_adapter"} & module._modules.keys()
    names = [name for name, _ in base.named_parameters()]
    assert names == [name for name, _ in row.base().named_parameters()]


def test_attention() -> None:
    model = build(next(r for r in ROWS if r.name == "attention"))
    layer = model.base_model.model.attention
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    with untouched(layer), torch.no_grad():
        found = WithoutLora().copy(layer)(x, x, x)[0]
    layer.enable_adapters(False)
    assert torch.equal(found, live_output(layer, x, x, x)[0])


def test_shared_modules_stay_shared_and_references_stay_inside() -> None:
    """Methods, partial functions and lists that lead into the live tree lead into the copy."""
    model = build(next(r for r in ROWS if r.name == "modules_to_save"))
    toy = model.base_model.model
    toy.again = toy.linear
    toy.plain = nn.Linear(HIDDEN, HIDDEN).double()
    toy.plain._old_forward = toy.plain.forward
    toy.plain.forward = functools.partial(call_old, toy.plain)
    toy.kept = [toy.linear, toy.head]
    toy.plain.method = MethodType(weight_of, toy.plain)
    with untouched(model):
        base: Any = WithoutLora().copy(model)
    assert base.again is base.linear
    assert base.linear is not toy.linear
    assert base.kept == [base.linear, base.head]
    assert type(base.kept[0]) is nn.Linear
    assert base.plain.forward.args == (base.plain,)
    assert base.plain._old_forward.__self__ is base.plain
    assert base.plain.method.__self__ is base.plain
    x = torch.randn(2, HIDDEN, dtype=torch.float64)
    assert torch.equal(base.plain(x), toy.plain(x))
    assert base.head(x).shape[-1] == VOCABULARY


def call_old(module: Any, x: torch.Tensor) -> Any:
    return module._old_forward(x)


def weight_of(module: Any) -> Any:
    return module.weight


def test_inside_data_parallel_and_compiled_models() -> None:
    model = build(next(r for r in CAUSAL if r.name == "all linear"), torch.float32)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits(WithoutLora().copy(compiled)), logits(WithoutLora().copy(model)))
    assert torch.equal(logits(WithoutLora().copy(nn.DataParallel(model))), logits(WithoutLora().copy(model)))


def test_a_tuner_that_is_no_lora_cannot_be_taken_off() -> None:
    from peft import IA3Config, get_peft_model

    model = get_peft_model(Toy(), IA3Config(target_modules=["linear"], feedforward_modules=[]))
    with pytest.raises(ConfigError, match="not LoRA"):
        WithoutLora().copy(model)
