"""A weight that its layer computes of other tensors: what the engine needs is no parameter of the trainer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm
from torch.nn.utils import weight_norm as weight_norm_by_hook

import bridge
from bridge.errors import UnexpectedTensor
from tests.conftest import tiny_qwen2
from tests.push.lora_rig import wrap
from tests.push.rig import Rig

HOOKS = {"weight norm": weight_norm_by_hook, "spectral norm": spectral_norm}
NEW = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


def changed(model: Any, change: Callable[[nn.Module], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those by hooks are deprecated
        for layer in model.model.layers:
            change(layer.mlp.up_proj)
    return model.eval()


def with_computed_weights(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The pairs that the remedy asks for."""
    pairs = [(name, tensor) for name, tensor in model.named_parameters() if ".parametrizations." not in name]
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            pairs.append((f"{name}.weight", module.weight.detach()))
    return pairs


@pytest.mark.parametrize("way", NEW)
def test_what_a_weight_is_computed_of_is_refused_with_a_remedy(way: str, tmp_path: Path) -> None:
    model = tiny_qwen2()
    model.save_pretrained(tmp_path)
    rig = Rig(tmp_path, changed(model, NEW[way]))
    try:
        with rig.unmoved(then_push=False), pytest.raises(UnexpectedTensor, match="push without binding") as caught:
            rig.push()
        assert caught.value.where == "model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight"
    finally:
        rig.close()
    unbound = Rig(tmp_path, model, bound=False)
    try:
        assert unbound.b.push(with_computed_weights(model)).verified is True
        assert unbound.serves(model)
    finally:
        unbound.close()


@pytest.mark.parametrize("way", HOOKS)
def test_a_weight_that_a_hook_sets_is_refused(way: str, tmp_path: Path) -> None:
    """It is as old as the last forward, so the remedy is not to push what lies there."""
    model = tiny_qwen2()
    model.save_pretrained(tmp_path)
    rig = Rig(tmp_path, changed(model, HOOKS[way]))
    try:
        with pytest.raises(UnexpectedTensor, match=r"instead of a hook") as caught:
            rig.push()
        assert caught.value.where == "model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight"
    finally:
        rig.close()


@pytest.mark.parametrize("mode", ["merged", "base"])
def test_beside_lora_it_is_refused_as_well(mode: str, tmp_path: Path) -> None:
    model = tiny_qwen2()
    model.save_pretrained(tmp_path)
    rig = Rig(tmp_path, wrap(changed(model, parametrizations.weight_norm), target_modules=["q_proj"]))
    try:
        with pytest.raises(UnexpectedTensor, match="a layer computes its weight of other tensors"):
            rig.b.push(rig.model.named_parameters(), mode=mode)
    finally:
        rig.close()


def test_an_engine_with_the_same_parametrization_takes_the_tensors_as_they_stand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 2))
    engine = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    b = bridge.attach(engine, model=model)
    try:
        assert b.push(model.named_parameters()).verified is True
        x = torch.randn(3, 6)
        assert torch.equal(engine(x), model(x))
    finally:
        b.close()
