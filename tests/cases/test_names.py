"""One rule for names, whether a model is bound or not: checkpoints of a model without its head leave its prefix out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bridge.errors import DuplicateTensor, ShapeMismatch, UnexpectedTensor
from tests.push.rig import Rig, drift


def without_prefix(named: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [(name.removeprefix("model."), tensor) for name, tensor in named]


def test_names_without_the_prefix_are_the_models(rig: Rig) -> None:
    rig.step()
    assert rig.b.push(without_prefix(rig.named())).verified is True
    assert drift(rig.engine, rig.model) < 1e-3


def test_a_tensor_under_both_names_is_sent_twice(rig: Rig) -> None:
    with pytest.raises(DuplicateTensor, match=r"model\.norm\.weight"):
        rig.b.push([*rig.named(), ("norm.weight", torch.ones(48))])


@pytest.mark.parametrize("name", ["weight", "gpt.norm.weight", "norm", "layers.9.mlp.up_proj.weight"])
def test_other_names_stay_unknown(rig: Rig, name: str) -> None:
    with pytest.raises(UnexpectedTensor, match=name):
        rig.b.push([*rig.named(), (name, torch.ones(48))])


def test_a_shape_is_that_of_the_prefixed_tensor(rig: Rig) -> None:
    named = [(n, t[:7] if n == "norm.weight" else t) for n, t in without_prefix(rig.named())]
    with pytest.raises(ShapeMismatch, match=r"model\.norm\.weight"):
        rig.b.push(named)
