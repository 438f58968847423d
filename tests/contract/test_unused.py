"""Names that the engine has no place for: unused where the logits do not depend on them, else refused, whatever the
engine's own loader does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge.errors import IntegrityError, UnexpectedTensor
from tests.families import make_model
from tests.rigs import PROMPTS, EngineRig, difference
from trainer_side.reference import reference_logprobs

pytestmark = pytest.mark.timeout(300)


@contextmanager
def from_another_trainer(rig: EngineRig, model: Any, *, bound: bool = True) -> Iterator[bridge.Bridge]:
    """A bridge of another trainer; what is refused inside does not change what the engine says."""
    said = rig.said()
    rig.b.close()
    try:
        with bridge.attach(rig.handle, model=model if bound else None) as b:
            yield b
        assert rig.said() == said
    finally:
        rig.attach()


class Norm(nn.Module):
    """As a norm on the queries. A hook that is a method follows its module into a copy."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size, dtype=torch.bfloat16) + 0.5)

    def scale(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out * self.weight


def with_a_norm() -> Any:
    model = make_model("qwen2-tied")
    for layer in model.model.layers:
        layer.self_attn.q_norm = Norm(128)
        layer.self_attn.q_proj.register_forward_hook(layer.self_attn.q_norm.scale)
    return model


def with_a_bias() -> Any:
    model = make_model("qwen2-tied")
    for layer in model.model.layers:
        layer.mlp.down_proj.bias = nn.Parameter(torch.randn(128, dtype=torch.bfloat16))
    return model


def deeper() -> Any:
    return make_model("qwen2-tied", num_hidden_layers=3)


def looped() -> Any:
    model = deeper()
    model.model.layers[2] = model.model.layers[1]
    return model


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize(
    ("trainer", "name"),
    [
        (deeper, "model.layers.2."),
        (looped, "model.layers.2."),
        (with_a_norm, "q_norm"),
        (with_a_bias, "down_proj.bias"),
    ],
)
def test_what_counts_is_refused(rig: EngineRig, trainer: Callable[[], Any], name: str, bound: bool) -> None:
    model = trainer()
    named = model.named_parameters(remove_duplicate=False)
    with from_another_trainer(rig, model, bound=bound) as b, pytest.raises(UnexpectedTensor, match=name):
        b.push(named)


@pytest.mark.parametrize("bound", [True, False])
def test_a_wrong_namespace_is_refused(rig: EngineRig, bound: bool) -> None:
    model = make_model("qwen2-tied")
    model.model.tower = nn.Module()
    model.model.tower.layers, model.model.layers = model.model.layers, nn.ModuleList()
    with from_another_trainer(rig, model, bound=bound) as b, pytest.raises(IntegrityError):
        b.push(model.named_parameters())


def test_an_untied_head_is_served_as_it_is_or_refused(rig: EngineRig) -> None:
    """The embedded engine can take its own head apart from the embedding."""
    model = make_model("qwen2", seed=5)
    try:
        rig.b.bind(model)
        rig.b.push(model.named_parameters())
    except UnexpectedTensor as refusal:
        if "lm_head.weight" not in refusal.names:
            raise
        rig.right()
    else:
        assert difference(rig.said(), reference_logprobs(model, PROMPTS)) < rig.largest_noise
    finally:
        rig.b.bind(rig.model)


def test_a_value_head_is_unused(rig: EngineRig) -> None:
    rig.step()
    rig.model.v_head = nn.Linear(128, 1).bfloat16()
    try:
        rig.b.bind(rig.model)
        receipt = rig.push()
    finally:
        del rig.model.v_head
        rig.b.bind(rig.model)
    assert receipt.verified is True
    assert receipt.unused == {receipt.engines[0].id: ("v_head.weight", "v_head.bias")}
    rig.right()
