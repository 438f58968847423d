"""Convolutions and experts: what is computed for them is compared with what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import bridge
from bridge.errors import UnsupportedLora
from bridge.model.levels import LEVELS_OF
from tests.conftest import tiny_qwen3_moe
from tests.push.lora_rig import LoraRig, stir, wrap
from trainer_side.lora import layer_proof

EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., LoraRig]]:
    rigs: list[LoraRig] = []

    def make(lora: dict[str, Any] = EXPERTS, **changes: Any) -> LoraRig:
        base = tiny_qwen3_moe(**changes)
        base.save_pretrained(tmp_path)
        rigs.append(LoraRig(tmp_path, wrap(base, **lora)))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_compared_in_the_forward_for_the_canary(made: Callable[..., LoraRig], dtype: torch.dtype) -> None:
    rig = made(dtype=dtype)
    receipt = rig.push(mode="merged", verify="weights")
    assert receipt.verified == "partial"
    assert any("mlp.experts.down_proj" in n and "kind parameter cannot be called alone" in n for n in receipt.notes)
    assert rig.push(mode="merged").verified is True
    assert rig.push(mode="merged", verify="weights").verified is True
    assert rig.serves(rig.truth(), limit=1e-4 if dtype is torch.float32 else 0.1)


def test_another_scaling_is_proven_anew(made: Callable[..., LoraRig]) -> None:
    rig = made()
    assert rig.push(mode="merged").verified is True
    for module in rig.model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 2.5)
    assert rig.push(mode="merged", verify="weights").verified == "partial"
    assert rig.push(mode="merged").verified is True
    assert rig.serves(rig.truth())


def test_experts_that_no_token_reaches_are_listed(made: Callable[..., LoraRig]) -> None:
    rig = made(num_experts=16, num_experts_per_tok=1, num_hidden_layers=1)
    router = rig.model.base_model.model.model.layers[0].mlp.gate
    with torch.no_grad():  # of the first eight always one is above zero, and above its half
        router.weight[4:8] = -router.weight[:4]
        router.weight[8:] = 0.5 * router.weight[:8]
    receipt = rig.push(mode="merged")
    assert receipt.verified == "partial"
    notes = [note for note in receipt.notes if "no token of the canary reached its parts" in note]
    assert len(notes) == 2
    assert all("8, 9, 10, 11, 12, 13, 14, 15" in note for note in notes)
    assert rig.serves(rig.truth())


def scaled_twice(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A fault, as the forward of a LoRA layer."""
    kept = dict(self.scaling)
    self.scaling.update({name: 2 * scaling for name, scaling in kept.items()})
    try:
        return type(self).forward(self, *args, **kwargs)
    finally:
        self.scaling.update(kept)


def test_a_layer_that_unmerges_when_called_is_compared_on_weights_of_its_own(
    made: Callable[..., LoraRig],
) -> None:
    """PEFT does so in the next forward after `disable_adapter` of merged layers."""
    rig = made({"target_modules": ["q_proj", "o_proj"]})
    rig.model.merge_adapter()
    with rig.model.disable_adapter():
        before = {name: tensor.clone() for name, tensor in rig.model.state_dict().items()}
        assert rig.push(mode="merged", verify="weights").verified is True
        assert all(torch.equal(tensor, before[name]) for name, tensor in rig.model.state_dict().items())


def scaled_twice_when_wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
    return scaled_twice(self, *args, **kwargs) if self.wrong else type(self).forward(self, *args, **kwargs)


def test_a_layer_with_a_forward_of_its_own_is_compared_itself(made: Callable[..., LoraRig]) -> None:
    rig = made()
    layers = rig.model.base_model.model.model.layers
    for layer in (layers[1].self_attn.q_proj, layers[1].mlp.experts):
        assert rig.push(mode="merged").verified is True
        layer.forward = MethodType(scaled_twice, layer)
        with pytest.raises(UnsupportedLora, match="not what the layer computes"):
            rig.push(mode="merged")
        del layer.forward


