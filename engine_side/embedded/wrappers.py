"""Wrappers that put a layer one level down, as LoRA layers do."""

from __future__ import annotations

import torch
from torch import nn

from engine_side.embedded.layers import LinearBase


class WrappedLinear(nn.Module):
    """A linear layer behind `base_layer`. Exposes the same Parameter objects as `weight` and `bias` (`bias` also where
    it is None), so `named_parameters()` shows them under the wrapper's own path. A Parameter object that is replaced in
    the base layer later leaves the alias here stale, as in the engines this stands for; `forward` reads the base."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, base_layer: LinearBase) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.register_parameter("weight", base_layer.weight)
        self.register_parameter("bias", base_layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_layer(x)
        return out


def wrap_linears(model: nn.Module) -> int:
    """Wrap every linear layer below `model`, in place; returns how many. Called after post-load."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, LinearBase)]
    for path, module in found:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, WrappedLinear(module))
    return len(found)


def unwrap(module: nn.Module) -> nn.Module:
    """Walk down any chain of `base_layer`."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module
