"""Post-load steps that shuffle, transpose or pack: parameters stay the objects they were, at their addresses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine_side.embedded import layouts
from engine_side.embedded.config import LAYOUTS
from engine_side.live.bindings import AttributeSnapshot, diff
from engine_side.live.inplace import Outcome, copy_or_rebind_param
from tests.conftest import tiny_qwen2, tiny_qwen3_moe
from tests.engine_side.embedded_models import make_model
from tests.push.lora_rig import LoraRig, at, model_of
from tests.push.rig import Rig, same_bits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Make = Callable[..., LoraRig]
ATTENTION = "model.layers.1.self_attn"


PATHS = [
    *((tiny_qwen2, layout, wrapped) for layout in LAYOUTS for wrapped in (False, True)),
    *((tiny_qwen3_moe, layout, True) for layout in LAYOUTS),
    *((lambda: make_model("deepseek-v3"), layout, True) for layout in ("transposed", "shuffled")),
]


@pytest.mark.parametrize(("base", "layout", "wrapped"), PATHS)
def test_sglang_21825_post_load_shuffles_in_place_on_every_path(
    checkpoint: Callable[[Any], Path], base: Any, layout: str, wrapped: bool
) -> None:
    """Addresses, strides, loaders, sharding attributes: all of a parameter but its values is what it was."""
    model = base()
    rig = Rig(checkpoint(model), model, wrap_linears=wrapped, max_loras=int(wrapped), layout=layout)
    try:
        before = AttributeSnapshot(model_of(rig))
        loaders = {n: p.weight_loader for n, p in model_of(rig).named_parameters() if hasattr(p, "weight_loader")}
        assert any("qkv" in n or "experts" in n or "fused" in n for n in loaders)
        for _ in range(2):
            receipt = rig.good_push()
            assert not [name for rank in receipt.engines[0].ranks for name in rank.rebound]
            assert diff(before, AttributeSnapshot(model_of(rig))) == []
        live = dict(model_of(rig).named_parameters())
        assert all(live[name].weight_loader == loader for name, loader in loaders.items())
    finally:
        rig.close()


def test_sglang_21825_sharding_attributes_follow_an_in_place_transpose(checkpoint: Callable[[Any], Path]) -> None:
    layer: Any = nn.Linear(4, 4, bias=False)
    weight = layer.weight
    weight.input_dim, weight.output_dim, weight.weight_loader = 1, 0, print
    value, address = weight.detach().clone(), weight.data_ptr()
    assert copy_or_rebind_param(layer, "weight", weight.data.t()) is Outcome.COPIED
    assert torch.equal(layer.weight, value.t())
    assert layer.weight is weight
    assert weight.data_ptr() == address
    assert (weight.input_dim, weight.output_dim, weight.weight_loader) == (0, 1, print)
    # and pushes leave what an engine's own transpose made of them
    model = tiny_qwen2(num_attention_heads=4, num_key_value_heads=4, hidden_size=48)
    rig = Rig(checkpoint(model), model, layout="transposed", wrap_linears=True)
    try:
        for _ in range(2):
            rig.good_push()
            square = at(rig, f"{ATTENTION}.o_proj").weight
            assert square.shape == (48, 48)
            assert (square.input_dim, square.output_dim) == (0, 1)
            assert same_bits(square.t().contiguous(), model.model.layers[1].self_attn.o_proj.weight.detach())
    finally:
        rig.close()


def test_sglang_21825_shapes_that_differ_rebind_under_the_same_object() -> None:
    layer: Any = nn.Linear(4, 6, bias=False)
    weight = layer.weight
    weight.input_dim, weight.output_dim, weight.weight_loader = 1, 0, print
    value = torch.randn(8, 4)
    assert copy_or_rebind_param(layer, "weight", value) is Outcome.REBOUND
    assert layer.weight is weight
    assert torch.equal(weight, value)
    assert (weight.input_dim, weight.output_dim, weight.weight_loader) == (1, 0, print)
    assert copy_or_rebind_param(layer, "weight", value.t()) is Outcome.REBOUND
    assert (weight.input_dim, weight.output_dim, weight.weight_loader) == (0, 1, print)


class Growing(layouts.PackedLinearMethod):
    """A post-load step whose workspace is larger whenever it runs: a kernel that chose another tile."""

    calls = 0

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        Growing.calls += 1
        layer.workspace = nn.Parameter(torch.zeros(Growing.calls), requires_grad=False)


def test_sglang_21825_a_push_that_has_to_rebind_says_so(
    checkpoint: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    grows = replace(layouts.POST_LOAD_LAYOUTS["packed"], linear=Growing)
    monkeypatch.setitem(layouts.POST_LOAD_LAYOUTS, "canonical", grows)
    monkeypatch.setattr(Growing, "calls", 0)
    model = tiny_qwen2()
    rig = Rig(checkpoint(model), model, wrap_linears=True)
    try:
        live = {n: p for n, p in model_of(rig).named_parameters() if n.endswith(".workspace")}
        assert len(live) == 8
        before = {name: (p.numel(), p.data_ptr()) for name, p in live.items()}
        receipt = rig.good_push()
        rebound = {name.replace(".base_layer", "") for rank in receipt.engines[0].ranks for name in rank.rebound}
        assert rebound == set(live)
        after = dict(model_of(rig).named_parameters())
        assert all(after[name] is p for name, p in live.items()), "the same objects"
        assert all((p.numel(), p.data_ptr()) != before[name] for name, p in live.items()), "other storage"
    finally:
        rig.close()
