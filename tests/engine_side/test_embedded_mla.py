"""Latent attention and DeepSeek's routing: what transformers computes, from a cache of one latent per token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from bridge.errors import ConfigError, UnexpectedTensor
from bridge.protocol.codec import Sampling
from engine_side.embedded.config import LAYOUTS, EngineConfig
from engine_side.embedded.engine import Engine
from engine_side.embedded.layers import LayerContext, MergedColumnParallelLinear
from engine_side.embedded.layouts import POST_LOAD_LAYOUTS
from engine_side.embedded.mla import AbsorbedAttention, FusedQkvAProj, MLAConfig, MLAttention
from engine_side.embedded.moe import CorrectedTopK, GroupedTopK, MoEConfig
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.runner import ModelRunner
from tests.engine_side import embedded_models as tiny

FAMILIES = ["deepseek-v3", "deepseek-v3-plain", "deepseek-v2"]
GREEDY = Sampling(max_tokens=16, temperature=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_is_transformers_to_the_fifth_place(tmp_path: Path, family: str, layout: str) -> None:
    wanted = tiny.reference_logprobs(tiny.save(tmp_path, family), tiny.prompts())
    for wrap in (False, True):
        runner = ModelRunner(EngineConfig(str(tmp_path), layout=layout, wrap_linears=wrap), Parallel())
        got = runner.prompt_logprobs(tiny.prompts())
        assert max(abs(a - b) for x, y in zip(got, wanted) for a, b in zip(x, y)) < 1e-5


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("deepseek-v3", {"layout": "packed"}),
        ("deepseek-v3-plain", {"wrap_linears": True}),
        ("deepseek-v2", {"tensor_parallel_size": 2, "layout": "transposed"}),
        ("deepseek-v3", {"tensor_parallel_size": 2, "wrap_linears": True}),
    ],
)
def test_decode_reads_the_latents_that_prefill_wrote(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    """Greedy tokens over several blocks, their log-probabilities, and a second request that finds its prefix cached."""
    model = tiny.save(tmp_path, family)
    prompts = [list(prompt) for prompt in tiny.prompts()]
    with Engine(EngineConfig(str(tmp_path), threads=1, block_size=8, **options)) as engine:
        first = engine.generate(prompts, GREEDY)
        fresh = engine.cached_blocks_read
        again = engine.generate(prompts, GREEDY)
        assert engine.cached_blocks_read > fresh
    whole = [[*prompt, *completion.token_ids] for prompt, completion in zip(prompts, first)]
    wanted = tiny.reference_logprobs(model, whole)
    for prompt, completion, cached, scores in zip(prompts, first, again, wanted):
        assert list(completion.token_ids) == tiny.reference_greedy(model, prompt, GREEDY.max_tokens)
        assert completion.token_ids == cached.token_ids
        new = scores[len(prompt) - 1 :]
        assert max(abs(a - b) for a, b in zip(completion.logprobs, new)) < 1e-5
        assert max(abs(a - b) for a, b in zip(cached.logprobs, new)) < 1e-5


def test_the_cache_holds_one_latent_per_token_and_layer(tmp_path: Path) -> None:
    tiny.save(tmp_path, "deepseek-v3")
    runner = ModelRunner(EngineConfig(str(tmp_path)), Parallel())
    kv = runner._make_kv(5)
    for layer in range(3):
        assert [tuple(t.shape) for t in kv.layers[layer]] == [(5, 16, 1, 14 + 6)]


def test_what_is_derived_is_no_parameter_and_follows_post_load(tmp_path: Path) -> None:
    model = tiny.save(tmp_path, "deepseek-v3")
    runner = ModelRunner(EngineConfig(str(tmp_path), layout="shuffled"), Parallel())
    attention = runner.model.get_submodule("model.layers.1.self_attn")
    assert isinstance(attention, MLAttention)
    inner = attention.mla_attn
    assert not [*inner.parameters(), *inner.buffers()]
    whole = model.get_parameter("model.layers.1.self_attn.kv_b_proj.weight").view(6, 10 + 9, 14)
    assert torch.equal(inner.w_uk, whole[:, :10])
    assert torch.equal(inner.w_uv, whole[:, 10:].transpose(1, 2))
    addresses = inner.w_uk.data_ptr(), inner.w_uv.data_ptr()
    kv_b = attention.kv_b_proj.weight.data
    kv_b.mul_(2)
    assert runner.post_load(inner)
    assert torch.equal(inner.w_uk, 2 * whole[:, :10])
    assert addresses == (inner.w_uk.data_ptr(), inner.w_uv.data_ptr())


def test_the_fused_projection_is_a_merged_layer_with_a_forward_of_its_own() -> None:
    layer = FusedQkvAProj(8, (5, 6), True, LayerContext(torch.float32, Parallel(), POST_LOAD_LAYOUTS["canonical"]))
    for param in (layer.weight, layer.bias):
        assert param is not None
        param.data.normal_(generator=torch.Generator().manual_seed(1))
    assert isinstance(layer, MergedColumnParallelLinear)
    assert type(layer).forward is not MergedColumnParallelLinear.forward
    assert layer.tp.size == 1, "whole on every rank"
    for rows in (1, 1024, 2500):
        x = torch.randn(rows, 8)
        assert torch.allclose(layer(x), functional.linear(x, layer.weight, layer.bias), atol=1e-6)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("experts", "groups", "used", "top"), [(8, 4, 2, 3), (12, 3, 1, 4), (6, 1, 1, 2), (8, 2, 2, 8)]
)
def test_routing_is_transformers_routing(experts: int, groups: int, used: int, top: int, renormalize: bool) -> None:
    torch.manual_seed(experts)
    config = MoEConfig(experts, top, 4, renormalize, groups, used, 2.5)
    x, correction = torch.randn(200, 10), torch.randn(experts) * 0.2
    fields = {
        "hidden_size": 10, "n_routed_experts": experts, "num_experts": experts, "num_experts_per_tok": top,
        "n_group": groups, "topk_group": used, "norm_topk_prob": renormalize, "routed_scaling_factor": 2.5,
        "topk_method": "group_limited_greedy", "num_local_experts": experts,
    }  # fmt: skip
    theirs = type("Config", (), fields)()
    ours = CorrectedTopK(config, torch.float32)
    router = DeepseekV3TopkRouter(theirs)
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.copy_(correction)
        ours.e_score_correction_bias.copy_(correction)
        _, weights, ids = router(x)
        assert torch.allclose(
            dense(experts, *ours(functional.linear(x, router.weight), x.dtype)), dense(experts, weights, ids)
        )
        if not renormalize:
            old = DeepseekV2TopkRouter(theirs)
            old.weight.normal_()
            _, weights, ids = old(x)
            found = GroupedTopK(config, torch.float32)(functional.linear(x, old.weight), x.dtype)
            assert torch.allclose(dense(experts, *found), dense(experts, weights, ids))


def dense(experts: int, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[n, experts], the weight of each expert: no order of the chosen ones."""
    return torch.zeros(len(ids), experts).scatter_(1, ids, weights)


