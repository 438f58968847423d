"""`lora_parameters`: the same fields in every state, for every kind of wrapper, as Unsloth has them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import ConfigError, UnsupportedLora
from tests.trainer_side.lora.oracle import innermost, untouched
from tests.trainer_side.lora.peft_rows import ALPHA, DEFAULT, HIDDEN, RANK, ROWS, WIDE, Toy, build, layer_of
from trainer_side.lora.layers.read import lora_parameters
from trainer_side.lora.layers.values import LayerState, LoraParameters

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def row(name: str) -> Any:
    return build(next(r for r in ROWS if r.name == name))


def put(model: Any, state: str) -> None:
    with torch.no_grad():
        if "merged" in state:
            model.base_model.merge_adapter()
        if "disabled" in state:
            model.base_model.disable_adapter_layers()
        if state == "absent":
            layer_of(model, "linear").set_adapter([])


STATES = {
    "active": LayerState.ACTIVE, "disabled": LayerState.DISABLED, "merged": LayerState.MERGED,
    "merged disabled": LayerState.MERGED_DISABLED, "absent": LayerState.ACTIVE,
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["linear", "slim"])
def test_every_state_has_the_same_shape_of_answer(state: str, name: str) -> None:
    """PEFT's layer after Unsloth's `get_lora_parameters_bias`: base bias and quant state in every branch."""
    model = row("linear")
    put(model, state)
    layer = layer_of(model, name)
    if name == "slim" and state == "absent":
        layer.set_adapter([])
    with untouched(layer):
        found = lora_parameters(layer)
    weight, quant, a, b, scaling, bias = found
    base = innermost(layer)
    assert isinstance(found, LoraParameters)
    assert weight is base.weight
    assert quant is None
    assert bias is base.bias
    assert (bias is None) == (name == "slim")
    assert found.state is STATES[state]
    assert found.owned == (DEFAULT,)
    assert found.merged == ((DEFAULT,) if "merged" in state else ())
    if state == "active":
        assert a is layer.lora_A[DEFAULT].weight
        assert b is layer.lora_B[DEFAULT].weight
        assert scaling == ALPHA / RANK
        assert [adapter.name for adapter in found.loras] == [DEFAULT]
    else:
        assert (a, b, scaling, found.loras) == (None, None, None, ())


@pytest.mark.parametrize("kind", ["plain", "disabled", "merged", "active"])
def test_unsloths_fake_layers(kind: str) -> None:
    """A layer that is no module: `merged` a bool, dictionaries, a 4-bit state on the weight."""
    weight = torch.zeros(16, 1, dtype=torch.uint8)
    weight.quant_state = state = object()  # type: ignore[attr-defined]
    base = SimpleNamespace(weight=weight, bias=torch.ones(3))
    factor = SimpleNamespace(weight=torch.ones(2, 3))
    layer = SimpleNamespace(
        base_layer=base, lora_A={"x": factor}, lora_B={"x": SimpleNamespace(weight=torch.ones(3, 2), bias=None)},
        scaling={"x": 4.0}, active_adapters=["x"], disable_adapters=kind == "disabled", merged=kind == "merged",
    )  # fmt: skip
    found: Any = lora_parameters(base if kind == "plain" else layer)  # type: ignore[arg-type]
    assert tuple(found)[:2] == (weight, state)
    assert found.bias is base.bias
    assert found.A is (factor.weight if kind == "active" else None)
    assert found.scaling == (4.0 if kind == "active" else None)


def test_unsloths_flat_shape_and_a_single_active_adapter_name() -> None:
    flat = SimpleNamespace(
        weight=torch.ones(3, 3), bias=None, quant_state="state", lora_A={"x": torch.ones(1, 3)},
        lora_B={"x": torch.ones(3, 1)}, scaling={"x": 2.0}, active_adapter="x", disable_adapters=False, merged=False,
    )  # fmt: skip
    weight, quant, a, b, scaling, bias = lora_parameters(flat)  # type: ignore[arg-type]
    assert (weight is flat.weight, quant, a is flat.lora_A["x"], b is flat.lora_B["x"]) == (True, "state", True, True)
    assert (scaling, bias) == (2.0, None)


def test_an_fp8_scale_is_a_state_only_if_the_weight_is_fp8() -> None:
    layer = nn.Linear(4, 4)
    layer.weight_scale_inv = torch.ones(1)  # type: ignore[assignment]
    assert lora_parameters(layer).quant_state is None
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert lora_parameters(layer).quant_state is layer.weight_scale_inv


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_chains_of_base_layers(levels: int) -> None:
    """A model that was wrapped again: all adapters act, those nearest to the layer first."""
    layer = stacked(levels)
    found = lora_parameters(layer)
    assert found.weight is innermost(layer).weight
    assert found.bias is innermost(layer).bias
    assert [adapter.name for adapter in found.loras] == [f"level{k}" for k in range(levels)]
    assert found.A is found.loras[0].a
    layer.enable_adapters(False)
    below = [f"level{k}" for k in range(levels - 1)]
    assert [adapter.name for adapter in lora_parameters(layer).loras] == below


def stacked(levels: int, **config: Any) -> Any:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    torch.manual_seed(0)
    layer: Any = nn.Linear(HIDDEN, WIDE).double()
    for k in range(levels):
        settings = LoraConfig(r=k + 2, lora_alpha=ALPHA, init_lora_weights=False, **config)
        layer = Linear(layer, f"level{k}", config=settings, r=k + 2, lora_alpha=ALPHA).double()
    return layer


def test_nested_wrappers_of_parameters_say_which_is_theirs() -> None:
    """Only `parameter_name` tells which of two nested wrappers an adapter belongs to."""
    layer = layer_of(row("experts, both"), "even")
    base = innermost(layer)
    outer, inner = lora_parameters(layer), lora_parameters(layer.base_layer)
    assert {layer.parameter_name, layer.base_layer.parameter_name} == {"gate_up_proj", "down_proj"}
    assert outer.weight is getattr(base, layer.parameter_name)
    assert inner.weight is getattr(base, layer.base_layer.parameter_name)
    assert [len(found.loras) for found in (outer, inner)] == [1, 1]
    assert outer.A is layer.lora_A[DEFAULT].weight
    assert inner.A is layer.base_layer.lora_A[DEFAULT].weight
    assert outer.loras[0].extra == {"experts": 3, "swapped": True, "layout": "rank_major"}


@pytest.mark.parametrize(
    ("name", "layer", "kind", "transposed"),
    [
        ("linear", "linear", "linear", False),
        ("conv1d of transformers", "transposed", "linear", True),
        ("embedding, fan_in_fan_out", "embed", "embedding", False),
        ("convolutions", "conv2", "conv", False),
        ("2-d parameter", "square", "parameter", False),
        ("attention", "attention", "attention", False),
        ("tokens", "embed", "embedding", False),
    ],
)
def test_kinds(name: str, layer: str, kind: str, transposed: bool) -> None:
    found = lora_parameters(layer_of(row(name), layer))
    assert (found.kind, found.transposed) == (kind, transposed)


@pytest.mark.parametrize(
    ("layer", "kind", "transposed"),
    [("embed", "embedding", False), ("linear", "linear", False), ("transposed", "linear", True),
     ("conv3", "conv", False)],
)  # fmt: skip
def test_plain_layers(layer: str, kind: str, transposed: bool) -> None:
    plain = getattr(Toy(), layer)
    found = lora_parameters(plain)
    assert (found.state, found.kind, found.transposed) == (LayerState.PLAIN, kind, transposed)
    assert tuple(found)[:2] == (plain.weight, None)
    assert tuple(found)[2:5] == (None, None, None)
    assert found.bias is getattr(plain, "bias", None)


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Sequential(nn.Linear(2, 2)), Toy(), nn.Identity()])
def test_a_module_without_a_weight_is_named(module: nn.Module) -> None:
    with pytest.raises(ConfigError, match=type(module).__name__):
        lora_parameters(module)


@pytest.mark.parametrize("state", ["active", "disabled", "none active"])
def test_modules_to_save(state: str) -> None:
    model = row("modules_to_save")
    wrapper = layer_of(model, "head")
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    if state == "none active":
        wrapper.set_adapter([])
    with untouched(wrapper):
        found = lora_parameters(wrapper)
    acting = wrapper.modules_to_save[DEFAULT] if state == "active" else wrapper.original_module
    assert found.weight is acting.weight
    assert found.bias is acting.bias
    assert found.loras == ()
    assert found.owned == (DEFAULT,)
    expected = {"active": LayerState.ACTIVE, "disabled": LayerState.DISABLED, "none active": LayerState.PLAIN}
    assert found.state is expected[state]


def test_modules_to_save_of_an_adapter_that_has_no_copy() -> None:
    model = row("modules_to_save")
    from peft import LoraConfig

    model.add_adapter("other", LoraConfig(target_modules=["linear"], r=2))
    model.set_adapter("other")
    wrapper = layer_of(model, "head")
    assert lora_parameters(wrapper).weight is wrapper.original_module.weight


@pytest.mark.parametrize("state", ["active", "disabled", "merged", "merged disabled"])
def test_trainable_tokens(state: str) -> None:
    model = row("tokens")
    put(model, state)
    wrapper = layer_of(model, "embed")
    found = lora_parameters(wrapper)
    assert found.weight is wrapper.token_adapter.base_layer.weight
    assert found.state is STATES[state]
    rows = {r.name: (r.indices, r.values is wrapper.token_adapter.trainable_tokens_delta[DEFAULT]) for r in found.rows}
    assert rows == ({DEFAULT: ((2, 7, 3), True)} if state == "active" else {})


def test_active_adapters_is_copied() -> None:
    """PEFT answers with its own list."""
    model = row("two adapters")
    layer = layer_of(model, "linear")
    found = lora_parameters(layer)
    layer.active_adapters.clear()
    assert [adapter.name for adapter in found.loras] == ["a", "b"]
    assert lora_parameters(layer).loras == ()


def test_what_the_config_does_not_say_is_read_from_the_layer() -> None:
    layer = layer_of(row("set_scale"), "linear")
    assert lora_parameters(layer).scaling == pytest.approx(0.37 * ALPHA / RANK)


def test_variants_magnitudes_and_biases() -> None:
    dora = lora_parameters(layer_of(row("dora"), "linear")).loras[0]
    assert dora.variant == "DoraLinearVariant"
    assert dora.magnitude is not None
    kasa = layer_of(row("kasa"), "linear")
    assert lora_parameters(kasa).loras[0].extra["diagonal"] is kasa.lora_diag["a"]
    biased = layer_of(row("lora_bias"), "linear")
    assert lora_parameters(biased).loras[0].bias is biased.lora_B[DEFAULT].bias


def test_another_tuner_is_refused() -> None:
    from peft import IA3Config, get_peft_model

    model: Any = get_peft_model(Toy(), IA3Config(target_modules=["linear"], feedforward_modules=[]))
    with pytest.raises(UnsupportedLora, match="not LoRA"):
        lora_parameters(layer_of(model, "linear"))


def test_inside_a_compiled_or_checkpointed_layer() -> None:
    layer = layer_of(row("linear"), "linear")
    shell = nn.Module()
    shell.add_module("_orig_mod", layer)
    assert lora_parameters(shell).A is layer.lora_A[DEFAULT].weight
    again = copy.deepcopy(layer)
    inner = nn.Module()
    inner.add_module("_checkpoint_wrapped_module", again.base_layer)
    again.base_layer = inner
    assert lora_parameters(again).weight is inner.get_submodule("_checkpoint_wrapped_module").weight
