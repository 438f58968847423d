"""Put back what a forward of the live model itself has replaced, for the rare model that only it can answer for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bridge.model.same_bits import same_bits
from trainer_side.shielded.model_copy import ModelCopier


class Undo:
    """The contents of every module, parameter, state and container of a live model, when it was made.

    `put_back` restores them, object for object: replaced data and attributes, entries of dictionaries, flags. Elements
    that were overwritten in place stay so; `ReferenceGuard` is there to refuse that. Holds no copy of a parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        copier = ModelCopier()
        copier.copy(model)
        self._tensors: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] = []
        self._values: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._objects: list[tuple[Any, dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        for original in copier.originals:
            if isinstance(original, torch.Tensor):
                self._tensors.append((original, original.data, dict(vars(original))))
                if not isinstance(original, nn.Parameter):  # buffers: counters and caches move in a forward
                    self._values.append((original, original.detach().clone()))
            elif isinstance(original, (dict, list, set)):
                self._containers.append((original, original.copy()))
            elif hasattr(original, "__dict__"):
                self._objects.append((original, dict(vars(original))))
                registries = [v for v in vars(original).values() if isinstance(v, (dict, set))]
                self._containers += [(registry, registry.copy()) for registry in registries]

    def put_back(self) -> None:
        """Restore the model. Called once, after the forward has ended or raised."""
        for thing, attributes in self._objects:
            vars(thing).clear()
            vars(thing).update(attributes)
        for container, content in self._containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for tensor, data, attributes in self._tensors:
            if not tensor.is_set_to(data):
                tensor.data = data
            vars(tensor).clear()
            vars(tensor).update(attributes)
        with torch.no_grad():
            for tensor, values in self._values:
                if not same_bits(tensor, values):
                    tensor.copy_(values)
