"""Loaders, skeletons, post-load layouts and wrappers: what the bridge's loader builds on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engine_side.embedded.config import LAYOUTS, EngineConfig
from engine_side.embedded.layers import LinearBase, ParallelLMHead, VocabParallelEmbedding
from engine_side.embedded.layouts import CanonicalStorage, shuffle, unshuffle
from engine_side.embedded.moe import FusedMoE
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.runner import ModelRunner
from engine_side.embedded.wrappers import WrappedLayer
from engine_side.engines.embedded import EmbeddedRankHost
from tests.engine_side import embedded_models as tiny


def runner(folder: Path, tp: Parallel | None = None, **options: object) -> ModelRunner:
    tp = tp or Parallel()
    return ModelRunner(EngineConfig(str(folder), tensor_parallel_size=tp.size, **options), tp)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["qwen2", "moe-mixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_skeleton_is_canonical_whatever_the_live_layout(tmp_path: Path, family: str, layout: str) -> None:
    tiny.save(tmp_path, family)
    host = EmbeddedRankHost(runner(tmp_path, layout=layout, wrap_linears=True))
    before = {name: (id(p), p.data_ptr()) for name, p in host.model.named_parameters()}
    skeleton = host.skeleton()
    plain = dict(runner(tmp_path).model.named_parameters())
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in plain.items()}
    for name, param in skeleton.named_parameters():
        assert param.is_meta, name
        assert callable(param.weight_loader), name  # type: ignore[attr-defined]
    assert before == {name: (id(p), p.data_ptr()) for name, p in host.model.named_parameters()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_loader_runs_on_meta_and_reads_no_values(tmp_path: Path, family: str) -> None:
    model = tiny.save(tmp_path, family)
    made = runner(tmp_path, load="dummy")
    host = EmbeddedRankHost(made)
    skeleton = host.skeleton()
    names = list(made.model.checkpoint_names())
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "model.safetensors")
    assert sorted(names) == sorted(stored), "checkpoint_names is what save_pretrained writes"
    host.load_weights(skeleton, ((n, t.to("meta")) for n, t in stored.items()))
    assert model.config.vocab_size == 173


@pytest.mark.parametrize("size", [2, 3])
def test_shards_of_all_ranks_make_the_whole(tmp_path: Path, size: int) -> None:
    tiny.save(tmp_path, "llama")  # 6 heads, 2 key-value heads
    if size == 3:
        tiny.save(tmp_path, "qwen2")  # 6 heads, 1 key-value head for 3 ranks
    whole = dict(runner(tmp_path).model.named_parameters())
    shards = [dict(runner(tmp_path, Parallel(rank, size)).model.named_parameters()) for rank in range(size)]
    embedding = torch.cat([s["model.embed_tokens.weight"] for s in shards])
    assert torch.equal(embedding[:173], whole["model.embed_tokens.weight"][:173])
    assert embedding.shape[0] % 64 == 0
    assert not embedding[173:].any(), "padding is zeros"
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(torch.cat([s[down] for s in shards], dim=1), whole[down])
    gate_up = "model.layers.0.mlp.gate_up_proj.weight"
    gates, ups = zip(*(s[gate_up].chunk(2) for s in shards))
    assert torch.equal(torch.cat([*gates, *ups]), whole[gate_up])
    qkv = "model.layers.0.self_attn.qkv_proj.weight"
    heads = 6 // size * (whole[qkv].shape[0] // (10 if size == 2 else 8))
    assert torch.equal(torch.cat([s[qkv][:heads] for s in shards]), whole[qkv][: heads * size])
    if size == 3:
        assert all(torch.equal(s[qkv][heads:], whole[qkv][heads * size :]) for s in shards), "replicated heads"


def linears(module: nn.Module) -> list[LinearBase]:
    return [m for m in module.modules() if isinstance(m, LinearBase)]


def test_transposed_keeps_the_parameter_and_swaps_its_attributes(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen2")
    plain, live = runner(tmp_path), runner(tmp_path, layout="transposed")
    for a, b in zip(linears(plain.model), linears(live.model)):
        assert torch.equal(a.weight, b.weight.t())
        assert b.weight.is_contiguous()
        assert (b.weight.input_dim, b.weight.output_dim) == (0, 1)  # type: ignore[attr-defined]
        assert callable(b.weight.weight_loader)  # type: ignore[attr-defined]


def test_shuffled_stays_in_its_storage_and_is_not_idempotent(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen2")
    live = runner(tmp_path, layout="shuffled")
    layer = next(m for m in linears(live.model) if m.weight.shape == (48, 48))
    canonical, address, loader = unshuffle(layer.weight), layer.weight.data_ptr(), layer.weight.weight_loader  # type: ignore[attr-defined]
    assert not torch.equal(canonical, layer.weight)
    assert live.post_load(layer)
    assert torch.equal(layer.weight, shuffle(shuffle(canonical)))
    assert not torch.equal(layer.weight, shuffle(canonical))
    assert (layer.weight.data_ptr(), layer.weight.weight_loader) == (address, loader)  # type: ignore[attr-defined]


def test_packed_hides_weight_and_bias(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen2", dtype=torch.bfloat16)
    live = runner(tmp_path, layout="packed")
    before = live.prompt_logprobs(tiny.prompts())
    for layer in linears(live.model):
        assert layer.weight.shape == (0,)
        assert not hasattr(layer.weight, "weight_loader")
        if layer.bias is not None:
            layer.bias.data.fill_(50.0)
    assert live.prompt_logprobs(tiny.prompts()) == before


def test_packed_tied_head_reads_its_own_copy(tmp_path: Path) -> None:
    model = tiny.save(tmp_path, "qwen2", tied=True)
    live = runner(tmp_path, layout="packed")
    head = live.model.lm_head
    assert head.weight is live.model.model.embed_tokens.weight
    with torch.no_grad():
        head.weight[:173] += torch.randn(173, 48)
        model.get_input_embeddings().weight.copy_(head.weight[:173])
    wanted = tiny.reference_logprobs(model, tiny.prompts())
    assert tiny.mean_difference(live.prompt_logprobs(tiny.prompts()), wanted) > 0.1, "the head is stale"
    live.post_load(head)
    assert tiny.mean_difference(live.prompt_logprobs(tiny.prompts()), wanted) < 1e-4


def test_packed_experts_sit_behind_a_latch(tmp_path: Path) -> None:
    model = tiny.save(tmp_path, "moe")
    wanted = tiny.reference_logprobs(model, tiny.prompts())
    live = runner(tmp_path, layout="packed")
    experts = next(m for m in live.model.modules() if isinstance(m, FusedMoE))
    canonical = [t.clone() for t in (runner(tmp_path).model.get_parameter("model.layers.0.mlp.experts.w13_weight"),)]
    experts.w13_weight.data.copy_(canonical[0])
    live.post_load(experts)
    assert tiny.mean_difference(live.prompt_logprobs(tiny.prompts()), wanted) > 0.05, "packing was skipped"
    experts.quant_method.storage = CanonicalStorage()
    experts.w2_weight.data.copy_(runner(tmp_path).model.get_parameter("model.layers.0.mlp.experts.w2_weight"))
    live.post_load(experts)
    assert tiny.mean_difference(live.prompt_logprobs(tiny.prompts()), wanted) < 1e-4


def test_a_wrapper_shows_weight_and_bias_also_where_it_is_none(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen2")
    live = runner(tmp_path, wrap_linears=True)
    attention = live.model.model.layers[0].self_attn
    qkv, out = attention.qkv_proj, attention.o_proj
    assert isinstance(qkv, WrappedLayer)
    assert isinstance(out, WrappedLayer)
    assert (qkv.weight, qkv.bias) == (qkv.base_layer.weight, qkv.base_layer.bias)
    assert qkv.bias is not None
    assert out.bias is None
    names = [name for name, _ in live.model.named_parameters()]
    assert "model.layers.0.self_attn.qkv_proj.bias" in names
    assert "model.layers.0.self_attn.qkv_proj.base_layer.weight" in dict(
        live.model.named_parameters(remove_duplicate=False)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrap", [False, True])
def test_apply_calls_one_module_alone(tmp_path: Path, layout: str, wrap: bool) -> None:
    tiny.save(tmp_path, "qwen3-biased")
    host = EmbeddedRankHost(runner(tmp_path, layout=layout, wrap_linears=wrap))
    plain = runner(tmp_path).model
    for path, module in plain.named_modules():
        live = host.model.get_submodule(path)
        if isinstance(module, LinearBase):
            x = torch.randn(5, module.input_size_per_partition)
            wanted = nn.functional.linear(x, module.weight, module.bias)
            torch.testing.assert_close(host.apply(live, x), wanted)
        elif isinstance(module, ParallelLMHead):
            x = torch.randn(5, 48)
            torch.testing.assert_close(host.apply(live, x), x @ module.weight.t())
    with pytest.raises(NotImplementedError, match="Attention"):
        host.apply(host.model.get_submodule("model.layers.0.self_attn"), torch.zeros(1, 48))


def test_apply_gives_one_ranks_part_without_its_peer(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3-biased")
    hosts = [EmbeddedRankHost(runner(tmp_path, Parallel(rank, 2))) for rank in range(2)]
    whole = runner(tmp_path).model
    ids = torch.tensor([0, 100, 172, 3])
    rows = [h.apply(h.model.get_submodule("model.embed_tokens"), ids) for h in hosts]
    assert torch.equal(rows[0] + rows[1], whole.get_parameter("model.embed_tokens.weight")[ids])
    assert not rows[1][0].any()
    out = whole.get_submodule("model.layers.0.self_attn.o_proj")
    x = torch.randn(4, 60)
    parts = [h.apply(h.model.get_submodule("model.layers.0.self_attn.o_proj"), p) for h, p in zip(hosts, x.chunk(2, 1))]
    torch.testing.assert_close(parts[0] + parts[1], out(x))


def test_apply_routes_row_i_to_expert_i(tmp_path: Path) -> None:
    tiny.save(tmp_path, "moe")
    for layout in LAYOUTS:
        host = EmbeddedRankHost(runner(tmp_path, layout=layout))
        plain = runner(tmp_path).model.get_submodule("model.layers.0.mlp.experts")
        assert isinstance(plain, FusedMoE)
        x = torch.randn(8, 48)
        got = host.apply(host.model.get_submodule("model.layers.0.mlp.experts"), x)
        for row in range(8):
            gate, up = (x[row] @ plain.w13_weight[row % 6].t()).chunk(2)
            torch.testing.assert_close(got[row], (nn.functional.silu(gate) * up) @ plain.w2_weight[row % 6].t())


def test_modules_without_post_load_say_so(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3")
    host = EmbeddedRankHost(runner(tmp_path))
    assert not host.post_load(host.model.get_submodule("model.norm"))
    assert host.post_load(host.model.get_submodule("lm_head"))
    assert isinstance(host.model.get_submodule("model.embed_tokens"), VocabParallelEmbedding)
