"""LoRA wrappers of the embedded engine, each against W + B A computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import ConfigError, ProtocolError
from engine_side.embedded.config import LAYOUTS
from engine_side.embedded.layers import (
    ColumnParallelLinear,
    LayerContext,
    LinearBase,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    ReplicatedLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from engine_side.embedded.layouts import POST_LOAD_LAYOUTS
from engine_side.embedded.lora.layers import BaseLayerWithLoRA, wrap, wrapper_of
from engine_side.embedded.lora.slots import ONLY, LoraContext, slot_dtype
from engine_side.embedded.moe import FusedMoE, MoEConfig, activation
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.wrappers import WrappedLayer, unwrap, wrap_linears
from tests.engine_side.lora_ranks import ThreadRank, on_ranks

F64 = torch.float64
SLOTS, MAX_RANK = 3, 4
ROWS = torch.tensor([0, -1, 2, 0, 2, -1, 2])
"""Slot of each token: two LoRAs and the base model in one batch."""
RANKS = {0: 4, 2: 2}


def context_of(layout: str = "canonical", tp: Parallel | None = None, dtype: torch.dtype = F64) -> LayerContext:
    return LayerContext(dtype, tp or Parallel(), POST_LOAD_LAYOUTS[layout])


class Latents(MergedColumnParallelLinear):
    """A merged layer that every rank holds whole, with a forward of its own."""

    def __init__(self, inputs: int, outputs: Any, bias: bool, context: LayerContext) -> None:
        super().__init__(inputs, outputs, bias, replace(context, tp=Parallel()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.local(row) for row in x.split(2)]) * 1.5


@dataclass(frozen=True)
class Case:
    """A layer, its parts as (outputs, inputs) in the checkpoint, and what its own forward scales the result by."""

    make: Callable[[LayerContext], Any]
    parts: dict[Any, tuple[int, int]]
    bias: bool = True
    scale: float = 1.0


CASES = {
    "replicated": Case(lambda ctx: ReplicatedLinear(10, 6, True, ctx), {None: (6, 10)}),
    "column": Case(lambda ctx: ColumnParallelLinear(10, 12, True, ctx), {None: (12, 10)}),
    "merged": Case(lambda ctx: MergedColumnParallelLinear(10, (8, 4), True, ctx), {0: (8, 10), 1: (4, 10)}),
    "latents": Case(lambda ctx: Latents(10, (6, 5), True, ctx), {0: (6, 10), 1: (5, 10)}, scale=1.5),
    "qkv": Case(lambda ctx: QKVParallelLinear(10, 3, 4, 1, True, ctx), {"q": (12, 10), "k": (3, 10), "v": (3, 10)}),
    "row": Case(lambda ctx: RowParallelLinear(12, 6, True, ctx), {None: (6, 12)}),
    "head": Case(lambda ctx: ParallelLMHead(70, 10, ctx), {None: (70, 10)}, bias=False),
    "embedding": Case(lambda ctx: VocabParallelEmbedding(70, 10, ctx), {None: (10, 70)}, bias=False),
}


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Values:
    """Whole weights [outputs, inputs], biases and LoRAs of every part."""

    weight: dict[Any, torch.Tensor]
    bias: dict[Any, torch.Tensor]
    pairs: dict[int, dict[Any, tuple[torch.Tensor, torch.Tensor]]]

    def expected(self, key: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        out = x @ self.weight[key].t() + self.bias[key]
        out = out * scale
        for row, slot in enumerate(ROWS.tolist()):
            if slot in self.pairs and key in self.pairs[slot]:
                a, b = self.pairs[slot][key]
                out[row] += b @ (a @ x[row])
        return out


def values_of(case: Case, skip: Any = ()) -> Values:
    weight = {key: noise(*shape, seed=k) for k, (key, shape) in enumerate(case.parts.items())}
    bias = {key: noise(shape[0], seed=10 + k) * case.bias for k, (key, shape) in enumerate(case.parts.items())}
    pairs = {
        slot: {
            key: (noise(rank, shape[1], seed=20 + slot), noise(shape[0], rank, seed=30 + slot))
            for key, shape in case.parts.items()
            if (slot, key) not in skip
        }
        for slot, rank in RANKS.items()
    }
    return Values(weight, bias, pairs)


def loaded(case: Case, values: Values, tp: Parallel, layout: str) -> Any:
    """The layer after loading and post-load."""
    layer = case.make(context_of(layout, tp))
    for key, weight in values.weight.items():
        rows = weight.t() if isinstance(layer, VocabParallelEmbedding) and case.parts[None][1] == 70 else weight
        layer.weight_loader(layer.weight, rows, key)
        if case.bias:
            layer.weight_loader(layer.bias, values.bias[key], key)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def wrapped(layer: nn.Module, values: Values, levels: int = 0) -> tuple[BaseLayerWithLoRA, LoraContext]:
    context = LoraContext()
    for _ in range(levels):
        layer = WrappedLayer(layer)
    made = wrap(layer, context, SLOTS, MAX_RANK)
    for slot, parts in values.pairs.items():
        for key, (a, b) in parts.items():
            made.parts[key, None].write(slot, a, b)
    return made, context


def inputs_of(case: Case, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer is called with, whole, and the same as rows for the reference."""
    inputs = next(iter(case.parts.values()))[1]
    if name == "embedding":
        ids = torch.tensor([0, 69, 5, 64, 3, 63, 66])
        return ids, torch.eye(inputs, dtype=F64)[ids]
    x = noise(len(ROWS), inputs, seed=5)
    return x, x


