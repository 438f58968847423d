"""Block-scaled fp8 through real pushes: bit for bit, and a weight never without its scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from engine_side.embedded.config import LAYOUTS, EngineConfig
from engine_side.embedded.engine import Engine
from tests.engine_side import embedded_models as tiny
from tests.push.rig import refused

BLOCK = (2, 8)
LAYER = "model.layers.1.self_attn"
Q, K = f"{LAYER}.q_proj.weight", f"{LAYER}.k_proj.weight"
SCALE = "_scale_inv"
UP, GATE = (f"model.layers.1.mlp.experts.2.{part}_proj.weight" for part in ("up", "gate"))
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoints:
    """Two block-scaled checkpoints of a family; `model` computes what the second stands for."""

    folder: Path
    first: Tensors
    second: Tensors
    model: Any


class Pair:
    """An engine on the first checkpoint, and the second to send."""

    def __init__(self, saved: Checkpoints, **config: Any) -> None:
        self.first, self.second, self.model = saved.first, saved.second, saved.model
        self.engine = Engine(EngineConfig(str(saved.folder), threads=1, **config))
        self.b = bridge.attach(self.engine)

    def close(self) -> None:
        self.b.close()
        self.engine.close()

    def push(self, tensors: Tensors, **options: Any) -> bridge.Receipt:
        receipt: bridge.Receipt = self.b.push(tensors.items(), verify="weights", **options)
        return receipt

    def serves(self, model: Any) -> float:
        return tiny.mean_difference(
            self.engine.prompt_logprobs(tiny.prompts()), tiny.reference_logprobs(model, tiny.prompts())
        )

    def live(self, name: str) -> torch.Tensor:
        return self.engine.runner.model.get_parameter(name).detach().view(torch.uint8)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoints]:
    @cache
    def save(family: str) -> Checkpoints:
        folder = tmp_path_factory.mktemp(family)
        first = tiny.save_fp8(folder / "first", tiny.make_model(family), BLOCK)
        model = tiny.make_model(family, seed=99)
        return Checkpoints(folder / "first", first, tiny.save_fp8(folder / "second", model, BLOCK), model)

    return save


@pytest.fixture
def pairs(checkpoints: Callable[[str], Checkpoints]) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(family: str = "qwen2", **config: Any) -> Pair:
        made.append(Pair(checkpoints(family), **config))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.mark.parametrize(
    ("family", "layout", "wrapped"),
    [
        *(("qwen2", layout, wrapped) for layout in LAYOUTS for wrapped in (False, True)),
        ("moe", "canonical", False),
        ("moe", "packed", True),
        *(("deepseek-v3", layout, layout in ("packed", "shuffled")) for layout in LAYOUTS),
    ],
)
def test_a_dict_in_checkpoint_names_is_what_the_engine_then_serves(
    pairs: Callable[..., Pair], family: str, layout: str, wrapped: bool
) -> None:
    pair = pairs(family, layout=layout, wrap_linears=wrapped)
    assert pair.serves(pair.model) > 0.1
    receipt = pair.push(pair.second)
    assert receipt.verified is True, receipt.engines
    assert receipt.wire_nbytes == sum(t.numel() * t.element_size() for t in pair.second.values()), "fp8 travels as fp8"
    assert not receipt.engines[0].ranks[0].rebound
    assert pair.serves(pair.model) < 1e-5
    if layout == "canonical" and not wrapped and family != "deepseek-v3":
        assert torch.equal(pair.live(f"{LAYER}.o_proj.weight"), pair.second[f"{LAYER}.o_proj.weight"].view(torch.uint8))


def test_a_plain_module_is_a_trainer_too(pairs: Callable[..., Pair]) -> None:
    pair = pairs()
    trainer = nest(pair.second)
    assert {name for name, _ in trainer.named_parameters()} == pair.second.keys()
    receipt = pair.b.push(trainer.named_parameters(), verify="weights")
    assert receipt.verified is True
    assert pair.serves(pair.model) < 1e-5
    pair.b.push(nest(pair.first).named_parameters(), verify="weights")
    assert pair.serves(pair.model) > 0.1
    pair.b.rollback()
    assert pair.serves(pair.model) < 1e-5


def nest(tensors: Tensors) -> nn.Module:
    """A module tree of nothing but parameters."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        here = root
        for hop in path:
            if hop not in dict(here.named_children()):
                here.add_module(hop, nn.Module())
            here = here.get_submodule(hop)
        here.register_parameter(last, nn.Parameter(tensor.clone(), requires_grad=False))
    return root


