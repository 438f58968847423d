"""The targets of a skeleton: what a plan may write, and every place that holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from bridge.errors import ConfigError
from bridge.model.regions import TargetTensor
from bridge.model.torch_dtypes import DTYPES
from engine_side.live.inplace import twin_parameter, unregistered_tensors
from engine_side.live.storage_layout import is_dense, whole_view_key


@dataclass(frozen=True)
class TargetPlace:
    """One name under which a skeleton module holds a target: `module` path, attribute `name`, the target's path."""

    module: str
    name: str
    target: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}" if self.module else self.name


@dataclass(frozen=True)
class Targets:
    """All parameters and persistent buffers of a skeleton; ties by storage are one target with several places.

    Attributes:
        mirrors: places of non-persistent buffers and plain attributes that a constructor made as views of a whole
            target. Where post-load gives the target other storage, its values go on being used here.
    """

    targets: tuple[TargetTensor, ...]
    places: tuple[TargetPlace, ...]
    tensors: Mapping[str, torch.Tensor]
    mirrors: tuple[TargetPlace, ...] = ()

    def with_buffers(self, buffers: Mapping[str, torch.Tensor]) -> Targets:
        """Add non-persistent buffers as targets."""
        if not buffers:
            return self
        wire = {dtype: name for name, dtype in DTYPES.items()}
        return replace(
            self,
            targets=(
                *self.targets,
                *(
                    TargetTensor(path, wire.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), True)
                    for path, tensor in buffers.items()
                ),
            ),
            places=(*self.places, *(TargetPlace(*_split(path), path) for path in buffers)),
            tensors={**self.tensors, **buffers},
        )

    def of_module(self, *, mirrors: bool = False) -> dict[str, tuple[TargetPlace, ...]]:
        """Group the places by module path, in the skeleton's order, with the mirrors at the end of each or without."""
        out: dict[str, list[TargetPlace]] = {}
        for place in (*self.places, *(self.mirrors if mirrors else ())):
            out.setdefault(place.module, []).append(place)
        return {path: tuple(places) for path, places in out.items()}


def collect_targets(skeleton: nn.Module, shared: frozenset[int] = frozenset()) -> Targets:
    """Collect the targets of a skeleton, in the order of its modules.

    A tensor that is not on meta is replaced by a meta one, so that tracing cannot write it. Raises ConfigError for one
    whose elements have gaps between them or share memory.

    Args:
        shared: addresses of storages that the live engine owns; skeleton tensors that lie there are left out.
    """
    targets: list[TargetTensor] = []
    places: list[TargetPlace] = []
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[tuple[int, int, tuple[int, ...], tuple[int, ...]], str] = {}
    wire = {dtype: name for name, dtype in DTYPES.items()}  # torch's own word for a dtype that only this engine uses
    for module_path, module in skeleton.named_modules():
        for name, tensor, buffer in own_tensors(module):
            if tensor.device.type != "meta":
                if tensor.untyped_storage().data_ptr() in shared:
                    continue
                tensor = twin_parameter(tensor, torch.empty_like(tensor, device="meta"))
                registry = module._buffers if buffer else module._parameters
                registry[name] = tensor
            path = f"{module_path}.{name}" if module_path else name
            if not is_dense(tensor):
                raise ConfigError(
                    "a parameter's elements do not fill one stretch of memory",
                    where=path,
                    expected="a dense tensor, in any order of its dimensions",
                    got=f"shape {list(tensor.shape)}, strides {list(tensor.stride())}",
                    remedy="give the module a parameter of its own: nn.Parameter(tensor.contiguous())",
                    names=(path,),
                )
            key = (tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())
            first = seen.setdefault(key, path) if tensor.numel() else path
            places.append(TargetPlace(module_path, name, first))
            if first == path:
                tensors[path] = tensor
                targets.append(
                    TargetTensor(path, wire.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), buffer)
                )
    return Targets(tuple(targets), tuple(places), tensors, tuple(_mirrors(skeleton, tensors)))


def _mirrors(skeleton: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[TargetPlace]:
    """Find the places that view a whole target in the order of its memory, without being a parameter themselves."""
    owners = {whole_view_key(tensor): path for path, tensor in tensors.items() if tensor.numel()}
    for module_path, module in skeleton.named_modules():
        for name, tensor in unregistered_tensors(module):
            target = owners.get(whole_view_key(tensor))
            if target is not None and is_dense(tensor):
                yield TargetPlace(module_path, name, target)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield (name, tensor, is a buffer) of the module's own parameters and persistent buffers."""
    for name, param in module._parameters.items():
        if param is not None:
            yield name, param, False
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer, True


def live_storages(model: nn.Module) -> frozenset[int]:
    """List the addresses of all storages that a live model's parameters and buffers use."""
    found = (*model.parameters(), *model.buffers())
    return frozenset(t.untyped_storage().data_ptr() for t in found if t.device.type != "meta")


def _split(path: str) -> tuple[str, str]:
    module, _, name = path.rpartition(".")
    return module, name