def whole_outputs(layers: list[BaseLayerWithLoRA], outs: list[torch.Tensor], key: Any) -> torch.Tensor:
    """Each rank's outputs of one part, put where the rank says that they belong."""
    out = torch.full((len(ROWS), layers[0].parts[(key, None)].outputs.whole), torch.nan, dtype=F64)
    for layer, mine in zip(layers, outs):
        cut = layer.parts[(key, None)].outputs
        out[:, cut.start : cut.start + cut.size] = mine.narrow(1, cut.offset, cut.size)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_each_token_gets_its_own_lora(name: str, size: int, layout: str) -> None:
    case = CASES[name]
    last = list(case.parts)[-1]
    values = values_of(case, skip={(0, last)} if len(case.parts) > 1 else ())
    x, rows = inputs_of(case, name)

    def work(tp: Parallel) -> tuple[BaseLayerWithLoRA, torch.Tensor]:
        layer, context = wrapped(loaded(case, values, tp, layout), values, levels=tp.rank + 1)
        mine = x.chunk(tp.size, 1)[tp.rank] if name == "row" else x
        with context.select(ROWS):
            return layer, layer(mine)

    layers, outs = zip(*on_ranks(size, work))
    if name in ("row", "embedding", "head"):
        whole = {None: outs[0]}
        assert all(torch.equal(out, outs[0]) for out in outs)
    else:
        whole = {key: whole_outputs(list(layers), list(outs), key) for key in case.parts}
    limit = 2e-6 if layout == "packed" and case.bias else 1e-12  # a packed layer adds its bias in float32
    for key, got in whole.items():
        torch.testing.assert_close(got, values.expected(key, rows, case.scale), rtol=0, atol=limit)


@pytest.mark.parametrize("name", CASES)
def test_without_lora_the_bits_are_the_bases(name: str) -> None:
    case = CASES[name]
    values = values_of(case)
    x, _ = inputs_of(case, name)
    base = loaded(case, values, Parallel(), "canonical")
    plain = base(x)
    layer, context = wrapped(base, values, levels=2)
    assert torch.equal(layer(x), plain), "nothing selected"
    with context.select(torch.full((len(ROWS),), -1)):
        assert torch.equal(layer(x), plain)
    assert not layer.reached
    with context.select(ROWS):
        got = layer(x)
    assert torch.equal(got[ROWS == -1], plain[ROWS == -1]), "tokens of the base model keep their bits"
    assert (got != plain)[ROWS >= 0].any(dim=1).all()
    assert layer.reached


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_wrapper_shows_what_its_layer_is(name: str, levels: int) -> None:
    case = CASES[name]
    base = loaded(case, values_of(case), Parallel(), "canonical")
    layer, _ = wrapped(base, values_of(case), levels)
    assert unwrap(layer) is layer.core is base
    assert layer.weight is base.weight
    assert layer.bias is getattr(base, "bias", None)
    names = dict(layer.named_parameters())
    assert names["weight"] is base.weight
    assert ("bias" in names) == case.bias
    assert set(names) <= {"weight", "bias"}, "slots are no parameters"
    assert not list(layer.buffers())
    assert layer.quant_method is base.quant_method
    assert layer.params_dtype is F64
    if isinstance(base, VocabParallelEmbedding):
        assert layer.num_embeddings == 70
        assert layer.num_embeddings_padded == 128
    with pytest.raises(AttributeError):
        _ = layer.no_such_attribute