WRAPPED = pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])


@WRAPPED
@pytest.mark.parametrize("layout", ["canonical", "packed"])
@pytest.mark.parametrize(
    ("names", "alone", "missing"),
    [
        ((Q,), Q, Q + SCALE),
        ((Q + SCALE,), Q + SCALE, Q),
        ((Q, K + SCALE), Q, Q + SCALE),  # one of each in the same fused parameters, but not of the same module
        ((f"{LAYER}.o_proj.weight",), f"{LAYER}.o_proj.weight", f"{LAYER}.o_proj.weight{SCALE}"),
    ],
    ids=["weight", "scale", "crossed", "row"],
)
def test_a_subset_that_tears_a_quantised_module_is_refused(
    pairs: Callable[..., Pair], names: tuple[str, ...], alone: str, missing: str, layout: str, wrapped: bool
) -> None:
    pair = pairs(layout=layout, wrap_linears=wrapped)
    before = pair.engine.prompt_logprobs(tiny.prompts())
    module = f"{LAYER}.o_proj" if "o_proj" in alone else f"{LAYER}.qkv_proj"
    with refused(bridge.MissingTensor, 5, alone, missing, module) as caught:
        pair.push({name: pair.second[name] for name in names}, partial=True)
    assert {alone, missing} <= set(caught.value.names)
    assert pair.engine.prompt_logprobs(tiny.prompts()) == before
    assert pair.b.status().engines[0].serving == 0
    pair.push(pair.second)
    assert pair.serves(pair.model) < 1e-5
    # the plan of the whole model is there now, and would carry the subset
    with refused(bridge.MissingTensor, 5, alone, missing, module):
        pair.push({name: pair.first[name] for name in names}, partial=True)
    assert pair.serves(pair.model) < 1e-5
    assert pair.b.status().engines[0].serving == 1


@WRAPPED
def test_a_full_push_without_a_scale_names_it_and_its_weight(pairs: Callable[..., Pair], wrapped: bool) -> None:
    pair = pairs(wrap_linears=wrapped)
    before = pair.engine.prompt_logprobs(tiny.prompts())
    for missing, alone in ((Q + SCALE, Q), (Q, Q + SCALE)):
        with refused(bridge.MissingTensor, 5, alone, missing, f"{LAYER}.qkv_proj"):
            pair.push({name: t for name, t in pair.second.items() if name != missing})
    assert pair.engine.prompt_logprobs(tiny.prompts()) == before


@pytest.mark.parametrize("levels", [1, 3])
def test_senders_that_write_base_layer_are_held_to_the_same(pairs: Callable[..., Pair], levels: int) -> None:
    pair = pairs(wrap_linears=True, wrap_levels=levels)
    named = {name.replace("_proj.", "_proj.base_layer."): t for name, t in pair.second.items()}
    assert pair.push(named).verified is True
    assert pair.serves(pair.model) < 1e-5
    alone = f"{LAYER}.q_proj.base_layer.weight"
    with refused(bridge.MissingTensor, 5, Q, Q + SCALE):
        pair.push({alone: named[alone]}, partial=True)


@WRAPPED
def test_what_is_whole_may_come_alone(pairs: Callable[..., Pair], wrapped: bool) -> None:
    """One part of a fused layer with its scales, and a bias, which is no part of the quantised matrix."""
    pair = pairs(wrap_linears=wrapped)
    bias = f"{LAYER}.k_proj.bias"
    sent = {name: pair.second[name] for name in (Q, Q + SCALE, bias)}
    receipt = pair.push(sent, partial=True)
    assert receipt.verified is True
    want = tiny.make_model("qwen2")
    want.load_state_dict(values_of({**pair.first, **sent}), strict=False)
    assert pair.serves(want) < 1e-5
    pair.push({bias: pair.first[bias]}, partial=True)


