"""Put back what a forward of the live model itself has replaced, for the rare model that only it can answer for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bridge.model.same_bits import same_bits
from trainer_side.shielded.model_copy import ModelCopier
from trainer_side.shielded.values import DUPLICATES, container_base, contents, fill_container, put_back, slots_of


class Undo:
    """The contents of every module, parameter, state and container of a live model, when it was made.

    `put_back` restores them, object for object: replaced data and attributes, entries of containers, flags. Elements of
    weights that were overwritten in place stay so; `ReferenceGuard` is there to refuse that. Holds no copy of a weight.

    Attributes:
        lent: tensors of the model that are not copied here.
    """

    def __init__(self, model: nn.Module) -> None:
        copier = ModelCopier()
        copier.copy(model)
        self.lent = copier.lent
        lent = {id(tensor) for tensor in copier.lent}
        self._tensors: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] = []
        self._values: list[tuple[torch.Tensor, torch.Tensor, int | None]] = []
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._slots: list[tuple[Any, dict[str, Any]]] = []
        self._containers: list[tuple[Any, list[Any]]] = []
        self._duplicates: list[tuple[Any, Any]] = []
        for original in copier.originals:
            if isinstance(original, torch.Tensor):
                self._tensors.append((original, original.data, dict(vars(original))))
                if id(original) not in lent:  # buffers: counters and caches move in a forward
                    version = None if original.is_inference() else original._version
                    self._values.append((original, original.detach().clone(), version))
                continue
            if type(original) in DUPLICATES:
                self._duplicates.append((original, DUPLICATES[type(original)](original)))
            elif container_base(type(original)) is not None:
                self._containers.append((original, contents(original)))
            else:
                self._slots.append((original, slots_of(original)))
            if hasattr(original, "__dict__"):
                self._attributes.append((vars(original), dict(vars(original))))
            if isinstance(original, nn.Module):
                registries = (original._parameters, original._buffers, original._modules)
                self._containers += [(registry, contents(registry)) for registry in registries]

    def put_back(self) -> None:
        """Restore the model. Called once, after the forward has ended or raised."""
        for now, attributes in self._attributes:
            now.clear()
            now.update(attributes)
        for thing, slots in self._slots:
            for name in slots_of(thing).keys() - slots.keys():
                object.__delattr__(thing, name)
            for name, value in slots.items():
                object.__setattr__(thing, name, value)
        for container, items in self._containers:
            fill_container(container, items)
        for value, duplicate in self._duplicates:
            put_back(value, duplicate)
        for tensor, data, attributes in self._tensors:
            if not tensor.is_set_to(data):
                tensor.data = data
            vars(tensor).clear()
            vars(tensor).update(attributes)
        with torch.no_grad():
            for tensor, values, version in self._values:
                if not same_bits(tensor, values):
                    with torch.inference_mode(tensor.is_inference()):
                        tensor.copy_(values)
                if version is not None:  # it was written and is as it was: a graph that saved it may still use it
                    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
