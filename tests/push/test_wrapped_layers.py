"""Base weights into layers that LoRA wrapped, their biases included; and what the wrappers show of the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from engine_side.embedded.lora.layers import BaseLayerWithLoRA
from engine_side.embedded.wrappers import unwrap
from tests.conftest import tiny_qwen2
from tests.push.lora_rig import LoraRig, apart, at, model_of, new_base
from tests.push.rig import same_bits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Make = Callable[..., LoraRig]
ATTENTION = "model.layers.1.self_attn"


@pytest.mark.parametrize("engine", [{}, {"layout": "packed"}, {"wrap_linears": True, "wrap_levels": 2}], ids=str)
def test_sglang_22169_base_sync_into_wrapped_layers_with_bias(make: Make, engine: dict[str, Any]) -> None:
    rig = make(engine=engine)
    rig.push(mode="adapter")
    base = new_base(rig)
    assert rig.push(mode="base").verified is True
    wrapper = at(rig, f"{ATTENTION}.qkv_proj")
    assert isinstance(wrapper, BaseLayerWithLoRA)
    fused = torch.cat([base[f"{ATTENTION}.{part}_proj.bias"] for part in "qkv"])
    for bias in (unwrap(wrapper).bias, wrapper.bias):
        assert isinstance(bias, nn.Parameter)
        assert same_bits(bias, fused)
    assert rig.serves(rig.truth()), "weight, bias and the adapter above them"
    assert rig.serves(rig.base_truth(), "base")


def test_sglang_22169_a_bias_that_moves_alone_moves_the_engine(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    before = rig.answers()
    live = rig.model.get_base_model().model.layers[0].self_attn
    for part in (live.q_proj, live.k_proj, live.v_proj):
        part.base_layer.bias.data.add_(0.5)
    rig.push(mode="base")
    assert apart(rig.answers(), before) > 0.01
    assert rig.serves(rig.truth())


def test_sglang_22169_bias_is_exposed_also_where_it_is_none(make: Make) -> None:
    rig = make()
    rig.push(mode="base")
    wrapper = at(rig, f"{ATTENTION}.o_proj")
    assert isinstance(wrapper, BaseLayerWithLoRA)
    assert "bias" in wrapper._parameters
    assert wrapper.bias is None
    assert unwrap(wrapper).bias is None
    assert at(rig, "lm_head").bias is None, "a head registers no bias at all"


def test_sglang_22169_named_parameters_shows_the_bias(make: Make) -> None:
    rig = make()
    rig.push(mode="base")
    shown = dict(model_of(rig).named_parameters())
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn.qkv_proj"
        assert shown[f"{path}.bias"] is unwrap(at(rig, path)).bias
    assert sum(name.endswith(".bias") for name in shown) == 2


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sglang_22547_wrapper_exposes_num_embeddings(make: Make, tied: bool) -> None:
    rig = make(tiny_qwen2(tied=tied), target_modules=["embed_tokens", "q_proj"])
    for mode in ("base", "adapter"):
        rig.push(mode=mode)
        for path in ("model.embed_tokens", "lm_head"):
            wrapper = at(rig, path)
            assert isinstance(wrapper, BaseLayerWithLoRA)
            assert wrapper.num_embeddings == 131
            assert wrapper.num_embeddings_padded == 192
    assert rig.serves(rig.truth())
