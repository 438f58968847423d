"""Sort out sent names for which an engine has no place: what stands in its module tree where they would go?

A checkpoint's names and an engine's paths may differ by a prefix (`model.visual` and `visual`): a name denotes a path
when they are equal but for that. Whether such a tensor may be left unused is decided by the coordinator
(`bridge.coordinator.unused_tensors`), which knows all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch
from torch import nn

Segments = tuple[str, ...]


@dataclass(frozen=True)
class Unplaced:
    """Lists what a rank has in its module tree where names without a place would go.

    Attributes:
        placeholders: the names at whose path a module stands that holds nothing and cannot be called.
        partners: the names of a tensor which the engine ties to one that another sent name fills -> that name.
    """

    placeholders: tuple[str, ...] = ()
    partners: Mapping[str, str] = field(default_factory=dict)


def find_unplaced(
    names: Sequence[str],
    skeleton: nn.Module,
    targets: Mapping[str, torch.Tensor],
    filled: Mapping[str, str],
    used: AbstractSet[str],
) -> Unplaced:
    """Find what stands in the skeleton where these names would go. Called once per plan, if there are such names.

    Args:
        targets: target path -> its tensor in the skeleton.
        filled: target path -> the sent tensor that fills it, where it is one alone.
        used: the sent tensors that have a place: no module that holds one of them goes where a placeholder stands.
    """
    occupied = {segments[:depth] for segments in map(_split, used) for depth in range(1, len(segments))}
    places = {_split(path): target for path, target in target_paths(skeleton, targets).items()}
    index, empty = _PathIndex(places), _PathIndex(_placeholders(skeleton))
    partners: dict[str, str] = {}
    for name in names:
        found = {filled[places[path]]: path for path in index.denoted(_split(name)) if places[path] in filled}
        for partner, path in found.items():
            # where the partner denotes the same path, this name is its double in another namespace, and no tie
            if len(found) == 1 and path not in index.denoted(_split(partner)):
                partners[name] = partner
    placeholders = tuple(n for n in names if n not in partners and _has_placeholder(n, empty, occupied))
    return Unplaced(placeholders, partners)


class _PathIndex:
    """Paths by their last segments."""

    def __init__(self, paths: Iterable[Segments]) -> None:
        self._whole = set(paths)
        self._ends: dict[Segments, list[Segments]] = {}
        for path in self._whole:
            for start in range(len(path)):
                self._ends.setdefault(path[start:], []).append(path)

    def denoted(self, name: Segments, least: int = 2) -> list[Segments]:
        """List the paths that a name denotes: itself, else those that end with it or with which it ends, if they have
        `least` segments in common."""
        if name in self._whole:
            return [name]
        found = list(self._ends.get(name, ())) if len(name) >= least else []
        return found + [name[k:] for k in range(1, len(name) - least + 1) if name[k:] in self._whole]


def _split(name: str) -> Segments:
    return tuple(name.split("."))


def target_paths(skeleton: nn.Module, targets: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Map every path of a tensor in the skeleton, those of shared modules too, to its target."""
    known = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape): path for path, t in targets.items()}
    found: dict[str, str] = {}
    for path, module in skeleton.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                target = known.get((tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape))
                if target is not None:
                    found[f"{path}.{name}" if path else name] = target
    return found


def _placeholders(skeleton: nn.Module) -> Iterable[Segments]:
    """List the paths of modules that hold no tensor and cannot be called, so that no answer depends on them. Identity
    is none: it stands where a layer was switched off, and passes on what that layer would have changed. Nor is an empty
    list of layers: the model goes through as many of them as there are."""
    for path, module in skeleton.named_modules(remove_duplicate=False):
        held = module._parameters or module._buffers or module._modules or isinstance(module, Iterable)
        if path and not held and type(module).forward is nn.Module.forward:
            yield _split(path)


def _has_placeholder(name: str, placeholders: _PathIndex, occupied: AbstractSet[Segments]) -> bool:
    segments = _split(name)
    above = (segments[:depth] for depth in range(1, len(segments)))
    return any(path not in occupied and placeholders.denoted(path, least=1) for path in above)
