"""Bound LoRA models that look like something else: what is served is what their own forward computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import bridge
from tests.conftest import tiny_qwen2
from tests.push.lora_rig import LoraRig, stir, wrap

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Make = Callable[..., LoraRig]


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[3, 1, 4, 1, 5]])).logits
    return found


@pytest.mark.parametrize("mode", ["merged", "base"])
def test_pefts_mixed_model_with_lora_alone(mode: str) -> None:
    engine = tiny_qwen2(seed=9)
    model: Any = get_peft_model(
        tiny_qwen2(), LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj"]), mixed=True, adapter_name="a"
    )
    model.add_adapter("b", LoraConfig(r=3, lora_alpha=9, target_modules=["v_proj", "q_proj"]))
    model.set_adapter(["a", "b"])
    stir(model.eval(), seed=3)
    with bridge.attach(engine, model=model) as b:
        assert b.push(model.named_parameters(), mode=mode).verified is True
    if mode == "base":
        model.base_model.disable_adapter_layers()
    torch.testing.assert_close(_logits(engine), _logits(model))


class Blocks(nn.Module):
    """Layers whose names are those of PEFT's own modules and attributes."""

    NAMES = ("token_adapter", "base_layer", "lora_A", "original_module", "modules_to_save", "lora_B", "q")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = torch.tanh(child(x))
        return x


@pytest.mark.parametrize("targets", [None, ["q"], ["token_adapter", "q"]], ids=str)
def test_ordinary_modules_named_like_wrappers(targets: list[str] | None) -> None:
    engine = Blocks()
    model: Any = Blocks() if targets is None else wrap(Blocks(), target_modules=targets)
    with bridge.attach(engine, model=model) as b:
        b.push(model.named_parameters())
    x = torch.randn(3, 6)
    torch.testing.assert_close(engine(x), model(x))


def test_a_graph_made_before_the_push_still_works(make: Make) -> None:
    """The canary's forward goes through PEFT's parametrizations, which may raise version counters: no bytes move."""
    rig = make(target_modules=["v_proj"], target_parameters=["o_proj.weight"])
    loss = rig.model(torch.tensor([[3, 1, 4, 1, 5]])).logits.pow(2).sum()
    assert rig.push(mode="merged").verified is True
    loss.backward()