def test_bias_exists_also_where_it_is_none() -> None:
    for base in (
        ReplicatedLinear(4, 4, False, context_of()),
        ParallelLMHead(7, 4, context_of()),
    ):
        layer = wrap(base, LoraContext(), 1, 1)
        assert layer.bias is None
        assert "bias" in layer._parameters
        assert "bias" not in dict(layer.named_parameters())


def test_every_parameter_of_the_layer_is_mirrored_and_a_new_one_on_request() -> None:
    base = ReplicatedLinear(4, 4, True, context_of())
    base.register_parameter("weight_scale_inv", nn.Parameter(torch.ones(1, 1), requires_grad=False))
    layer = wrap(WrappedLayer(base), LoraContext(), 1, 1)
    assert layer.weight_scale_inv is base.weight_scale_inv
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias", "weight_scale_inv"]
    base.weight = nn.Parameter(torch.zeros(4, 4, dtype=F64), requires_grad=False)
    assert layer.weight is not base.weight, "stale, as in the engines this stands for"
    layer.mirror()
    assert layer.weight is base.weight


class OwnRow(RowParallelLinear):
    """Does its own thing around the sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(self.local(x * 1.0)) * 2.0


@pytest.mark.parametrize("size", [1, 2])
def test_a_row_layers_own_forward_is_kept(size: int) -> None:
    case = Case(lambda ctx: OwnRow(12, 6, True, ctx), {None: (6, 12)})
    values = values_of(case)
    x, _ = inputs_of(case, "row")

    def work(tp: Parallel) -> torch.Tensor:
        layer, context = wrapped(loaded(case, values, tp, "canonical"), values, levels=1)
        mine = x.chunk(tp.size, 1)[tp.rank]
        plain = layer(mine)
        with context.select(ROWS):
            got: torch.Tensor = layer(mine)
        assert torch.equal(got[ROWS == -1], plain[ROWS == -1])
        return got

    for got in on_ranks(size, work):
        torch.testing.assert_close(got, values.expected(None, x, 2.0), rtol=0, atol=1e-12)


def test_a_row_layers_loras_are_inside_its_one_sum() -> None:
    case = CASES["row"]
    values = values_of(case)
    x, _ = inputs_of(case, "row")

    def work(tp: Parallel) -> int:
        layer, context = wrapped(loaded(case, values, tp, "canonical"), values)
        with context.select(ROWS):
            layer(x.chunk(2, 1)[tp.rank])
        assert isinstance(tp, ThreadRank)
        return tp.calls

    assert on_ranks(2, work) == [1, 1]


def test_an_effect_is_rounded_once() -> None:
    values = values_of(CASES["column"])
    base = ColumnParallelLinear(10, 12, True, context_of(dtype=torch.bfloat16))
    base.weight_loader(base.weight, values.weight[None])
    base.weight_loader(base.bias, values.bias[None])
    layer, context = wrapped(base, values)
    assert layer.parts[ONLY].a.dtype is torch.bfloat16
    x = noise(len(ROWS), 10, seed=5).bfloat16()
    with context.select(ROWS):
        got = layer(x)
    expected = base(x).float()
    for row, slot in enumerate(ROWS.tolist()):
        if slot >= 0:
            a, b = (t.bfloat16().float() for t in values.pairs[slot][None])
            expected[row] += b @ (a @ x[row].float())
    wrong = (got != expected.bfloat16()).float().mean()
    assert wrong <= 0.02, "only the order of an fp32 sum may differ"


@pytest.mark.parametrize(
    ("dtype", "held"),
    [(torch.bfloat16, torch.bfloat16), (F64, F64), (torch.float8_e4m3fn, torch.float32), (torch.int8, torch.float32)],
)
def test_slots_have_a_dtype_that_can_be_computed_in(dtype: torch.dtype, held: torch.dtype) -> None:
    assert slot_dtype(dtype) is held


def test_slots_are_padded_with_zeros_and_cleared() -> None:
    case = CASES["qkv"]
    values = values_of(case)
    layer, _ = wrapped(loaded(case, values, Parallel(), "canonical"), values)
    part = layer.parts[("k", None)]
    assert part.a.shape == (SLOTS, MAX_RANK, 10)
    assert part.b.shape == (SLOTS, 3, MAX_RANK)
    a, b = values.pairs[2]["k"]
    assert torch.equal(part.a[2, :2], a)
    assert torch.equal(part.b[2, :, :2], b)
    assert not part.a[2, 2:].any()
    assert not part.b[2, :, 2:].any()
    assert not part.a[1].any(), "a slot that nobody wrote"
    part.write(2, a[:1], b[:, :1])
    assert not part.a[2, 1:].any(), "what a larger LoRA left"
    assert not part.b[2, :, 1:].any()
    kept = part.a[0].clone()
    part.clear(2)
    assert not part.a[2].any()
    assert not part.b[2].any()
    assert torch.equal(part.a[0], kept)


# ---- experts ---------------------------------------------------------------------------------------------------------

EXPERTS, HIDDEN, INNER = 4, 10, 6


def experts_case(layout: str, tp: Parallel, cls: type[FusedMoE] = FusedMoE) -> FusedMoE:
    config = MoEConfig(experts=EXPERTS, top_k=2, intermediate_size=INNER, renormalize=True)
    layer = cls(config, HIDDEN, activation("silu"), context_of(layout, tp))
    for (shard, expert), weight in expert_weights().items():
        layer.weight_loader(layer.w2_weight if shard == "w2" else layer.w13_weight, weight, shard, expert)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def expert_shapes() -> dict[tuple[str, int], tuple[int, int]]:
    sizes = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}
    return {(shard, expert): shape for shard, shape in sizes.items() for expert in range(EXPERTS)}


def expert_weights() -> dict[tuple[str, int], torch.Tensor]:
    return {key: noise(*shape, seed=k) * 0.3 for k, (key, shape) in enumerate(expert_shapes().items())}


def expert_pairs(slot: int) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
    """Slot 2 leaves expert 1 and all gates alone."""
    rank = RANKS[slot]
    return {
        key: (noise(rank, shape[1], seed=40 + k) * 0.3, noise(shape[0], rank, seed=60 + k + slot) * 0.3)
        for k, (key, shape) in enumerate(expert_shapes().items())
        if slot == 0 or (key[1] != 1 and key[0] != "w1")
    }


def expected_experts(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    for row, slot in enumerate(ROWS.tolist()):
        pairs = expert_pairs(slot) if slot >= 0 else {}
        for k, expert in enumerate(ids[row].tolist()):
            w = dict(expert_weights())
            for key, (a, b) in pairs.items():
                w[key] = w[key] + b @ a
            inner = nn.functional.silu(w["w1", expert] @ x[row]) * (w["w3", expert] @ x[row])
            out[row] += weights[row, k] * (w["w2", expert] @ inner)
    return out


class OwnExperts(FusedMoE):
    """A subclass with its own forward."""

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(self.local(x, weights * 2.0, ids))


def routing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in ROWS])
    return noise(len(ROWS), HIDDEN, seed=7), noise(len(ROWS), 2, seed=9).abs(), ids


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("cls", [FusedMoE, OwnExperts])
def test_experts_add_their_loras_inside(cls: type[FusedMoE], size: int, layout: str) -> None:
    x, weights, ids = routing()

    def work(tp: Parallel) -> torch.Tensor:
        base = experts_case(layout, tp, cls)
        plain = base(x, weights, ids)
        before = dict(base.__dict__)
        context = LoraContext()
        layer = wrap(WrappedLayer(base), context, SLOTS, MAX_RANK)
        for slot in RANKS:
            for key, (a, b) in expert_pairs(slot).items():
                layer.parts[key].write(slot, a, b)
        assert torch.equal(layer(x, weights, ids), plain)
        with context.select(ROWS):
            got: torch.Tensor = layer(x, weights, ids)
        assert torch.equal(got[ROWS == -1], plain[ROWS == -1])
        assert base.__dict__.keys() == before.keys(), "nothing stays on the layer itself"
        assert dict(layer.named_parameters()).keys() == {"w13_weight", "w2_weight"}
        assert layer.num_experts == EXPERTS
        return got

    scale = 2.0 if cls is OwnExperts else 1.0
    for got in on_ranks(size, work):
        torch.testing.assert_close(got, expected_experts(x, weights * scale, ids), rtol=0, atol=1e-12)


# ---- context and table -----------------------------------------------------------------------------------------------


def test_another_number_of_rows_than_selected_is_refused() -> None:
    case = CASES["column"]
    layer, context = wrapped(loaded(case, values_of(case), Parallel(), "canonical"), values_of(case))
    x = noise(3, 10, seed=1)
    with context.select(ROWS), pytest.raises(ProtocolError, match="other rows"):
        layer(x)
    with context.select(torch.full((9,), -1)):
        layer(x)  # nothing would be added
    with context.select(ROWS), context.narrow(torch.tensor([0, 2, 6])):
        got = layer(x)
    for row, slot in enumerate((0, 2, 2)):
        a, b = values_of(case).pairs[slot][None]
        expected = unwrap(layer)(x)[row] + b @ (a @ x[row])
        torch.testing.assert_close(got[row], expected, rtol=0, atol=1e-12)


def test_a_choice_ends_with_its_block_also_after_an_error() -> None:
    context = LoraContext()
    with context.select(torch.tensor([1])):
        with pytest.raises(ValueError, match="x"), context.select(torch.tensor([0, 0])):
            raise ValueError("x")
        assert [g.slot for g in context.groups(1)] == [1]
        with context.narrow(slice(0, 0)):
            assert context.groups(0) == ()
    assert context.groups(5) == ()
    with context.narrow(torch.tensor([3])):
        assert context.groups(1) == ()


def test_one_lora_for_all_rows_needs_no_index() -> None:
    context = LoraContext()
    with context.select(torch.tensor([1, 1])):
        (group,) = context.groups(2)
    assert group.rows == slice(None)
    with context.select(torch.tensor([1, -1])):
        (group,) = context.groups(2)
    assert isinstance(group.rows, torch.Tensor)
    assert group.rows.tolist() == [0]


def test_subclasses_are_found_and_others_are_not() -> None:
    context = context_of()
    assert wrapper_of(Latents(4, (2, 2), False, context)) is wrapper_of(
        MergedColumnParallelLinear(4, (2, 2), False, context)
    )
    head = ParallelLMHead(7, 4, context)
    assert wrapper_of(head) is not wrapper_of(VocabParallelEmbedding(7, 4, context))
    norm = RMSNorm(4, 1e-6, F64)
    assert wrapper_of(norm) is None
    with pytest.raises(ConfigError, match="RMSNorm"):
        wrap(norm, LoraContext(), 1, 1)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_plain_wrappers_nest(levels: int) -> None:
    model = nn.Sequential(ReplicatedLinear(4, 4, True, context_of()), nn.Identity())
    base = model[0]
    wrap_linears(model, levels)
    depth, module = 0, model[0]
    while module is not base:
        assert isinstance(module, WrappedLayer)
        assert module.weight is base.weight
        module, depth = module.base_layer, depth + 1
    assert depth == levels
    assert isinstance(unwrap(model[0]), LinearBase)


def test_a_tied_head_and_its_embedding_have_loras_of_their_own() -> None:
    built = context_of("packed")
    embedding, head = VocabParallelEmbedding(70, 10, built), ParallelLMHead(70, 10, built)
    weight = noise(70, 10, seed=1)
    embedding.weight_loader(embedding.weight, weight)
    head.tie_weights(embedding)
    head.quant_method.process_weights_after_loading(head)
    context = LoraContext()
    rows, out = wrap(embedding, context, 1, 2), wrap(head, context, 1, 2)
    assert rows.weight is out.weight
    a, b = noise(2, 10, seed=2), noise(70, 2, seed=3)
    out.parts[ONLY].write(0, a, b)
    x = noise(2, 10, seed=4)
    with context.select(torch.tensor([0, -1])):
        assert torch.equal(rows(torch.tensor([5, 6])), weight[[5, 6]]), "the embedding has none"
        got = out(x)
    torch.testing.assert_close(got[0], (weight + b @ a) @ x[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1], weight @ x[1], rtol=0, atol=1e-12)
