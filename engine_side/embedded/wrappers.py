"""Wrappers that hold a layer as `base_layer`, one level down, as LoRA layers do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine_side.embedded.layers import LinearBase


class WrappedLayer(nn.Module):
    """A layer behind `base_layer`.

    It registers the same Parameter objects as the layer itself (`bias` also where it is None, a block-scaled weight's
    scales too), so `named_parameters()` shows them under the wrapper's own path. Every other public name
    (`num_embeddings`, `quant_method`, ...) is looked up in the layer, through any number of levels. Writes do not reach
    the layer: a Parameter object that is replaced there later leaves the alias here stale until `mirror`, as in vLLM
    and SGLang; `forward` reads the layer.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.mirror()

    @property
    def core(self) -> Any:
        """The layer below all wrappers."""
        return unwrap(self.base_layer)

    def mirror(self) -> None:
        """Register the Parameter objects that the layer has now."""
        # Not register_parameter: it refuses names that the delegation below already answers.
        self._parameters.clear()
        self._parameters.update(self.core._parameters)
        self._parameters.setdefault("bias", None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = self.base_layer(*args, **kwargs)
        return out


def wrap_linears(model: nn.Module, levels: int = 1) -> None:
    """Wrap every linear layer below `model` `levels` times, in place. Called after post-load."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, LinearBase)]
    for path, module in found:
        wrapped: nn.Module = module
        for _ in range(levels):
            wrapped = WrappedLayer(wrapped)
        model.set_submodule(path, wrapped)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the layer below any chain of `base_layer` wrappers."""
    while isinstance(inner := module._modules.get("base_layer"), nn.Module):
        module = inner
    return module
