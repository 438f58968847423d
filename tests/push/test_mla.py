"""Latent attention through real pushes: what is derived from `kv_b_proj` follows it, and the strategies know so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bridge
from engine_side.embedded.config import LAYOUTS
from engine_side.embedded.mla import AbsorbedAttention, AbsorbMethod
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.runner import ModelRunner
from tests.conftest import perturb
from tests.engine_side.embedded_models import make_model
from tests.push.rig import Rig, refused
from trainer_side.reference import reference_logprobs

LEVELS = ("coverage", "attributes", "read-back", "probe")
KV_B = "model.layers.1.self_attn.kv_b_proj.weight"
CORRECTION = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    family, config = request.param
    model = make_model(family)
    model.save_pretrained(tmp_path)
    made = Rig(tmp_path, model, threads=1, **config)
    try:
        yield made
    finally:
        made.close()


def one_rank(**config: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("rig", [("deepseek-v3", config)], indirect=True, ids=["v3"])


def move_correction(model: Any, seed: int) -> None:
    """What the trainer's load balancing does: the correction moves without a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.3)


def derived(rig: Rig) -> list[AbsorbedAttention]:
    return [m for m in rig.engine.runner.model.modules() if isinstance(m, AbsorbedAttention)]


def off(rig: Rig, model: Any) -> float:
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [8, 9, 7, 9, 3, 2, 3]]
    got, want = rig.engine.prompt_logprobs(prompts), reference_logprobs(model, prompts)
    return max(abs(a - b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))


CASES = [
    *(("deepseek-v3", {"layout": layout, "wrap_linears": wrap}) for layout in LAYOUTS for wrap in (False, True)),
    ("deepseek-v3-plain", {}),
    ("deepseek-v3-plain", {"layout": "packed", "wrap_linears": True}),
    ("deepseek-v2", {"layout": "shuffled"}),
    ("deepseek-v3", {"tensor_parallel_size": 2}),
    ("deepseek-v2", {"tensor_parallel_size": 2, "layout": "packed", "wrap_linears": True}),
]


@pytest.mark.parametrize("rig", CASES, indirect=True, ids=lambda c: "-".join([c[0], *map(str, c[1].values())]))
def test_every_layout_serves_the_trainers_policy(rig: Rig) -> None:
    for step in (1, 2):
        move_correction(rig.model, step)
        receipt = rig.good_push()
        assert receipt.verified is True, receipt.engines
        for rank in receipt.engines[0].ranks:
            assert not rank.rebound
            assert not rank.canary_only
            assert {level.level for level in rank.levels if level.ok} >= set(LEVELS)
    assert rig.b.health().healthy


