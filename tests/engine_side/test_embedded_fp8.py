"""Block-scaled fp8 layers: what they compute, how their scales are cut over parts and ranks, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.errors import ConfigError, DtypeMismatch, MissingTensor, ShapeMismatch
from bridge.model.levels import RANK_LEVELS
from bridge.model.manifest import TensorInfo, lay_out
from bridge.model.regions import source_coverage
from bridge.model.torch_dtypes import dtype_name
from engine_side.embedded.config import LAYOUTS, EngineConfig
from engine_side.embedded.engine import Engine
from engine_side.embedded.layers import LinearBase
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.quant import STORAGE
from engine_side.embedded.runner import ModelRunner
from engine_side.engines.embedded import EmbeddedRankHost
from engine_side.load.loader import Loader
from engine_side.load.version_zero import read_back
from engine_side.verify.verify import Verifier
from tests.engine_side import embedded_models as tiny

BLOCK = (2, 8)
EVEN = {"intermediate_size": 96}
"""Divisible by two ranks and two rows."""
Q = "model.layers.0.self_attn.q_proj.weight"


def runner(folder: Path, rank: int = 0, **options: Any) -> ModelRunner:
    config = EngineConfig(str(folder), **options)
    return ModelRunner(config, Parallel(rank, config.tensor_parallel_size, 5.0))


@pytest.mark.parametrize("family", ["llama", "qwen2", "moe", "deepseek-v3", "deepseek-v3-plain"])
def test_every_layout_computes_what_codes_and_scales_stand_for(tmp_path: Path, family: str) -> None:
    """Rows and columns that are no multiple of a block, fused parts, experts, and what a latent attention derives."""
    model = tiny.make_model(family)
    before = tiny.reference_logprobs(model, tiny.prompts())
    tiny.save_fp8(tmp_path, model, BLOCK)
    wanted = tiny.reference_logprobs(model, tiny.prompts())
    assert tiny.mean_difference(before, wanted) > 1e-3, "fp8 must be visible, else this test shows nothing"
    for layout in LAYOUTS:
        for wrap in (False, True):
            live = runner(tmp_path, layout=layout, wrap_linears=wrap)
            assert tiny.mean_difference(live.prompt_logprobs(tiny.prompts()), wanted) < 1e-5, (layout, wrap)


def test_two_ranks_compute_the_same(tmp_path: Path) -> None:
    model = tiny.make_model("qwen2", **EVEN)
    tiny.save_fp8(tmp_path, model, BLOCK)
    with Engine(EngineConfig(str(tmp_path), tensor_parallel_size=2, threads=1)) as engine:
        got = engine.prompt_logprobs(tiny.prompts())
    assert tiny.mean_difference(got, tiny.reference_logprobs(model, tiny.prompts())) < 1e-5


def test_only_linear_layers_and_experts_are_converted(tmp_path: Path) -> None:
    tiny.save_fp8(tmp_path, tiny.make_model("moe"), BLOCK, (*tiny.PLAIN, "model.layers.1", "down_proj", "o_proj"))
    with pytest.raises(ConfigError, match=r"in part.*layers\.0\.mlp\.experts"):
        runner(tmp_path)  # down_proj of experts, without the other two
    plain = (*tiny.PLAIN, "model.layers.1", "mlp.experts", "o_proj")
    edit(tmp_path, lambda q: q.update(modules_to_not_convert=list(plain)))
    skeleton = runner(tmp_path, load="dummy").skeleton()
    converted = {name for name, p in skeleton.named_parameters() if p.dtype is STORAGE}
    assert {name for name in converted if ".layers.0." in name} == {"model.layers.0.self_attn.qkv_proj.weight"}
    assert not any(".layers.1." in name for name in converted)
    assert any(isinstance(m, LinearBase) and not hasattr(m, "weight_scale_inv") for m in skeleton.modules())


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw["quantization_config"])
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "ranks", "words"),
    [
        (lambda q: q.update(weight_block_size=[4, 8]), 1, r"gate_up_proj.*multiples of 4 rows.*90"),
        (lambda q: q.update(weight_block_size=[2, 32]), 2, r"o_proj.*multiples of 32 columns"),
        (lambda q: q.update(modules_to_not_convert=["k_proj"]), 1, r"qkv_proj.*k_proj there"),
        (lambda q: q.update(quant_method="awq"), 1, r"quant_method.*fp8.*awq"),
        (lambda q: q.pop("weight_block_size"), 1, r"weight_block_size.*None"),
        (lambda q: q.update(activation_scheme="static"), 1, r"activation_scheme.*static"),
    ],
)
def test_what_cannot_be_cut_or_is_not_known_is_refused(tmp_path: Path, change: Any, ranks: int, words: str) -> None:
    tiny.save_fp8(tmp_path, tiny.make_model("llama"), BLOCK)
    edit(tmp_path, change)
    with pytest.raises(ConfigError, match=words):
        runner(tmp_path, load="dummy", tensor_parallel_size=ranks)


def test_a_checkpoint_that_is_not_what_its_config_says_is_refused(tmp_path: Path) -> None:
    tiny.save_fp8(tmp_path, tiny.make_model("llama"), BLOCK)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    scale = f"{Q}_scale_inv"
    cases = [
        (MissingTensor, scale, {k: v for k, v in good.items() if k != scale}),
        (ShapeMismatch, scale, {**good, scale: good[scale][:-1].contiguous()}),
        (DtypeMismatch, Q, {**good, Q: good[Q].to(torch.bfloat16)}),
        (DtypeMismatch, Q, {**good, Q: good[Q].view(torch.uint8)}),
    ]
    for error, name, tensors in cases:
        save_file(tensors, file)
        with pytest.raises(error, match=name.replace(".", r"\.")):
            runner(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "changes"), [("qwen2", EVEN), ("deepseek-v3", EVEN)])
def test_two_ranks_cover_codes_and_scales_together(
    tmp_path: Path, family: str, changes: dict[str, Any], layout: str
) -> None:
    """Every element of every tensor is read by a rank, and what lies there afterwards is what was sent, bit for bit."""
    changes = changes | ({"moe_intermediate_size": 32, "v_head_dim": 16} if family != "qwen2" else {})
    slots = [
        tiny.save_fp8(tmp_path / str(seed), tiny.make_model(family, seed=seed, **changes), BLOCK) for seed in (3, 99)
    ]
    infos = [TensorInfo(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in slots[0].items()]
    manifest = lay_out(infos)
    into = {n: torch.zeros_like(t) for n, t in slots[0].items()}
    regions: list[Any] = []
    lost: set[str] = set()
    for rank in (0, 1):
        host = EmbeddedRankHost(runner(tmp_path / "3", rank, layout=layout, tensor_parallel_size=2))
        loader = Loader(host, infos)
        loader.check()
        loader.map(manifest, [[slot[s.name] for s in manifest.tensors] for slot in slots])
        verifier = Verifier(loader)
        assert all(r.ok for r in verifier.run(RANK_LEVELS, 0))
        outcome = loader.apply(1)
        found = verifier.run(RANK_LEVELS, 1, outcome=outcome, previous=0)
        assert all(r.ok for r in found), [r for r in found if not r.ok]
        assert not outcome.rebound
        assert loader.baked.dtypes[Q.replace("q_proj", "o_proj")] == "fp8_e4m3"
        regions += [(m.tensor, m.source) for m in loader.baked.plan.moves]
        lost |= set(read_back(loader, [into[s.name] for s in manifest.tensors])[0])
        loader.close()
    assert source_coverage({n: t.numel() for n, t in slots[0].items()}, regions) == {}
    for name in into.keys() - lost:
        sent, back = slots[1][name], into[name]
        assert torch.equal(sent.view(torch.uint8), back.view(torch.uint8)), name
    assert bool(lost) == (layout == "packed")