def values_of(tensors: Tensors) -> Tensors:
    """What a block-scaled checkpoint stands for."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        scales = tensors.get(name + SCALE)
        if scales is not None:
            rows, columns = tensor.shape
            spread = scales.repeat_interleave(BLOCK[0], 0)[:rows].repeat_interleave(BLOCK[1], 1)[:, :columns]
            out[name] = tensor.float() * spread
        elif not name.endswith(SCALE):
            out[name] = tensor
    return out


@pytest.mark.parametrize(
    ("names", "alone", "missing"),
    [((GATE,), GATE, GATE + SCALE), ((GATE, UP + SCALE), GATE, GATE + SCALE), ((UP + SCALE,), UP + SCALE, UP)],
    ids=["weight", "crossed", "scale"],
)
def test_one_experts_matrix_needs_its_own_scales(
    pairs: Callable[..., Pair], names: tuple[str, ...], alone: str, missing: str
) -> None:
    pair = pairs("moe")
    with refused(bridge.MissingTensor, 5, alone, missing, "model.layers.1.mlp.experts"):
        pair.push({name: pair.second[name] for name in names}, partial=True)
    receipt = pair.push({name: pair.second[name] for name in (GATE, GATE + SCALE)}, partial=True)
    assert receipt.verified is True


def test_values_that_were_not_quantised_are_refused(pairs: Callable[..., Pair]) -> None:
    """Cast into fp8 without a look at the scales they would be another matrix."""
    pair = pairs()
    before = pair.engine.prompt_logprobs(tiny.prompts())
    with refused(bridge.DtypeMismatch, 5, Q, "float8_e4m3fn", "float32"):
        pair.push({**pair.second, Q: pair.second[Q].float()})
    assert pair.engine.prompt_logprobs(tiny.prompts()) == before


def test_kv_b_proj_with_its_scales_brings_what_is_derived_from_it(pairs: Callable[..., Pair]) -> None:
    pair = pairs("deepseek-v3", layout="packed")
    name = f"{LAYER}.kv_b_proj.weight"
    sent = {n: pair.second[n] for n in (name, name + SCALE)}
    pair.push(sent, partial=True)
    want = tiny.make_model("deepseek-v3")
    want.load_state_dict(values_of(pair.first), strict=False)
    assert pair.serves(pair.model) > 0.1
    expected = Engine(EngineConfig(pair.engine.config.path, threads=1))
    try:
        expected.runner.model.load_weights(sent.items())
        for module in expected.runner.model.modules():
            expected.runner.post_load(module)
        got = pair.engine.prompt_logprobs(tiny.prompts())
        assert tiny.mean_difference(got, expected.prompt_logprobs(tiny.prompts())) < 1e-5
    finally:
        expected.close()


class Packed(nn.Module):
    """GPTQ-like: four values in an int32, per-group scales, packed zero points."""

    def __init__(self) -> None:
        super().__init__()
        self.qweight = nn.Parameter(torch.randint(0, 99, (4, 6), dtype=torch.int32), requires_grad=False)
        self.qzeros = nn.Parameter(torch.randint(0, 99, (2, 3), dtype=torch.int32), requires_grad=False)
        self.register_buffer("scales", torch.rand(2, 6))
        self.bias = nn.Parameter(torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.qweight.repeat_interleave(4, 0).float() - self.qzeros.repeat_interleave(2, 1).sum(0)
        return x @ (weight * self.scales.repeat_interleave(8, 0)) + self.bias


class Net(nn.Module):
    """One packed layer, and one with an integer counter and integer indices that are no storage of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = Packed()
        self.norm = nn.BatchNorm1d(6)
        self.norm.register_buffer("position_ids", torch.arange(6).unsqueeze(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.packed(x))
        return out


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales"])
def test_zero_points_and_packed_integers_of_any_module_belong_together(name: str) -> None:
    engine, trainer = Net().eval(), Net().eval()
    with bridge.attach(engine) as b:
        sent = {f"packed.{name}": trainer.state_dict()[f"packed.{name}"]}
        others = {f"packed.{other}" for other in ("qweight", "qzeros", "scales")} - sent.keys()
        with refused(bridge.MissingTensor, 5, *sent, *others, "-> packed"):
            b.push(sent.items(), partial=True, verify="weights")
        together = {n: t for n, t in trainer.state_dict().items() if n in sent.keys() | others}
        assert b.push(together.items(), partial=True, verify="weights").verified is True
        assert torch.equal(engine.packed.qweight, trainer.packed.qweight)


def test_counters_and_indices_make_no_module_quantised() -> None:
    engine, trainer = Net().eval(), Net().eval()
    with torch.no_grad():
        trainer.norm.weight.add_(1)
    with bridge.attach(engine) as b:
        b.push([("norm.weight", trainer.norm.weight)], partial=True, verify="weights")
        b.push([("packed.bias", trainer.packed.bias)], partial=True, verify="weights")
    assert torch.equal(engine.norm.weight, trainer.norm.weight)
    assert torch.equal(engine.packed.bias, trainer.packed.bias)
