"""One part of a fused layer comes alone: the others keep their bits, and no level of verification mistakes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import tiny_qwen2
from tests.push.rig import Rig

LAYER = "model.layers.1.self_attn"


@pytest.mark.parametrize("layout", ["canonical", "transposed", "shuffled"])
@pytest.mark.parametrize(
    "name", [f"{LAYER}.q_proj.weight", f"{LAYER}.k_proj.bias", "model.layers.0.mlp.up_proj.weight"]
)
def test_a_part_of_a_fused_layer_comes_alone(checkpoint: Callable[[Any], Path], layout: str, name: str) -> None:
    model = tiny_qwen2()
    rig = Rig(checkpoint(model), model, layout=layout, threads=1)
    try:
        for step in (1, 2):
            with torch.no_grad():
                model.get_parameter(name).add_(torch.randn(model.get_parameter(name).shape) * 0.3)
            assert not rig.serves(model, 1e-3), "the step must be visible, else this test shows nothing"
            receipt = rig.b.push([(name, model.get_parameter(name))], partial=True, verify="weights")
            assert receipt.verified is True
            assert receipt.version == step
            assert rig.serves(model)
        rig.b.rollback()
        assert not rig.serves(model, 1e-3)
    finally:
        rig.close()
