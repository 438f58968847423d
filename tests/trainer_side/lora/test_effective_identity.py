"""Which places have the same effective tensor by construction: what stays tied, and what LoRA on one end unties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer_side.lora.oracle import untouched
from tests.trainer_side.lora.peft_rows import CAUSAL, DEFAULT, ROWS, build, layer_of
from tests.trainer_side.lora.test_reader import stacked
from trainer_side.lora.layers.effective import effective_bias, effective_identity, effective_weight

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def ends(name: str) -> tuple[Any, Any, Any]:
    model = build(next(row for row in CAUSAL if row.name == name))
    inner = model.base_model.model
    return model, inner.model.embed_tokens, inner.lm_head


def same(one: Any, other: Any) -> bool:
    with untouched(one), untouched(other):
        equal = effective_identity(one, "weight") == effective_identity(other, "weight")
        values = torch.equal(effective_weight(one, torch.float32), effective_weight(other, torch.float32))
    if equal:
        assert values
    return equal


@pytest.mark.parametrize("name", ["tied, both ends alike", "tokens, tied"])
def test_tied_ends_with_the_same_adapter_are_one(name: str) -> None:
    _, embedding, head = ends(name)
    assert same(embedding, head)


@pytest.mark.parametrize("name", ["tied, head only", "tied, embedding only"])
def test_lora_on_one_end_unties(name: str) -> None:
    model, embedding, head = ends(name)
    assert not same(embedding, head)
    model.base_model.disable_adapter_layers()
    assert same(embedding, head)


def test_disabled_ends_are_what_lies_there() -> None:
    _, embedding, head = ends("tied, both ends alike")
    head.enable_adapters(False)
    assert not same(embedding, head)
    embedding.enable_adapters(False)
    assert same(embedding, head)


def test_another_scale_unties() -> None:
    _, embedding, head = ends("tied, both ends alike")
    head.set_scale(DEFAULT, 0.5)
    assert not same(embedding, head)


def test_the_magnitude_of_dora_counts() -> None:
    layer = stacked(1, use_dora=True)
    before = effective_identity(layer, "weight")
    magnitude = layer.lora_magnitude_vector["level0"]
    magnitude.weight = nn.Parameter(magnitude.weight.detach().clone())
    assert effective_identity(layer, "weight") != before


@pytest.mark.parametrize("row", [row for row in ROWS if row.layers[0] not in ("attention",)], ids=str)
def test_the_same_layer_is_itself_until_something_changes(row: Any) -> None:
    model = build(row)
    for name in row.layers:
        layer = layer_of(model, name)
        assert effective_identity(layer, "weight") == effective_identity(layer, "weight")
        hash(effective_identity(layer, "bias"))


def test_bias_is_told_from_weight() -> None:
    layer = layer_of(build(next(row for row in ROWS if row.name == "lora_bias")), "linear")
    twin = layer_of(build(next(row for row in ROWS if row.name == "lora_bias")), "linear")
    assert effective_identity(layer, "bias") != effective_identity(twin, "bias")
    twin.base_layer.bias = layer.base_layer.bias
    assert effective_identity(layer, "bias") != effective_identity(twin, "bias")
    twin.lora_B[DEFAULT].bias = layer.lora_B[DEFAULT].bias
    assert effective_identity(layer, "bias") == effective_identity(twin, "bias")
    assert torch.equal(bias_of(layer), bias_of(twin))


def bias_of(layer: Any) -> torch.Tensor:
    found = effective_bias(layer, torch.float64)
    assert found is not None
    return found


def test_replicated_layers_share_a_base_but_not_adapters() -> None:
    base = nn.Linear(8, 12).double()
    one, other = stacked(1), stacked(1)
    one.base_layer, other.base_layer = base, base
    assert effective_identity(one, "weight") != effective_identity(other, "weight")
    one.enable_adapters(False)
    other.enable_adapters(False)
    assert effective_identity(one, "weight") == effective_identity(other, "weight")
    assert effective_identity(one, "weight") == effective_identity(base, "weight")


CHANGES: dict[str, Callable[[Any], Any]] = {
    "scale": lambda layer: layer.set_scale("level0", 2.0),
    "disabled": lambda layer: layer.enable_adapters(False),
    "factor": lambda layer: setattr(layer.lora_A["level0"], "weight", nn.Parameter(torch.zeros(2, 8).double())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_shows(change: str) -> None:
    layer = stacked(1)
    before = effective_identity(layer, "weight")
    CHANGES[change](layer)
    assert effective_identity(layer, "weight") != before
