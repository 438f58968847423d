"""LoRA that cannot be pushed: the exact error, its names and its way out; engine and trainer are left as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge.errors import BridgeError, ConfigError, MissingTensor, ShapeMismatch, UnexpectedTensor, UnsupportedLora
from bridge.model.lora_format import LoraSpec, names_of
from bridge.model.manifest import TensorInfo
from tests.conftest import tiny_qwen2
from tests.push.lora_rig import LoraRig, everything, stir, wrap
from tests.push.rig import refused
from tests.trainer_side.lora.peft_rows import Toy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

Make = Callable[..., LoraRig]
MODES = ("merged", "base", "adapter")
Q = "model.layers.0.self_attn.q_proj"


@contextmanager
def nothing_changed(rig: LoraRig) -> Iterator[None]:
    """Inside, something is refused: engine, version and trainer are what they were, and a base push goes through."""
    before, names, model = rig.answers(), rig.engine.adapters, everything(rig.model)
    bits = {n: p.detach().clone() for n, p in rig.engine.runner.model.named_parameters()}
    info = rig.b.status().engines[0]
    yield
    now = rig.b.status()
    assert (now.engines[0].state, now.engines[0].serving, now.busy) == ("SERVING", info.serving, None)
    assert (rig.answers(), rig.engine.adapters) == (before, names)
    assert all(torch.equal(p, bits[n]) for n, p in rig.engine.runner.model.named_parameters())
    assert not rig.engine.paused
    assert everything(rig.model) == model


def push_refused(rig: LoraRig, kind: type[BridgeError], mode: str, *words: str) -> BridgeError:
    with nothing_changed(rig), refused(kind, 5, *words) as caught:
        rig.push(mode=mode)
    error: BridgeError = caught.value
    assert error.names
    assert error.remedy
    return error


def base_still_goes(rig: LoraRig) -> None:
    """The way out that every message offers."""
    assert rig.push(mode="base", verify="weights").verified is True
    with rig.model.disable_adapter():
        assert rig.serves(rig.truth())


# ---- what no mode but base can carry --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["merged", "adapter", "auto"])
def test_alora(make: Make, mode: str) -> None:
    rig = make(target_modules=["q_proj"], alora_invocation_tokens=[1, 2])
    reason = "engines do not support it" if mode == "adapter" else "depends on the token"
    error = push_refused(rig, UnsupportedLora, mode, Q, "aLoRA", reason, 'mode="base"')
    assert {n for n in error.names if "layers.0" in n} == {
        f"base_model.model.{Q}.lora_A.default.weight", f"base_model.model.{Q}.lora_B.default.weight"
    }  # fmt: skip
    base_still_goes(rig)


@pytest.mark.parametrize("mode", ["merged", "adapter", "auto"])
def test_arrow(make: Make, tmp_path: Path, mode: str) -> None:
    def arrow(base: Any) -> Any:
        from peft import ArrowConfig, create_arrow_model

        paths = []
        for seed in (1, 2):
            expert = wrap(copy.deepcopy(base), seed=seed, r=2, target_modules=["q_proj"])
            expert.save_pretrained(tmp_path / str(seed))
            paths.append(str(tmp_path / str(seed)))
        model = create_arrow_model(
            base_model=base, task_specific_adapter_paths=paths, arrow_config=ArrowConfig(top_k=1, rng_seed=3)
        )
        return model.eval()

    rig = make(model=arrow)
    reason = "engines do not support it" if mode == "adapter" else "depends on the token"
    push_refused(rig, UnsupportedLora, mode, Q, "Arrow", reason, 'mode="base"')


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(6, 6, 3, groups=3)
        self.mirrored = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
        self.linear = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(("layer", "word"), [("grouped", "grouped convolution"), ("mirrored", "reflect")])
@pytest.mark.parametrize("mode", ["merged", "adapter", "auto"])
def test_convolutions_without_a_single_weight(mode: str, layer: str, word: str) -> None:
    model: Any = wrap(Convolutions(), target_modules=[layer, "linear"])
    engine = Convolutions()
    live = copy.deepcopy(engine.state_dict())
    with bridge.attach(engine, model=model) as b:
        before = everything(model)
        with refused(UnsupportedLora, 5, layer, "no single weight", word, 'mode="base"') as caught:
            b.push(model.named_parameters(), mode=mode)
        assert any(layer in name.split(".") for name in caught.value.names)
        assert not any("linear" in name.split(".") for name in caught.value.names)
        assert everything(model) == before
        assert all(torch.equal(t, live[n]) for n, t in engine.state_dict().items())
        b.push(model.named_parameters(), mode="base")
        assert torch.equal(engine.grouped.weight, model.base_model.model.grouped.get_parameter(
            "base_layer.weight" if layer == "grouped" else "weight"))  # fmt: skip


@pytest.mark.parametrize("mode", ["merged", "adapter", "auto"])
def test_lora_bias_on_a_base_without_bias(make: Make, mode: str) -> None:
    rig = make(target_modules=["q_proj", "o_proj"], lora_bias=True)
    error = push_refused(rig, UnsupportedLora, mode, "model.layers.1.self_attn.o_proj", "no bias to carry lora_bias")
    assert 'mode="base"' in str(error.remedy)
    assert any("o_proj" in name.split(".") for name in error.names)
    assert mode != "merged" or not any("q_proj" in name.split(".") for name in error.names), "Qwen2's q_proj has a bias"
    base_still_goes(rig)


# ---- adapters that the engine has no place for ----------------------------------------------------------------------


def test_an_adapter_whose_target_matches_nothing_in_the_engine(make: Make) -> None:
    """A head that only the trainer has, frozen but for its adapter."""

    def with_a_value_head(base: Any) -> Any:
        base.value_head = nn.Linear(48, 1, bias=False)
        return wrap(base, target_modules=["value_head"])

    rig = make(model=with_a_value_head)
    push_refused(rig, UnexpectedTensor, "adapter", "value_head")
    # its base is no tensor of the engine either, but the logits do not depend on it
    assert set(*rig.push(mode="merged").unused.values()) == {"value_head.weight"}


@pytest.mark.parametrize(
    ("module", "word"),
    [
        ("value_head", "not in this model"),
        ("layers.0.self_attn.q_proj", "not in this model"),
        ("base_model.model.model.layers.0.self_attn.q_proj", "not in this model"),
        ("model.layers.9.self_attn.q_proj", "not in this model"),
        ("model.layers.0.input_layernorm", "not wrapped for LoRA"),
        ("model.embed_tokens", "an embedding"),
    ],
)
def test_names_that_the_engine_does_not_know(make: Make, module: str, word: str) -> None:
    rig = make()
    manager = rig.engine.runner.lora
    assert manager is not None
    sent = [TensorInfo(name, "fp32", shape) for name, shape in zip(names_of(module), ((3, 48), (48, 3)), strict=True)]
    good = [TensorInfo(name, "fp32", shape) for name, shape in zip(names_of(Q), ((3, 48), (48, 3)), strict=True)]
    with nothing_changed(rig), refused(UnexpectedTensor, 5, module, word, "mode='merged'") as caught:
        manager.plan([*good, *sent], LoraSpec(3))
    assert caught.value.names == (module,)


def test_an_adapter_that_binds_nothing(make: Make) -> None:
    rig = make()
    manager = rig.engine.runner.lora
    assert manager is not None
    with nothing_changed(rig), refused(MissingTensor, 5, "binds no module"):
        manager.plan([], LoraSpec(3))


# ---- shapes ---------------------------------------------------------------------------------------------------------

K = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("a", "b", "what"),
    [
        ((48, 3), (3, 24), "not transposed"),
        ((24, 3), (48, 3), "another shape"),
        ((3, 49), (24, 3), "another shape"),
        ((3, 48), (25, 3), "another shape"),
        ((2, 48), (24, 3), "one rank"),
        ((2, 48), (24, 2), "one rank"),
    ],
)
def test_wrong_shapes_in_a_plan(make: Make, a: tuple[int, int], b: tuple[int, int], what: str) -> None:
    rig = make()
    manager = rig.engine.runner.lora
    assert manager is not None
    names = names_of(K)
    sent = [TensorInfo(name, "fp32", shape) for name, shape in zip(names, (a, b), strict=True)]
    with nothing_changed(rig), refused(ShapeMismatch, 5, "A [3, 48], B [24, 3] at rank 3", f"A {list(a)}", what) as got:
        manager.plan(sent, LoraSpec(3))
    assert got.value.names == names
    exchanged = [TensorInfo(name, "fp32", shape) for name, shape in zip(names, ((24, 3), (3, 48)), strict=True)]
    with nothing_changed(rig), refused(ShapeMismatch, 5, "exchanged", K):
        manager.plan(exchanged, LoraSpec(3))


def swapped(layer: Any) -> None:
    layer.lora_A["default"], layer.lora_B["default"] = layer.lora_B["default"], layer.lora_A["default"]


def transposed(layer: Any) -> None:
    for part in (layer.lora_A["default"], layer.lora_B["default"]):
        part.weight.data = part.weight.data.t().contiguous()


def too_wide(layer: Any) -> None:
    layer.lora_A["default"].weight.data = torch.randn(3, 49)


def too_tall(layer: Any) -> None:
    layer.lora_B["default"].weight.data = torch.randn(25, 3)


def of_two_ranks(layer: Any) -> None:
    layer.lora_A["default"].weight.data = torch.randn(2, 48)


@pytest.mark.parametrize("mode", ["merged", "adapter", "auto"])
@pytest.mark.parametrize("how", [swapped, transposed, too_wide, too_tall, of_two_ranks], ids=lambda f: f.__name__)
def test_wrong_shapes_in_a_push(make: Make, how: Callable[[Any], None], mode: str) -> None:
    rig = make(target_modules=["q_proj", "k_proj"])
    rig.push(mode="adapter")
    how(rig.model.get_base_model().model.layers[0].self_attn.k_proj)
    error = push_refused(rig, UnsupportedLora, mode, K, "do not fit", 'mode="base"')
    assert all("k_proj" in name.split(".") and "0" in name.split(".") for name in error.names), error.names
    rig.push(mode="base", verify="weights")


def test_a_tensor_of_another_shape_in_the_iterable(make: Make) -> None:
    rig = make(target_modules=["q_proj"])
    name = f"base_model.model.{Q}.lora_B.default.weight"
    named = [(n, p.detach().t().contiguous() if n == name else p) for n, p in rig.model.named_parameters()]
    for mode in ("merged", "adapter"):
        with nothing_changed(rig), refused(ShapeMismatch, 5, name, "[48, 3]", "[3, 48]", "bound model") as caught:
            rig.b.push(named, mode=mode)
        assert caught.value.names == (name,)


@pytest.mark.parametrize("mode", ["adapter", "merged"])
def test_a_trainer_of_another_size(checkpoint: Callable[[Any], Path], mode: str) -> None:
    """Every adapter fits its own model, and not the engine's."""
    rig = LoraRig(checkpoint(tiny_qwen2()), wrap(tiny_qwen2(intermediate_size=96), target_modules=["down_proj"]))
    try:
        words = ("down_proj", "A [3, 80]", "A [3, 96]") if mode == "adapter" else ("gate_proj", "[80, 48]", "[96, 48]")
        error = push_refused(rig, ShapeMismatch, mode, *words)
        assert any("down_proj" in name.split(".") for name in error.names)
    finally:
        rig.close()