@one_rank()
def test_canonical_layouts_are_written_in_place_and_nothing_moves(rig: Rig) -> None:
    live = rig.engine.runner.model
    where = {name: (id(p), p.data_ptr()) for name, p in live.named_parameters()}
    kept = [(m.w_uk.data_ptr(), m.w_uv.data_ptr()) for m in derived(rig)]
    receipt = rig.good_push()
    assert set(receipt.engines[0].ranks[0].strategies) == {"in place"}
    assert where == {name: (id(p), p.data_ptr()) for name, p in live.named_parameters()}
    assert kept == [(m.w_uk.data_ptr(), m.w_uv.data_ptr()) for m in derived(rig)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("partial", [False, True], ids=["full", "partial"])
def test_kv_b_proj_alone_changes_the_output_rightly(layout: str, partial: bool, tmp_path: Path) -> None:
    """Checked without the canary: `verify="weights"` may not be what finds a stale derived tensor."""
    model = make_model("deepseek-v3")
    model.save_pretrained(tmp_path)
    rig = Rig(tmp_path, model, layout=layout, threads=1)
    try:
        rig.push()
        before = [(m.w_uk.clone(), m.w_uv.clone()) for m in derived(rig)]
        with torch.no_grad():
            model.get_parameter(KV_B).add_(torch.randn(model.get_parameter(KV_B).shape) * 0.2)
        assert off(rig, model) > 0.01, "the step must be visible, else this test shows nothing"
        sent = [(KV_B, model.get_parameter(KV_B))] if partial else model.named_parameters()
        rig.b.push(sent, partial=partial, verify="weights")
        assert off(rig, model) < 1e-5
        changed = [not torch.equal(m.w_uk, a) and not torch.equal(m.w_uv, b) for m, (a, b) in zip(derived(rig), before)]
        assert changed == [False, True, False]
    finally:
        rig.close()


@one_rank()
def test_what_is_derived_comes_back_with_a_rollback(rig: Rig) -> None:
    rig.good_push()
    first = rig.engine.prompt_logprobs([[1, 2, 3, 4, 5]])
    kept = [(m.w_uk.clone(), m.w_uv.clone()) for m in derived(rig)]
    rig.good_push()
    assert not torch.equal(derived(rig)[0].w_uk, kept[0][0])
    rig.b.rollback()
    assert rig.engine.prompt_logprobs([[1, 2, 3, 4, 5]]) == first
    assert all(torch.equal(m.w_uk, a) and torch.equal(m.w_uv, b) for m, (a, b) in zip(derived(rig), kept))


@one_rank()
def test_the_canary_is_the_second_net(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose post-load forgets to derive again: the last level sees it, and the push is taken back."""
    rig.good_push()
    monkeypatch.setattr(AbsorbMethod, "process_weights_after_loading", lambda self, layer: None)
    perturb(rig.model, seed=77, scale=0.3)
    with pytest.raises(bridge.PushAborted):
        rig.push()


@one_rank()
def test_the_routers_correction_travels_and_decides(rig: Rig) -> None:
    rig.push()
    move_correction(rig.model, 5)
    assert off(rig, rig.model) > 0.01, "the correction must be visible, else this test shows nothing"
    receipt = rig.push()
    assert receipt.verified is True
    assert off(rig, rig.model) < 1e-4
    (row,) = rig.b.explain(CORRECTION)
    assert row["parameter"] == "model.layers.1.mlp.routing.e_score_correction_bias"
    assert row["strategy"] == "in place"


def test_an_unbound_model_is_told_about_the_correction(tmp_path: Path) -> None:
    model = make_model("deepseek-v3")
    model.save_pretrained(tmp_path)
    rig = Rig(tmp_path, model, bound=False, threads=1)
    try:
        sent = {name: t for name, t in load_file(tmp_path / "model.safetensors").items() if name != CORRECTION}
        with refused(bridge.MissingTensor, 5, CORRECTION, "bind"):
            rig.b.push(sent.items())
    finally:
        rig.close()


@one_rank()
def test_the_fused_projection_says_where_its_parts_lie(rig: Rig) -> None:
    rig.push()
    layer = "model.layers.0.self_attn"
    rows = {part: rig.b.explain(f"{layer}.{part}.weight") for part in ("q_a_proj", "kv_a_proj_with_mqa")}
    assert {row["parameter"] for part in rows.values() for row in part} == {f"{layer}.fused_qkv_a_proj.weight"}
    assert {row["module"] for part in rows.values() for row in part} == {"FusedQkvAProj"}
    assert {row["dest"] for row in rows["q_a_proj"]}.isdisjoint(row["dest"] for row in rows["kv_a_proj_with_mqa"])


def test_heads_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    from engine_side.embedded.config import EngineConfig

    make_model("deepseek-v3").save_pretrained(tmp_path)
    with pytest.raises(bridge.ConfigError, match="attention heads"):
        ModelRunner(EngineConfig(str(tmp_path), tensor_parallel_size=4), Parallel(0, 4))


@one_rank()
def test_wrong_absorbed_projections_are_found_without_the_canary(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention holds `kv_b_proj` where no module tree shows it: what it derived is built again all the same."""
    rig.good_push()
    live = {id(module) for module in rig.engine.runner.model.modules()}
    real = AbsorbMethod.process_weights_after_loading

    def faulty(self: AbsorbMethod, layer: torch.nn.Module) -> None:
        real(self, layer)
        if id(layer) in live:
            layer.w_uv.data.mul_(2)

    rig.step()
    with monkeypatch.context() as patch:
        patch.setattr(AbsorbMethod, "process_weights_after_loading", faulty)
        with pytest.raises(bridge.BridgeError, match="self_attn"):
            rig.push(verify="weights")
    assert rig.push(verify="weights").verified is True
