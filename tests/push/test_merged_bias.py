"""Biases of merged LoRA layers: the base layer's own in every state, and what the adapter adds, scaled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

import bridge
from engine_side.embedded.wrappers import unwrap
from tests.push.lora_rig import LoraRig, at, stir
from tests.push.rig import same_bits
from tests.trainer_side.lora.oracle import TOLERANCE, live_linear

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Make = Callable[..., LoraRig]
ATTENTION = "model.layers.1.self_attn"


@pytest.mark.parametrize("state", ["active", "disabled", "merged", "merged and disabled"])
def test_unsloth_get_lora_parameters_bias_reaches_the_engine(make: Make, state: str) -> None:
    """Qwen2's biases, which the broken function lost in three of four branches."""
    rig = make(scale=0.2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in rig.model.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter.normal_(generator=generator)
    twin = copy.deepcopy(rig.model)
    for model in (rig.model, twin):
        if "merged" in state:
            model.merge_adapter()
        if "disabled" in state:
            model.base_model.disable_adapter_layers()
    verify = "weights" if state == "merged and disabled" else None
    assert rig.push(mode="merged", verify=verify).verified is True
    assert rig.serves(rig.truth(twin))
    live = rig.model.get_base_model().model.layers[1].self_attn
    fused = torch.cat([getattr(live, f"{part}_proj").base_layer.bias for part in "qkv"])
    got: Any = unwrap(at(rig, f"{ATTENTION}.qkv_proj")).bias
    assert same_bits(got, fused.detach())


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 12), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("alpha", [32, 1.5])
@pytest.mark.parametrize("path", ["never merged", "merged", "merged and unmerged", "merged, then disabled"])
def test_peft_2489_merged_bias_is_b_plus_s_times_l(path: str, alpha: float) -> None:
    from peft import get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=alpha, target_modules=["one"], lora_bias=True)
    model: Any = get_peft_model(Two().double(), config, autocast_adapter_dtype=False).eval()
    stir(model, seed=2, scale=0.3)
    layer = model.base_model.model.one
    b, added = layer.base_layer.bias.detach().clone(), layer.lora_B["default"].bias.detach().clone()
    want, bias = live_linear(layer, 8)
    scale = alpha / 3
    assert torch.allclose(bias, b + scale * added, rtol=0, atol=TOLERANCE)
    if path != "never merged":
        model.merge_adapter()
    if path == "merged and unmerged":
        model.unmerge_adapter()
    if path == "merged, then disabled":
        model.base_model.disable_adapter_layers()
        want, bias = live_linear(layer, 8)  # of a copy, whose forward unmerges
        assert torch.allclose(bias, b, rtol=0, atol=TOLERANCE)
    engine = Two().double()
    with bridge.attach(engine, model=model) as bridged:
        bridged.push(model.named_parameters(), mode="merged", verify="weights")
    assert (engine.one.bias - bias).abs().max() < TOLERANCE
    assert (engine.one.weight - want).abs().max() < TOLERANCE
    assert (engine.one.bias - (b + added)).abs().max() > 0.01, "alpha == r would hide the difference"
    assert torch.equal(engine.two.bias, model.base_model.model.two.bias)


def test_peft_2489_in_a_served_model(make: Make) -> None:
    rig = make(target_modules=["q_proj", "k_proj", "v_proj"], lora_bias=True, scale=0.1)
    rig.push(mode="merged")
    assert rig.serves(rig.truth())
    live = rig.model.get_base_model().model.layers[1].self_attn
    want = torch.cat([
        p.base_layer.bias + p.scaling["default"] * p.lora_B["default"].bias
        for p in (live.q_proj, live.k_proj, live.v_proj)
    ])  # fmt: skip
    got: Any = unwrap(at(rig, f"{ATTENTION}.qkv_proj")).bias
    assert (got - want).abs().max() < 1e-5
