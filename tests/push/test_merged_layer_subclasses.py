"""LoRA on subclasses of merged layers: they are found, wrapped and loaded, and keep their own forward."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import ConfigError
from engine_side.embedded import runner
from engine_side.embedded.config import LAYOUTS, EngineConfig
from engine_side.embedded.layers import LinearBase, MergedColumnParallelLinear
from engine_side.embedded.lora.layers import BaseLayerWithLoRA, LinearLayerWithLoRA
from engine_side.embedded.lora.slots import LoraPart
from engine_side.embedded.mla import FusedQkvAProj
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.runner import ModelRunner
from engine_side.embedded.wrappers import unwrap
from engine_side.engines.embedded import EmbeddedRankHost
from tests.conftest import tiny_qwen2, tiny_qwen3_moe
from tests.engine_side.embedded_models import make_model
from tests.push.lora_rig import LoraRig, apart, at, new_base
from tests.push.rig import refused, same_bits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Make = Callable[..., LoraRig]
ATTENTION = "model.layers.1.self_attn"
LATENT_TARGETS = ["q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


@pytest.mark.parametrize("engine", [{}, {"layout": "packed"}, {"tensor_parallel_size": 2}], ids=str)
def test_vllm_35077_subclasses_of_merged_layers_are_wrapped_and_loaded(make: Make, engine: dict[str, Any]) -> None:
    """Both parts of DeepSeek's `fused_qkv_a_proj`: base weights through the wrapper, then adapters on it."""
    base = make_model("deepseek-v3", attention_bias=True)
    rig = make(base, target_modules=LATENT_TARGETS, engine=engine)
    wrapper = at(rig, f"{ATTENTION}.fused_qkv_a_proj")
    assert type(wrapper) is LinearLayerWithLoRA
    assert type(unwrap(wrapper)) is FusedQkvAProj
    sent = new_base(rig)
    assert rig.push(mode="base").verified is True
    if "layout" not in engine:
        for kind in ("weight", "bias"):
            parts = [sent[f"{ATTENTION}.{name}.{kind}"] for name in ("q_a_proj", "kv_a_proj_with_mqa")]
            assert same_bits(getattr(unwrap(wrapper), kind), torch.cat(parts))
    assert rig.serves(rig.base_truth())
    assert rig.push(mode="adapter").verified is True
    assert rig.serves(rig.truth())
    assert apart(rig.answers(), rig.answers("base")) > 0.01


def test_vllm_35077_a_subclass_keeps_its_own_forward_when_unsharded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make(make_model("deepseek-v3"), target_modules=LATENT_TARGETS)
    rig.push(mode="adapter")
    truth, calls, own = rig.truth(), [], FusedQkvAProj.forward

    def counted(self: FusedQkvAProj, x: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return own(self, x)

    monkeypatch.setattr(FusedQkvAProj, "forward", counted)
    for adapter in ("base", "current"):
        calls.clear()
        rig.answers(adapter)
        assert len(set(map(id, calls))) == 3, f"each layer's own forward, {adapter}"
    assert rig.serves(truth)
    assert FusedQkvAProj.forward is not MergedColumnParallelLinear.forward


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vllm_35077_quant_method_through_wrapper_chains(make: Make, layout: str, levels: int) -> None:
    rig = make(engine={"layout": layout, "wrap_linears": True, "wrap_levels": levels})
    wrapper = at(rig, f"{ATTENTION}.qkv_proj")
    chain = [wrapper]
    while "base_layer" in dict(chain[-1].named_children()):
        chain.append(chain[-1].base_layer)
    assert len(chain) == levels + 2
    core = chain[-1]
    assert isinstance(core, LinearBase)
    assert all(link.quant_method is core.quant_method for link in chain)
    # and the sync finds it there: a packed or shuffled layer is only right after its own post-load step
    new_base(rig)
    assert rig.push(mode="base").verified is True
    assert rig.serves(rig.base_truth())
    host = EmbeddedRankHost(rig.engine.runner)
    x = torch.randn(3, 48)
    assert all(torch.equal(host.apply(link, x), host.apply(core, x)) for link in chain)
    run: list[Any] = []
    core.quant_method = SimpleNamespace(process_weights_after_loading=run.append)
    assert all(host.post_load(link) for link in chain)
    assert [layer is core for layer in run] == [True] * len(chain), "on the layer itself, from every link"


def test_vllm_35077_the_warm_up_rank_is_what_sharded_experts_need(
    checkpoint: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(checkpoint(tiny_qwen3_moe()))
    ranks: list[int] = []
    write = LoraPart.write

    def noted(self: LoraPart, slot: int, a: torch.Tensor, b: torch.Tensor) -> None:
        ranks.append(a.shape[0])
        write(self, slot, a, b)

    monkeypatch.setattr(LoraPart, "write", noted)
    for size, most in ((1, 1), (2, 2), (2, 7), (4, 4)):
        ranks.clear()
        config = EngineConfig(folder, tensor_parallel_size=size, max_loras=1, max_lora_rank=most)
        ModelRunner(config, Parallel(0, size))
        assert set(ranks) == {size}
    for size, most in ((2, 1), (4, 3)):
        config = EngineConfig(folder, tensor_parallel_size=size, max_loras=1, max_lora_rank=most)
        with refused(ConfigError, 2, "max_lora_rank", f"at least {size}", f"got: {most}", f"max_lora_rank={size}"):
            ModelRunner(config, Parallel(0, size))
    # a need of experts only: without adapters on them any rank will do
    config = EngineConfig(folder, tensor_parallel_size=2, max_loras=1, max_lora_rank=1, lora_targets=("q_proj",))
    ModelRunner(config, Parallel(0, 2))


@pytest.mark.parametrize("target", ["input_layernorm", "self_attn", "mlp"])
def test_vllm_35077_an_unwrappable_module_that_was_asked_for_is_an_error(
    checkpoint: Callable[[Any], Path], target: str
) -> None:
    folder = str(checkpoint(tiny_qwen2()))
    config = EngineConfig(folder, max_loras=1, lora_targets=("q_proj", target))
    with refused(ConfigError, 2, "cannot carry", f"model.layers.0.{target}", repr(target), "lora_targets"):
        ModelRunner(config, Parallel())


class Unwrappable(nn.Module):
    """A layer with a matrix for which there is no wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(48, 48), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x @ self.weight


def test_vllm_35077_an_unwrappable_module_that_nobody_asked_for_is_a_warning(
    checkpoint: Callable[[Any], Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = runner.load_checkpoint

    def with_a_stranger(model: Any, folder: Path) -> None:
        load(model, folder)
        for layer in model.model.layers:
            layer.mlp = nn.Sequential(layer.mlp, Unwrappable())

    monkeypatch.setattr("engine_side.embedded.runner.load_checkpoint", with_a_stranger)
    folder = str(checkpoint(tiny_qwen2()))
    with caplog.at_level(logging.WARNING):
        made = ModelRunner(EngineConfig(folder, max_loras=1), Parallel())
    (record,) = caplog.records
    assert all(word in record.getMessage() for word in ("Unwrappable", "2 layers", "model.layers.0.mlp.1"))
    assert isinstance(made.model.get_submodule(f"{ATTENTION}.qkv_proj"), BaseLayerWithLoRA), "the others are"
    caplog.clear()
    with pytest.raises(ConfigError, match="Unwrappable"):
        ModelRunner(EngineConfig(folder, max_loras=1, lora_targets=("mlp.1",)), Parallel())