# ---- nothing of this is silent in an attached module either ---------------------------------------------------------


def test_an_adapter_for_a_module_without_slots() -> None:
    model: Any = wrap(Toy(), target_modules=["linear"])
    engine = Toy()
    with bridge.attach(engine, model=model) as b:
        live = copy.deepcopy(engine.state_dict())
        with refused(UnsupportedLora, 5, "without LoRA", 'mode="merged"'):
            b.push(model.named_parameters(), mode="adapter")
        assert all(torch.equal(t, live[n]) for n, t in engine.state_dict().items())
        assert b.push(model.named_parameters()).mode == "merged"
        stir(model, seed=3)
        assert b.push(model.named_parameters(), mode="merged").verified is True


# ---- nothing, or nothing of it, was sent -----------------------------------------------------------------------------


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_was_sent(make: Make, mode: str, partial: bool) -> None:
    rig = make()
    full = dict(rig.model.named_parameters())
    for _ in range(2):  # the second time all of it is remembered
        rig.b.push(full, mode=mode, partial=partial, verify="weights")
    rig.step()
    spent = rig.model.named_parameters()
    assert list(spent)
    served = rig.b.status().engines[0].serving
    for nothing in ([], {}, spent):
        with refused(MissingTensor, 5, "nothing was sent", "only once"):
            rig.b.push(nothing, mode=mode, partial=partial)
    assert rig.b.status().engines[0].serving == served


