"""Recognise weights that a layer computes of other tensors (weight and spectral norm, orthogonal maps)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from bridge.errors import UnexpectedTensor, some_names
from trainer_side.names.naming import walk

_HOP = "parametrizations"


def explain_unexpected(model: nn.Module, error: UnexpectedTensor) -> UnexpectedTensor:
    """Return a better error where engines have no place for what the model's weights are computed of; else the error.

    Called for an error whose `names` are tensors of the model, or of its checkpoint.
    """
    modules = {clean.removesuffix("."): module for _, clean, module in walk(model)}
    found, by_hooks = _computed_weights(modules, error.names)
    if not found:
        return error
    way = (
        "use torch.nn.utils.parametrizations instead of a hook that sets the weight before each forward"
        if by_hooks
        else "push without binding the model, with what a layer computes in the place of what it is computed of: "
        "('LAYER.weight', layer.weight.detach())"
    )
    return UnexpectedTensor(
        "a layer computes its weight of other tensors, which are no checkpoint tensors",
        where=some_names(found),
        expected="weights that are parameters",
        got=some_names(error.names),
        remedy=way,
        names=error.names,
    )


def _computed_weights(modules: Mapping[str, nn.Module], names: Iterable[str]) -> tuple[list[str], bool]:
    """Name the computed weights that tensors of these names belong to, each once; True if hooks set some of them."""
    found: dict[str, None] = {}
    by_hooks = False
    for name in names:
        path, _, rest = name.partition(f".{_HOP}.")
        owner = modules.get(path)
        if rest and owner is not None and is_parametrized(owner):
            found[f"{path}.{rest.partition('.')[0]}"] = None
            continue
        path, _, last = name.rpartition(".")
        # before parametrizations a hook set the weight: a plain attribute beside `weight_g` and `weight_v`
        held = vars(modules[path]) if path in modules else {}
        loose = [key for key, value in held.items() if isinstance(value, torch.Tensor) and last.startswith(f"{key}_")]
        found.update((f"{path}.{key}", None) for key in loose)
        by_hooks = by_hooks or bool(loose)
    return list(found), by_hooks
