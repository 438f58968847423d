"""Record what layers of a live model are called with in a forward of its copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from trainer_side.shielded.model_copy import ModelCopier


@dataclass(frozen=True, eq=False)
class LayerCall:
    """The arguments of one call of a layer; their tensors are copies."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LayerCalls:
    """Records the calls of some layers of a live model, through hooks on their copies. For one forward.

    Args:
        layers: modules of the live model.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = {id(layer): layer for layer in layers}
        self._calls: dict[int, list[LayerCall]] = {}

    def watch(self, copier: ModelCopier) -> None:
        """Hook the copies that this copier made; what an earlier forward recorded is dropped."""
        self._calls = {key: [] for key in self._layers}
        for key, layer in self._layers.items():
            double = copier.double_of(layer)
            if isinstance(double, nn.Module):
                double.register_forward_pre_hook(self._recorder(key), with_kwargs=True, prepend=True)

    def of(self, layer: nn.Module) -> list[LayerCall]:
        """List the calls of a layer; none for one that was not called, or not watched."""
        return self._calls.get(id(layer), [])

    def _recorder(self, key: int) -> Any:
        calls = self._calls[key]

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(LayerCall(*tree_map_only(torch.Tensor, _own, (args, kwargs))))

        return record


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()
