"""Bases whose stored numbers are not their values: scaled fp8 travels with its scales, or as values without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import UnsupportedLora
from bridge.model.lora_format import LoraLimits
from tests.trainer_side.lora.peft_rows import ROWS, build
from trainer_side.lora import LoraModel, adapter_tensors, merged_tensors

ROOM = [LoraLimits(64, 4)]
SCALES, WEIGHT = "linear.weight_scale_inv", "linear.weight"


def scaled_fp8() -> Any:
    model: Any = build(next(row for row in ROWS if row.name == "linear"), torch.float32)
    base = model.base_model.model.linear.base_layer
    base.weight = nn.Parameter(base.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    base.weight_scale_inv = nn.Parameter(torch.full((1, 1), 0.5), requires_grad=False)
    base.block_size = (128, 128)
    return model


def test_scaled_fp8_travels_with_its_scales_or_as_values() -> None:
    model = scaled_fp8()
    lora = LoraModel(model)
    pairs = list(model.named_parameters())
    base = lora.view("base", pairs)
    assert {WEIGHT, SCALES} <= {name for name, _ in base.named}
    view = lora.view("merged", pairs)
    assert SCALES not in {name for name, _ in view.named}
    (weight,) = [c for c in view.computed if c.name == WEIGHT]
    assert weight.stand_in.dtype.itemsize > 1
    layer = model.base_model.model.linear
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    wanted = layer.base_layer.weight.float() * 0.5 + product
    assert torch.allclose(weight.compute(torch.float32), wanted, atol=1e-6)
    with model.disable_adapter():
        assert {WEIGHT, SCALES} <= {name for name, _ in lora.view("merged", pairs).named}
    assert WEIGHT in dict(merged_tensors(model))
    assert "linear.lora_A.weight" in dict(adapter_tensors(model))


def test_a_packed_base_that_nobody_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_side.lora.layers.dequant.find_spec", lambda name: None)  # its library is not installed
    model: Any = build(next(row for row in ROWS if row.name == "linear"), torch.float32)
    base = model.base_model.model.linear.base_layer
    packed = nn.Parameter(torch.zeros(base.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = type("Packed", (), {"absmax": torch.ones(1), "quant_type": "nf4"})()  # type: ignore[attr-defined]
    base.weight = packed
    lora = LoraModel(model)
    with pytest.raises(UnsupportedLora, match="packed weights") as error:
        lora.choose("base", ROOM)
    assert "linear" in error.value.names
    with pytest.raises(UnsupportedLora, match="no dequantiser"):
        lora.choose("merged", ROOM)