@pytest.mark.parametrize(("mode", "kept"), [("adapter", False), ("auto", False), ("base", True)])
def test_a_part_that_has_nothing_to_do_with_the_mode(make: Make, mode: str, kept: bool) -> None:
    rig = make()
    part = [(n, p) for n, p in rig.model.named_parameters() if ("lora_A" in n.split(".")) is kept]
    if not kept:
        part = part[:1]
    with refused(MissingTensor, 5, "nothing that was sent belongs to", part[0][0], 'mode="merged"') as caught:
        rig.b.push(part, mode=mode, partial=True)
    assert caught.value.names == tuple(name for name, _ in part)
    rig.b.push(part, mode="base" if mode != "base" else "merged", partial=True, verify="weights")


@pytest.mark.parametrize("name", [None, 5, ("a",), b"x"], ids=repr)
def test_a_name_that_is_no_text(make: Make, name: Any) -> None:
    rig = make()
    for mode in MODES:
        with refused(ConfigError, 2, "(name, tensor) pairs", type(name).__name__, "item 0"):
            rig.b.push([(name, torch.zeros(2))], mode=mode)


# ---- the way out that a refusal names -------------------------------------------------------------------------------


def _first(model: Any) -> Any:
    return model.get_base_model().model.layers[0].self_attn.q_proj


