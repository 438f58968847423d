"""Group the modules of a plan: what shares storage is a cluster; of clusters that are alike one is tried for all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bridge.model.regions import Move
from engine_side.plan.bake import Baked
from engine_side.plan.post_load import require_tensor
from engine_side.plan.targets import TargetPlace


@dataclass(frozen=True)
class Role:
    """The form of one canonical tensor of a cluster."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """View in this form a tensor that holds the same elements in the same order of memory."""
        if tuple(tensor.shape) == self.shape and tensor.stride() == self.strides:
            return tensor
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset())


@dataclass(frozen=True)
class Cluster:
    """Modules that share storage (mostly one), which experiments treat together.

    Attributes:
        paths: paths of the modules.
        targets, roles: the plan's target of each canonical tensor, and its form.
        places: for each module, attribute name -> index of its canonical tensor in `roles`.
    """

    paths: tuple[str, ...]
    targets: tuple[str, ...]
    roles: tuple[Role, ...]
    places: tuple[Mapping[str, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical tensors."""
        return sum(math.prod(role.shape) * role.dtype.itemsize for role in self.roles)


def find_groups(template: nn.Module, baked: Baked) -> list[list[Cluster]]:
    """Group clusters that are alike in everything an experiment could see; one of them is tried for all."""
    moves: dict[str, list[Move]] = {}
    for move in baked.plan.moves:
        moves.setdefault(move.target, []).append(move)
    groups: dict[object, list[Cluster]] = {}
    for cluster in _clusters(template, baked):
        plan = tuple((m.source, m.dest) for target in cluster.targets for m in moves.get(target, ()))
        shape = tuple(tuple(sorted(names.items())) for names in cluster.places)
        marks = tuple(_marks(template.get_submodule(path)) for path in cluster.paths)
        computed = tuple(target in baked.plan.computed for target in cluster.targets)
        groups.setdefault((cluster.roles, shape, plan, marks, computed), []).append(cluster)
    return list(groups.values())


def _clusters(template: nn.Module, baked: Baked) -> list[Cluster]:
    """Group the modules of the plan that hold the same target, in the skeleton's order."""
    wanted = {t.path for t in baked.plan.targets}
    modules = {
        path: places
        for path, places in baked.targets.of_module(mirrors=True).items()
        if any(place.target in wanted for place in places)
    }
    groups: dict[str, list[str]] = {}
    holder: dict[str, str] = {}
    for path, places in modules.items():
        group = groups[path] = [path]
        for place in places:
            other = groups[holder.setdefault(place.target, path)]
            if other is not group:
                group.extend(other)
                groups.update(dict.fromkeys(other, group))
    order = {path: k for k, path in enumerate(modules)}
    distinct = {id(group): sorted(group, key=order.__getitem__) for group in groups.values()}
    return [_cluster(template, tuple(paths), modules) for paths in sorted(distinct.values(), key=lambda g: order[g[0]])]


def _cluster(template: nn.Module, paths: tuple[str, ...], modules: Mapping[str, Sequence[TargetPlace]]) -> Cluster:
    # forms are the template's: a loader that rebinds parameters has changed those of the skeleton that it filled
    targets: dict[str, int] = {}
    roles: list[Role] = []
    places: list[dict[str, int]] = []
    for path in paths:
        places.append({})
        for place in modules[path]:
            if place.target not in targets:
                owner, _, name = place.target.rpartition(".")  # a mirror may have another form
                tensor = require_tensor(template.get_submodule(owner), name)
                targets[place.target] = len(roles)
                roles.append(Role(tuple(tensor.shape), tensor.stride(), tensor.dtype))
            places[-1][place.name] = targets[place.target]
    return Cluster(paths, tuple(targets), tuple(roles), tuple(places))


def _marks(module: nn.Module) -> object:
    """Collect class, flags and numbers of a module and of the objects in its attributes. Strings only name places."""
    owners: list[tuple[str, object]] = [("", module)]
    for name, value in module.__dict__.items():
        if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, torch.Tensor, type)):
            owners.append((name, value))
    plain = (bool, int, float, torch.dtype, type(None))
    return frozenset(
        (owner, type(holder), name, type(value), value)
        for owner, holder in owners
        for name, value in (("", None), *vars(holder).items())
        if isinstance(value, plain)
    )