def test_the_correction_chooses_and_does_not_weigh() -> None:
    ours = CorrectedTopK(MoEConfig(4, 1, 4, False), torch.float32)
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert ours(logits, torch.float32)[1].item() == 0
    ours.e_score_correction_bias[3] = 9.0
    weights, ids = ours(logits, torch.float32)
    assert ids.item() == 3
    assert weights.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw.pop("kv_lora_rank"), "kv_lora_rank"),
        (lambda raw: raw.update(n_group=3), "equal groups"),
        (lambda raw: raw.update(num_experts_per_tok=5), "1 to 4"),
        (lambda raw: raw.update(moe_layer_freq=2), "moe_layer_freq"),
        (lambda raw: raw.update(architectures=["DeepseekV2ForCausalLM"], topk_method="noaux_tc"), "topk_method"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, change: Any, words: str) -> None:
    tiny.save(tmp_path, "deepseek-v3")
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=words):
        ModelRunner(EngineConfig(str(tmp_path), load="dummy"), Parallel())


def test_layers_that_predict_further_tokens_are_left_out_and_no_others(tmp_path: Path) -> None:
    wanted = tiny.reference_logprobs(tiny.save(tmp_path, "deepseek-v3", num_nextn_predict_layers=1), tiny.prompts())
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    for layer, refused in ((3, False), (4, True)):
        save_file({**good, f"model.layers.{layer}.eh_proj.weight": torch.ones(2, 2)}, file)
        if refused:
            with pytest.raises(UnexpectedTensor, match=r"layers\.4\.eh_proj"):
                ModelRunner(EngineConfig(str(tmp_path)), Parallel())
        else:
            runner = ModelRunner(EngineConfig(str(tmp_path)), Parallel())
            assert tiny.mean_difference(runner.prompt_logprobs(tiny.prompts()), wanted) < 1e-5


def test_stale_derived_tensors_would_show(tmp_path: Path) -> None:
    """The comparison of this file can fail: without post-load the engine computes with former weights."""
    model = tiny.save(tmp_path, "deepseek-v3")
    runner = ModelRunner(EngineConfig(str(tmp_path)), Parallel())
    with torch.no_grad():
        name = "model.layers.0.self_attn.kv_b_proj.weight"
        model.get_parameter(name).add_(torch.randn(model.get_parameter(name).shape) * 0.2)
        runner.model.load_weights([(name, model.get_parameter(name))])
    wanted = tiny.reference_logprobs(model, tiny.prompts())
    assert tiny.mean_difference(runner.prompt_logprobs(tiny.prompts()), wanted) > 1e-3
    for module in runner.model.modules():
        if isinstance(module, AbsorbedAttention):
            runner.post_load(module)
    assert tiny.mean_difference(runner.prompt_logprobs(tiny.prompts()), wanted) < 1e-5


def test_sizes_are_read_from_the_familys_own_fields(tmp_path: Path) -> None:
    tiny.save(tmp_path, "deepseek-v3-plain")
    config = ModelRunner(EngineConfig(str(tmp_path), load="dummy"), Parallel()).model_config
    assert MLAConfig.of(config) == MLAConfig(None, 14, 10, 6, 9, True, False)
