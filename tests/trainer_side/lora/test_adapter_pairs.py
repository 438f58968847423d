"""The adapter in portable form: W + B A is the effective weight, for every module, whatever the trainer stores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bridge.errors import UnsupportedLora
from bridge.model.lora_format import LoraLimits, pairs
from bridge.model.manifest import TensorInfo
from bridge.model.regions import Region, dense
from tests.trainer_side.lora.peft_rows import CAUSAL, ROWS, build
from trainer_side.lora import LoraModel, adapter_tensors, base_tensors, merged_tensors
from trainer_side.lora.layers.expert_slices import ExpertSlice, find_slice
from trainer_side.names.naming import CanonicalTensor, Piece

CARRIED = (
    "linear", "odd module name", "conv1d of transformers", "embedding", "embedding, fan_in_fan_out", "scaled embedding",
    "rslora", "patterns", "set_scale", "scale_layer", "adapters of different layers", "kasa", "bd-lora, A",
    "bd-lora, B", "mica", "pissa", "2-d parameter", "2-d parameter, oblong",
)  # fmt: skip
CARRIED_CAUSAL = (
    "all linear", "renamed", "rslora and patterns", "two adapters", "embedding and head", "tied, head only",
    "tied, embedding only", "experts", "experts, down only",
)  # fmt: skip


def of(name: str, table: Any) -> Any:
    return next(row for row in table if row.name == name)


def applied(base: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], flipped: bool) -> dict[str, torch.Tensor]:
    """Base weights with the adapter added, as an engine does."""
    found = dict(base)
    infos = [TensorInfo(name, "fp64", tuple(t.shape)) for name, t in adapter.items()]
    for pair in pairs(infos):
        delta = adapter[pair.b.name] @ adapter[pair.a.name]
        name = f"{pair.module}.weight"
        weight = base[name]
        found[name] = weight + (delta.T if pair.embedding or (flipped and pair.module == "transposed") else delta)
    return found


def check(model: Any) -> dict[str, torch.Tensor]:
    adapter = dict(adapter_tensors(model))
    base, merged = dict(base_tensors(model)), dict(merged_tensors(model))
    if "lm_head.weight" in merged and "lm_head.weight" not in base:
        base["lm_head.weight"] = base["model.embed_tokens.weight"]
    sums = applied(base, adapter, True)
    assert adapter
    assert sums.keys() == merged.keys()
    for name, tensor in merged.items():
        assert torch.allclose(sums[name], tensor, atol=1e-5 if tensor.dtype == torch.float32 else 1e-10), name
    changed = [name for name in merged if not torch.equal(base[name], merged[name])]
    assert len(changed) == len(adapter) // 2
    return adapter


@pytest.mark.parametrize("name", CARRIED)
def test_base_and_adapter_are_the_effective_weight(name: str) -> None:
    check(build(of(name, ROWS)))


@pytest.mark.parametrize("name", CARRIED_CAUSAL)
def test_base_and_adapter_are_the_effective_weight_of_language_models(name: str) -> None:
    row = of(name, CAUSAL)
    model = build(row, torch.float64)
    adapter = check(model)
    ranks = {t.shape[0] for n, t in adapter.items() if n.endswith(("lora_A.weight", "lora_embedding_A"))}
    assert len(ranks) == 1
    assert all(t.is_contiguous() for t in adapter.values())


def test_experts_become_pairs_of_their_checkpoint_modules() -> None:
    names = dict(adapter_tensors(build(of("experts", CAUSAL), torch.float64)))
    layer = "model.layers.1.mlp.experts.3"
    assert names[f"{layer}.gate_proj.lora_B.weight"].shape == (24, 3)
    assert names[f"{layer}.up_proj.lora_A.weight"].shape == (3, 48)
    assert names[f"{layer}.down_proj.lora_A.weight"].shape == (3, 24)
    assert torch.equal(names[f"{layer}.gate_proj.lora_A.weight"], names[f"{layer}.up_proj.lora_A.weight"])
    assert not torch.equal(names[f"{layer}.gate_proj.lora_B.weight"], names[f"{layer}.up_proj.lora_B.weight"])
    assert not any("gate_proj" in n for n, _ in adapter_tensors(build(of("experts, down only", CAUSAL))))


def test_several_adapters_stand_side_by_side_and_ranks_are_padded() -> None:
    model = build(of("two adapters", CAUSAL), torch.float64)  # rank 3 everywhere, 2 more on q_proj
    view = LoraModel(model).view("adapter", list(model.named_parameters()))
    assert view.adapter is not None
    assert view.adapter.rank == 5
    adapter = dict(adapter_tensors(model))
    assert adapter["model.layers.0.self_attn.k_proj.lora_A.weight"].shape == (5, 48)
    assert not adapter["model.layers.0.self_attn.k_proj.lora_A.weight"][3:].any()
    assert not adapter["model.layers.0.self_attn.k_proj.lora_B.weight"][:, 3:].any()
    assert adapter["model.layers.0.self_attn.q_proj.lora_B.weight"].any(dim=0).all()


def test_the_scaling_is_folded_before_the_cast() -> None:
    model = build(of("all linear", CAUSAL), torch.bfloat16)
    q = model.base_model.model.model.layers[0].self_attn.q_proj
    q.set_scale("default", 1 / 3)
    view = LoraModel(model).view("adapter", list(model.named_parameters()))
    computed = {c.name: c for c in view.computed}
    b = computed["model.layers.0.self_attn.q_proj.lora_B.weight"]
    wanted = q.lora_B["default"].weight.float() * q.scaling["default"]
    assert b.stand_in.dtype == torch.bfloat16
    assert torch.equal(b.compute(torch.bfloat16), wanted)  # rounded by the copy, once
    a = computed["model.layers.0.self_attn.q_proj.lora_A.weight"].compute(torch.bfloat16)
    assert torch.equal(a, q.lora_A["default"].weight.float())


def test_only_the_acting_adapter_travels() -> None:
    model = build(of("two adapters", CAUSAL), torch.float64)
    model.base_model.set_adapter("b")
    adapter = check(model)
    assert {n.split(".lora_")[0].split(".")[-1] for n in adapter} == {"q_proj"}


def test_a_fused_checkpoint_tensor_has_no_pair() -> None:
    model = build(of("experts, both", ROWS))  # a toy: its checkpoint holds what the module holds, fused
    lora = LoraModel(model)
    with pytest.raises(UnsupportedLora, match="no block of rows") as error:
        lora.choose("adapter", [LoraLimits(64, 2)])
    assert {"experts", "stacked"} <= set(error.value.names)
    assert error.value.remedy == 'use mode="merged" or mode="base"'
    assert lora.choose("auto", [LoraLimits(64, 2)]).mode == "merged"


def canonical(shape: tuple[int, ...], source: Region) -> CanonicalTensor:
    whole = dense(shape)
    return CanonicalTensor("x.weight", torch.float32, shape, (Piece("live", source, whole),))


@pytest.mark.parametrize(
    ("shape", "source", "live", "wanted"),
    [
        ((6, 4), dense((6, 4)), (6, 4), ExpertSlice(0, slice(0, 6, 1), slice(0, 4, 1), False)),
        ((6, 4), Region(0, (24,), (1,)), (6, 4), ExpertSlice(0, slice(0, 6, 1), slice(0, 4, 1), False)),
        ((3, 4), Region(36, (3, 4), (4, 1)), (2, 6, 4), ExpertSlice(1, slice(3, 6, 1), slice(0, 4, 1), False)),
        ((4, 6), Region(24, (4, 6), (1, 4)), (2, 6, 4), ExpertSlice(1, slice(0, 6, 1), slice(0, 4, 1), True)),
        ((2, 6), Region(26, (2, 6), (1, 4)), (2, 6, 4), ExpertSlice(1, slice(0, 6, 1), slice(2, 4, 1), True)),
        ((3, 4), Region(4, (3, 4), (8, 1)), (6, 4), ExpertSlice(0, slice(1, 6, 2), slice(0, 4, 1), False)),
        ((1, 4), Region(8, (1, 4), (4, 1)), (6, 4), ExpertSlice(0, slice(2, 3, 1), slice(0, 4, 1), False)),
        ((6, 1), Region(2, (6, 1), (4, 1)), (6, 4), ExpertSlice(0, slice(0, 6, 1), slice(2, 3, 1), False)),
    ],
)
def test_where_a_checkpoint_tensor_lies_in_a_live_weight(
    shape: tuple[int, ...], source: Region, live: tuple[int, ...], wanted: ExpertSlice
) -> None:
    grid = find_slice(canonical(shape, source), "live", live)
    assert grid == wanted
    weight = torch.arange(torch.Size(live).numel()).reshape(live)
    matrix = (weight[grid.expert] if len(live) == 3 else weight)[grid.rows, grid.columns]
    taken = weight.reshape(-1).as_strided(source.shape, source.strides, source.offset).reshape(shape)
    assert torch.equal(matrix.T if grid.transposed else matrix, taken)


@pytest.mark.parametrize(
    ("shape", "source", "live"),
    [
        ((2, 6, 4), dense((2, 6, 4)), (2, 6, 4)),
        ((4, 6), Region(0, (24,), (1,)), (6, 4)),
        ((2, 12), Region(0, (2, 12), (12, 1)), (4, 6)),
        ((8, 4), Region(20, (8, 4), (4, 1)), (2, 6, 4)),
    ],
)
def test_what_is_no_block_of_one_matrix(shape: tuple[int, ...], source: Region, live: tuple[int, ...]) -> None:
    assert find_slice(canonical(shape, source), "live", live) is None