def test_factors_that_are_not_here_leave_the_base(make: Make) -> None:
    rig = make()
    _first(rig.model).lora_A.to("meta")
    for mode in ("merged", "adapter", "auto"):
        with refused(UnsupportedLora, 5, "q_proj", "its values are not here", "gather it first", 'mode="base"'):
            rig.b.push(rig.model.named_parameters(), mode=mode)
    assert rig.b.push(rig.model.named_parameters(), mode="base").verified is True


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_swapped_factors_are_refused_with_their_shapes(make: Make, mode: str) -> None:
    rig = make()
    layer = _first(rig.model)
    layer.lora_A["default"], layer.lora_B["default"] = layer.lora_B["default"], layer.lora_A["default"]
    a, b = (list(one["default"].weight.shape) for one in (layer.lora_A, layer.lora_B))
    with refused(UnsupportedLora, 5, f"adapter default cannot be pushed in {mode} mode", f"A {a}, B {b}") as caught:
        rig.b.push(rig.model.named_parameters(), mode=mode)
    other = "adapter" if mode == "merged" else "merged"
    assert f"in {other} mode" not in str(caught.value)


def test_a_refusal_speaks_of_what_is_there(make: Make) -> None:
    rig = make(target_modules=["q_proj"], alora_invocation_tokens=[1, 2])
    with refused(UnsupportedLora, 5, "aLoRA cannot be pushed in merged mode: its delta depends on the token") as caught:
        rig.b.push(rig.model.named_parameters(), mode="merged")
    assert "Arrow" not in str(caught.value)


def test_lora_over_a_parametrized_weight(make: Make) -> None:
    base = tiny_qwen2()
    nn.utils.parametrizations.weight_norm(base.model.layers[0].self_attn.q_proj)
    model = wrap(base, target_modules=["q_proj"])
    with bridge.attach(tiny_qwen2(), model=model) as b:
        way_out = "remove the parametrization first"
        with refused(UnsupportedLora, 5, "LoRA on a parametrized weight", way_out) as caught:
            b.push(model.named_parameters(), mode="merged")
    assert "quantised" not in str(caught.value)
