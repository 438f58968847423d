"""`lora_parameters` reads a layer in every state: six values in every branch, the base's bias among them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layers
from torch import nn

from trainer_side.lora import lora_parameters
from trainer_side.lora.layers.values import LayerState

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def factor(*shape: int, bias: torch.Tensor | None = None) -> Any:
    return SimpleNamespace(weight=torch.randn(*shape), bias=bias)


def fake(*, bias: bool = True, quant: Any = "nf4", **state: Any) -> Any:
    """What PEFT's layers look like to `get_lora_parameters_bias`: attributes, no module."""
    weight = torch.randn(6, 4)
    if quant is not None:
        weight.quant_state = quant  # type: ignore[attr-defined]
    base = SimpleNamespace(weight=weight, bias=torch.randn(6) if bias else None)
    return SimpleNamespace(**{
        "base_layer": base, "lora_A": {"x": factor(3, 4)}, "lora_B": {"x": factor(6, 3)}, "scaling": {"x": 32 / 3},
        "active_adapters": ["x"], "disable_adapters": False, "merged": False, **state,
    })  # fmt: skip


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("quant", ["nf4", None])
@pytest.mark.parametrize(
    ("state", "acts", "means"),
    [
        ({}, True, LayerState.ACTIVE),
        ({"disable_adapters": True}, False, LayerState.DISABLED),
        ({"merged": True}, False, LayerState.MERGED),
        ({"merged": True, "disable_adapters": True}, False, LayerState.MERGED_DISABLED),
        ({"active_adapters": ["absent here"]}, False, LayerState.ACTIVE),
        ({"active_adapters": ["absent here", "x"]}, True, LayerState.ACTIVE),
        ({"active_adapters": []}, False, LayerState.ACTIVE),
    ],
    ids=["active", "disabled", "merged", "merged disabled", "absent", "absent first", "none"],
)
def test_unsloth_get_lora_parameters_bias_every_branch(
    state: dict[str, Any], acts: bool, means: LayerState, quant: Any, bias: bool
) -> None:
    """Base bias and quant state in every branch, and always six things."""
    layer = fake(bias=bias, quant=quant, **state)
    found = lora_parameters(layer)
    six = tuple(found)
    assert len(six) == 6
    weight, quantised, a, b, scaling, base_bias = six
    assert weight is layer.base_layer.weight
    assert quantised == quant
    assert base_bias is layer.base_layer.bias
    want = (layer.lora_A["x"].weight, layer.lora_B["x"].weight, 32 / 3) if acts else (None, None, None)
    assert (a is want[0], b is want[1], scaling == want[2]) == (True, True, True)
    assert found.state is means


def test_unsloth_get_lora_parameters_bias_of_a_plain_layer() -> None:
    layer = nn.Linear(4, 6)
    assert [x is y for x, y in zip(lora_parameters(layer), (layer.weight, None, None, None, None, layer.bias))] == [
        True
    ] * 6
    assert lora_parameters(nn.Linear(4, 6, bias=False)).bias is None


def test_unsloth_get_lora_parameters_bias_does_not_lose_what_unsloth_loses() -> None:
    """The rest of the table: `modules_to_save` (AttributeError there), magnitudes, further adapters, lora_bias."""
    original, copied = nn.Linear(4, 6), nn.Linear(4, 6)
    saved = nn.Module()
    saved.original_module, saved.modules_to_save = original, nn.ModuleDict({"x": copied})
    saved.active_adapters, saved.disable_adapters = ["x"], False  # type: ignore[assignment]
    weight, quant, *factors, bias = lora_parameters(saved)
    assert (weight is copied.weight, quant, factors, bias is copied.bias) == (True, None, [None] * 3, True)
    layer = peft_layers.Linear(nn.Linear(4, 6), "x", LoraConfig(r=3, lora_alpha=32, use_dora=True), r=3, lora_alpha=32)
    assert lora_parameters(layer).loras[0].magnitude is layer.lora_magnitude_vector["x"].weight
    two = fake()
    two.lora_A["y"], two.lora_B["y"], two.scaling["y"] = factor(2, 4), factor(6, 2, bias=torch.ones(6)), 0.5
    two.active_adapters.append("y")
    found = lora_parameters(two)
    assert [(one.name, one.scaling) for one in found.loras] == [("x", 32 / 3), ("y", 0.5)]
    assert found.loras[1].bias is two.lora_B["y"].bias
