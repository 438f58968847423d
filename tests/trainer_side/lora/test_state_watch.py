"""What is baked or computed for a push is only what was read in the state that the push began in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import IntegrityError
from tests.trainer_side.lora.peft_rows import ROWS, build
from trainer_side.lora import model as models
from trainer_side.lora import state as states
from trainer_side.lora.layers.module_tree import LoraTree
from trainer_side.lora.layers.refusals import reason_of
from trainer_side.lora.layers.wrapper_chain import is_lora, is_saved, is_token_wrapper, read_chain
from trainer_side.lora.model import LoraModel
from trainer_side.lora.without_lora import WithoutLora

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROW = next(row for row in ROWS if row.name == "linear")


def test_a_survey_of_another_state_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disabled and enabled again while the layers are surveyed: nothing baked then may serve a later push."""
    model: Any = build(ROW)
    lora = LoraModel(model)
    survey = models.survey

    def meanwhile(*given: Any) -> Any:
        model.base_model.disable_adapter_layers()
        try:
            return survey(*given)
        finally:
            model.base_model.enable_adapter_layers()

    for mode in ("merged", "adapter"):
        with monkeypatch.context() as patch:
            patch.setattr(models, "survey", meanwhile)
            with pytest.raises(IntegrityError, match="changed while they were pushed"):
                lora.choose(mode, None)
            with pytest.raises(IntegrityError, match="changed while they were pushed"):
                lora.view(mode, lora.tensors())
        lora.choose(mode, None)
        assert lora.view(mode, lora.tensors()).computed, "the acting adapters were baked as if they did not act"


def test_a_reading_is_compared_not_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer went back to what it was, but it was read in between."""
    model: Any = build(ROW)
    began = LoraModel(model).state()
    layer = next(module for module in model.modules() if is_lora(module))
    began.read_chain(layer)
    layer.scale_layer(2.0)
    read = read_chain(layer)
    assert read.levels[-1].loras
    layer.scale_layer(0.5)
    with monkeypatch.context() as patch:
        patch.setattr(states, "read_chain", lambda module: read)
        with pytest.raises(IntegrityError):
            began.read_chain(layer)
    began.read_chain(layer)


def test_one_reading_has_one_scaling() -> None:
    layer: Any = next(module for module in build(ROW).modules() if is_lora(module))
    (level,) = read_chain(layer).levels
    first = level.loras
    layer.scale_layer(3.0)
    assert level.loras is first


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_not_taken_for_a_change(value: float) -> None:
    model: Any = build(ROW)
    for module in model.modules():
        if is_lora(module):
            module.scaling["default" if "default" in module.scaling else next(iter(module.scaling))] = value
    lora = LoraModel(model)
    for one in lora.view("merged", lora.tensors()).computed:
        one.compute(torch.float32)


@pytest.mark.parametrize(("mode", "seen"), [("merged", True), ("base", True), ("adapter", False)])
def test_a_merge_that_was_taken_back_shows(mode: str, seen: bool) -> None:
    model: Any = build(ROW)
    with torch.no_grad():
        for module in model.modules():
            if is_lora(module):  # small beside its delta: unmerging cannot give its bits back
                module.base_layer.weight.mul_(1e-3)
    lora = LoraModel(model)
    view = lora.view(mode, lora.tensors())
    assert not lora.changed_since(view)
    model.merge_adapter()
    assert lora.changed_since(view)
    model.unmerge_adapter()
    assert lora.changed_since(view) is seen, "A and B do not move when they are merged"


class Lookalike(nn.Module):
    """A module of somebody else's with children that are called like PEFT's."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def lookalikes() -> Iterator[Lookalike]:
    yield Lookalike(token_adapter=nn.Linear(2, 2))
    yield Lookalike(token_adapter=Lookalike(base_layer=nn.Linear(2, 2), trainable_tokens_delta=nn.Linear(2, 2)))
    yield Lookalike(original_module=nn.Linear(2, 2), modules_to_save=keyed())
    yield Lookalike(lora_A=keyed())
    yield Lookalike(lora_A=keyed(), lora_B=keyed())


def keyed() -> nn.ModuleDict:
    return nn.ModuleDict({"default": nn.Linear(2, 2)})


@pytest.mark.parametrize("module", lookalikes(), ids=lambda m: ",".join(name for name, _ in m.named_children()))
def test_ordinary_modules_are_no_wrappers(module: Lookalike) -> None:
    assert not any(is_wrapper(module) for is_wrapper in (is_lora, is_saved, is_token_wrapper))
    assert not LoraModel.present(module)
    assert {place.clean for place in LoraTree(module).places} == set(dict(module.named_parameters()))


def test_the_names_of_pefts_mixed_model() -> None:
    from peft import LoraConfig, get_peft_model

    inner = nn.Sequential(nn.Linear(3, 3))
    model = get_peft_model(inner, LoraConfig(target_modules=["0"]), mixed=True)  # type: ignore[arg-type]
    assert {place.clean for place in LoraTree(model).places} == {"0.weight", "0.bias"}
    assert type(WithoutLora().copy(model)) is nn.Sequential


def test_the_first_reason_of_a_layer() -> None:
    layer: Any = next(module for module in build(ROW).modules() if is_lora(module))
    assert reason_of(read_chain(layer)) is None
    nn.utils.parametrizations.weight_norm(layer.base_layer)
    reason = reason_of(read_chain(layer))
    assert reason is not None
    assert (reason.subject, reason.way_out) == ("LoRA on a parametrized weight", "remove the parametrization first")