def test_experts_that_were_found_to_differ_leave_a_doubt(
    made: Callable[..., LoraRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until they agree, in pushes that cannot compare them too, though others of their structure were right."""
    monkeypatch.setattr(layer_proof, "SHARE", 1e6)  # one more layer is compared in each push
    rig = made()
    layers = [layer.mlp.experts for layer in rig.model.base_model.model.model.layers]
    for experts in layers:
        experts.wrong = False
        experts.forward = MethodType(scaled_twice_when_wrong, experts)
    assert rig.push(mode="merged").verified is True
    layers[1].wrong = True

    def many() -> None:
        for _ in range(20):
            rig.push(mode="merged", verify=[*LEVELS_OF["weights"], "canary"], canary_limit=100)

    with pytest.raises(UnsupportedLora, match="not what the layer computes"):
        many()
    receipt = rig.push(mode="merged", verify="weights")
    assert receipt.verified == "partial"
    assert any("layers.1.mlp.experts" in note for note in receipt.notes)
    layers[1].wrong = False
    assert rig.push(mode="merged").verified is True
    assert rig.push(mode="merged", verify="weights").verified is True


def test_experts_whose_adapters_act_otherwise_are_refused(made: Callable[..., LoraRig]) -> None:
    """A fresh adapter, whose B is zero, hides nothing: the comparison draws factors of its own."""
    rig = made()
    with torch.no_grad():
        for name, parameter in rig.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    for layer in rig.model.base_model.model.model.layers:
        layer.mlp.experts.forward = MethodType(scaled_twice, layer.mlp.experts)
    with pytest.raises(UnsupportedLora, match=r"not what the layer computes.*in the canary's forward") as caught:
        rig.push(mode="merged")
    assert ".mlp.experts." in caught.value.names[0]
    assert rig.push(mode="adapter").verified is True  # the remedy


class Convolutions(nn.Module):
    """A policy of convolutions: 1-d, 2-d and 3-d, strided and padded."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding=1)
        self.two = nn.Conv2d(4, 6, (3, 2), stride=2, bias=False)
        self.three = nn.Conv3d(2, 4, 2, stride=2)


class Counted(nn.Conv2d):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return super().forward(x)


@pytest.fixture
def convolutions() -> Iterator[tuple[Any, nn.Module, bridge.Bridge]]:
    torch.manual_seed(0)
    model = get_peft_model(Convolutions(), LoraConfig(r=3, lora_alpha=7, target_modules=["one", "two", "three"]))
    stir(model, seed=1)
    engine = Convolutions()
    b = bridge.attach(engine, model=model)
    yield model.eval(), engine, b
    b.close()


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions_are_compared_alone(convolutions: tuple[Any, Any, bridge.Bridge], use_dora: bool) -> None:
    model, engine, b = convolutions
    if use_dora:
        model.add_adapter("dora", LoraConfig(r=2, lora_alpha=5, target_modules=["one", "two", "three"], use_dora=True))
        model.set_adapter("dora")
        stir(model, seed=2)
    model.base_model.model.two.base_layer.__class__ = Counted
    Counted.calls = 0
    for seed in range(2):
        stir(model, seed=seed)
        assert b.push(model.named_parameters(), mode="merged").verified is True
        assert seed or Counted.calls == 2  # the layer, and the module with what is computed for it
        for name, x in (("one", (2, 4, 9)), ("two", (2, 4, 7, 7)), ("three", (1, 2, 5, 5, 5))):
            inputs = torch.randn(x, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                want = getattr(model.base_model.model, name)(inputs)
                assert (getattr(engine, name)(inputs) - want).abs().max() < 1e-5, name


def test_a_convolution_that_computes_otherwise_is_refused(convolutions: tuple[Any, Any, bridge.Bridge]) -> None:
    model, engine, b = convolutions
    layer = model.base_model.model.one

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = type(self).forward(self, x)
        return 2 * out - self.base_layer(x)  # the fault `added twice`

    layer.forward = MethodType(forward, layer)
    before = engine.one.weight.clone()
    with pytest.raises(UnsupportedLora, match="not what the layer computes") as caught:
        b.push(model.named_parameters(), mode="merged")
    assert caught.value.names == ("one.weight",)
    assert torch.equal(engine.one.weight, before)
