"""Make twins: modules of a fresh skeleton, given memory, so that experiments and rebuilds spare the live engine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any
from weakref import ReferenceType

import torch
from torch import nn

from bridge.errors import REPORT, ConfigError
from bridge.model.same_bits import same_bits
from engine_side.live.inplace import (
    Outcome,
    copy_or_rebind_param,
    find_tensor,
    reflect,
    twin_parameter,
    unregistered_tensors,
)
from engine_side.live.storage_layout import ViewKey, whole_view_key
from engine_side.plan.experiment_errors import experiment_step
from engine_side.protocol import RankHost

_INTERNAL = frozenset(nn.Module().__dict__)
"""Attributes of every module: its registries, its hooks and `training`. Nothing writes these on a live module."""
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_DEPTH = 4
"""Levels of objects, containers and closures that `reachable` looks into."""


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


@dataclass
class Twin:
    """The modules of one cluster, with memory of their own; `before` is their state before post-load."""

    cluster: Cluster
    skeleton: nn.Module
    modules: list[nn.Module]
    before: list[ModuleState] = field(default_factory=list)
    memory: list[torch.Tensor] = field(default_factory=list)

    def fill(self, values: Sequence[torch.Tensor]) -> None:
        """Put canonical values (one per role) into the modules, as a loader would."""
        for into, value in zip(self.by_role(), values, strict=True):
            into.copy_(value)

    def by_role(self) -> list[torch.Tensor]:
        """List the tensor of every role, in the role's form. Before post-load only."""
        found: dict[int, torch.Tensor] = {}
        for module, names in zip(self.modules, self.cluster.places, strict=True):
            for name, role in names.items():
                if role not in found:
                    found[role] = self.cluster.roles[role].view(require_tensor(module, name).detach())
        return [found[role] for role in range(len(self.cluster.roles))]

    def post_load(self, host: RankHost) -> bool:
        """Run the engine's step on every module, in the skeleton's order; False when none of them has one.

        Raises ConfigError, naming the first module, when the step fails; OutOfMemory.
        """
        self.before = [
            ModuleState.of(module, apart_from=names)
            for module, names in zip(self.modules, self.cluster.places, strict=True)
        ]
        with experiment_step("running post-load on a twin", self.cluster.paths[0], self.cluster.nbytes):
            worked = [host.post_load(module) for module in self.modules]
        return any(worked)

    def made_of_weights(self, k: int) -> dict[str, torch.Tensor]:
        """Collect, after post-load, the tensors of a module that its weights or its post-load step have made, by path.

        What only its constructor made is left out: a live module may have other tensors there, such as the state of a
        recurrent layer, which the engine binds when it starts.
        """
        return {
            path: tensor
            for path, tensor in reachable(self.modules[k])[0].items()
            if path in self.cluster.places[k] or not self.before[k].holds(tensor)
        }


def _shallow_state(module: nn.Module) -> dict[str, Any]:
    """Copy what a module holds, its registries included, one level deep."""
    return {**module.__dict__, **{name: dict(getattr(module, name)) for name in _REGISTRIES}}


class _PooledSkeleton:
    """A skeleton from which twins are taken, each module once, and only as long as it is what the skeleton made it: a
    post-load step may have changed other modules than its own."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._made = {
            path: (module, _shallow_state(module)) for path, module in root.named_modules(remove_duplicate=False)
        }
        self._used: set[str] = set()

    def offers(self, paths: Iterable[str]) -> bool:
        """True when all these modules are unused and as they were made."""
        return all(path not in self._used and self._unchanged(path) for path in paths)

    def _unchanged(self, path: str) -> bool:
        module, made = self._made[path]
        now = _shallow_state(module)
        flat = [(now, made), *((now[name], made[name]) for name in _REGISTRIES)]
        return all(
            one.keys() == other.keys() and all(one[key] is other[key] for key in one if key not in _REGISTRIES)
            for one, other in flat
        )

    def use(self, paths: Iterable[str]) -> list[nn.Module]:
        """Take these modules."""
        self._used.update(paths)
        return [self._made[path][0] for path in paths]

    def unlend(self) -> None:
        """Make used modules what they were, for the post-load steps of others that look at them."""
        for path in self._used:
            module, made = self._made[path]
            module.__dict__.clear()
            module.__dict__.update({**made, **{name: dict(made[name]) for name in _REGISTRIES}})

    @property
    def untouched(self) -> bool:
        """True when every module is as it was made."""
        return all(map(self._unchanged, self._made))


class TwinSource:
    """Hands out twins; asks the host for another skeleton only when all suitable modules of those at hand are used.

    Attributes:
        template: a skeleton from which no twin is taken and which no loader has touched.
        computes_in: the dtype of most of its weights that are not stored as codes.
    """

    def __init__(self, host: RankHost) -> None:
        self.host = host
        self._pool: list[_PooledSkeleton] = []
        self._spare: Spare = {}
        self.template = self.take_skeleton()
        self.computes_in = _dtype_of_most(self.template)

    def take(self, options: Sequence[Cluster], live: Mapping[str, nn.Module]) -> Twin:
        """Make a fresh twin of any one of `options`, which are alike. Raises OutOfMemory.

        Args:
            live: module path -> live module, from which device and derived buffers come.
        """
        free = ((c, skeleton) for skeleton in self._pool for c in options if skeleton.offers(c.paths))
        choice, skeleton = next(free, None) or (options[0], self._grow())
        modules = skeleton.use(choice.paths)
        made: MadeTensors = {}
        memory: list[torch.Tensor] = []
        with experiment_step("building a twin", choice.paths[0], choice.nbytes):
            for path, module in zip(choice.paths, modules, strict=True):
                materialise(module, live[path], made, self._spare, memory)
            for module, names in zip(modules, choice.places, strict=True):
                module.__dict__.update(
                    {n: _view_of_made(module.__dict__[n], made) for n in names if n in module.__dict__}
                )
        return Twin(choice, skeleton.root, modules, memory=memory)

    def _grow(self) -> _PooledSkeleton:
        with experiment_step("building a skeleton", type(self.host.model).__name__):
            self._pool.append(_PooledSkeleton(self.host.skeleton()))
        return self._pool[-1]

    def retire(self, twin: Twin) -> None:
        """Hand the memory of a twin that is no longer used to the next ones, which spares them fresh pages."""
        for data in twin.memory:
            self._spare.setdefault((data.shape, data.stride(), data.dtype, data.device), []).append(data)
        twin.memory = []

    def take_skeleton(self) -> nn.Module:
        """Hand out a whole skeleton, as it was made; no twin will be taken from it."""
        found = next((each for each in self._pool if each.untouched), None) or self._grow()
        self._pool.remove(found)
        return found.root

    def release(self) -> None:
        """Let the memory of used twins go, nothing of which was grafted. Their modules are then as the skeleton had
        them, for the post-load steps of others that look at them; they are not taken again, since their own steps may
        have left a mark elsewhere."""
        for skeleton in self._pool:
            skeleton.unlend()
        self._spare.clear()

    def forget(self) -> None:
        """Let used twins go as they are, and all skeletons: the next twin is taken from a fresh one."""
        self._pool.clear()
        self._spare.clear()


def _dtype_of_most(model: nn.Module) -> torch.dtype:
    count: Counter[torch.dtype] = Counter({torch.float32: 0})
    for tensor in model.parameters():
        if tensor.is_floating_point() and tensor.element_size() > 1:
            count[tensor.dtype] += tensor.numel()
    return count.most_common(1)[0][0]


MemoryFormat = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
Spare = dict[MemoryFormat, list[torch.Tensor]]
"""Memory by what it can be: shape, strides, dtype, device."""
MadeTensors = dict[ViewKey, torch.Tensor]
"""Tensors of a twin by the meta tensor that each stands for: its `whole_view_key`."""


def _view_of_made(tensor: torch.Tensor, made: MadeTensors) -> torch.Tensor:
    """View the made memory that `tensor`, on meta, is a view of; `tensor` itself where none was made."""
    found = made.get(whole_view_key(tensor)) if tensor.device.type == "meta" else None
    if found is None:
        return tensor
    return twin_parameter(tensor, found.detach().as_strided(tensor.shape, tensor.stride(), found.storage_offset()))


def materialise(
    module: nn.Module,
    live: nn.Module,
    made: MadeTensors,
    spare: Spare,
    memory: list[torch.Tensor],
) -> None:
    """Give a meta module's own parameters and buffers memory on the live module's device.

    Class, attributes, ties and views of one another are kept. Non-persistent buffers take the live values: no
    checkpoint holds them.

    Args:
        made: tensors made so far: ties among several modules.
        spare: memory to use where it fits.
        memory: receives all memory that is used.
    """
    device = device_of(live)
    swap: dict[int, torch.Tensor] = {}
    for registry in (module._parameters, module._buffers):
        for name, tensor in list(registry.items()):
            if tensor is None or tensor.device.type != "meta":
                continue
            key = whole_view_key(tensor)
            found = made.get(key) if tensor.numel() else None
            if found is None:
                data = _take_memory(tensor, device, spare)
                memory.append(data)
                known = live._buffers.get(name) if name in module._non_persistent_buffers_set else None
                if known is not None and known.shape == data.shape:
                    data.copy_(known)
                found = made[key] = twin_parameter(tensor, data)
            elif found.shape != tensor.shape or found.stride() != tensor.stride():
                found = _view_of_made(tensor, made)
            registry[name] = swap[id(tensor)] = found  # type: ignore[assignment]
    module.__dict__.update({n: reflect(v, swap) for n, v in module.__dict__.items() if n not in _INTERNAL})


def _take_memory(like: torch.Tensor, device: torch.device, spare: Spare) -> torch.Tensor:
    old = spare.get((like.shape, like.stride(), like.dtype, device))
    return old.pop() if old else torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


def device_of(module: nn.Module) -> torch.device:
    """Find the device of a live module's tensors; cpu for a module that has none left."""
    tensors = (*module._parameters.values(), *module._buffers.values(), *module.parameters())
    return next((t.device for t in tensors if t is not None and t.device.type != "meta"), torch.device("cpu"))


def require_tensor(module: nn.Module, name: str) -> torch.Tensor:
    """Find a tensor as `find_tensor` does. Raises ConfigError when the module has no such tensor."""
    found = find_tensor(module, name)
    if found is None:
        raise ConfigError(
            "a module lost a parameter",
            where=f"{type(module).__name__}.{name}",
            expected="the parameters that post-load left",
            got="none of this name",
            remedy=REPORT,
        )
    return found


# ---- post-load state ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleState:
    """What a module holds outside its parameters and persistent buffers.

    Attributes:
        entries: attributes outside the registries: (owner attribute or "", name) -> value, one object deep.
        tensors: id of each tensor that was reached there and is no weight -> the tensor, and a copy of its values.
    """

    entries: Mapping[tuple[str, str], Any]
    tensors: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, *, apart_from: Container[str] | None = None) -> ModuleState:
        """Look at a module.

        Args:
            apart_from: names of the weights of a twin. None, for a live module, leaves `tensors` empty: what such a
                module reaches may be a whole KV cache.
        """
        entries: dict[tuple[str, str], Any] = {}
        for name, value in module.__dict__.items():
            if name in _INTERNAL:
                continue
            entries["", name] = value
            foreign = (nn.Module, torch.Tensor, type, FunctionType, MethodType, partial)
            if hasattr(value, "__dict__") and not isinstance(value, foreign):
                entries.update({(name, key): item for key, item in vars(value).items()})
        if apart_from is None:
            return cls(entries)
        found = [tensor for path, tensor in reachable(module)[0].items() if path not in apart_from]
        return cls(entries, {id(tensor): (tensor, tensor.detach().clone()) for tensor in found})

    def holds(self, tensor: torch.Tensor) -> bool:
        """True for a tensor that was there already, with the values that it has now."""
        found = self.tensors.get(id(tensor))
        return found is not None and (tensor.device.type == "meta" or same_bits(tensor.detach(), found[1]))


def redo(
    host: RankHost, module: nn.Module, template: nn.Module, values: Mapping[str, torch.Tensor], *, swap: bool = False
) -> dict[str, Outcome]:
    """Run a module's post-load again on canonical values, and bring the results into the storages that were there; with
    `swap`, leave them where the step put them.

    A value that already *is* the module's storage is left where it is. Returns the outcome by name. When the step
    raises, the former objects are back in place, with undefined values.
    """
    former = {name: tensor for registry in (module._parameters, module._buffers) for name, tensor in registry.items()}
    mirrors = dict(unregistered_tensors(template))
    try:
        for name, value in values.items():
            now = find_tensor(module, name)
            if name in mirrors and now is not None:
                now.detach().copy_(value.as_strided(now.shape, now.stride(), value.storage_offset()))
            elif now is None or now.data_ptr() != value.data_ptr() or now.shape != value.shape:
                _register(module, name, twin_parameter(require_tensor(template, name), value, (template, module)))
        host.post_load(module)
    except BaseException:
        for name, tensor in former.items():
            _register(module, name, tensor)
        raise
    outcomes: dict[str, Outcome] = {}
    for name, old in former.items():
        new = find_tensor(module, name)
        if new is None or new is old:
            continue
        if old is not None:
            _register(module, name, old)
            outcomes[name] = copy_or_rebind_param(module, name, new, swap=swap)
        else:
            outcomes[name] = Outcome.CREATED
    added = {name for registry in (module._parameters, module._buffers) for name in registry} - former.keys()
    return outcomes | dict.fromkeys(added, Outcome.CREATED)


def _register(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
    registry = module._buffers if name in module._buffers else module._parameters
    module.__dict__.pop(name, None)
    registry[name] = tensor  # type: ignore[assignment]


def graft(twin: nn.Module, before: ModuleState, live: nn.Module, weights: Container[str]) -> dict[str, Outcome]:
    """Bring the weights of a twin, and everything that post-load changed on it, over to the live module.

    Parameters are copied or rebound; other state goes by reference, tensors in it by copy where one of that shape is
    there. What is no weight and post-load left alone stays as it is on the live module: it may be the state of running
    requests. Returns the outcome by parameter. Raises ConfigError when the live module keeps that state in an object of
    another class.

    Args:
        weights: names under which the module holds canonical tensors.
    """
    outcomes: dict[str, Outcome] = {}
    for registry in (twin._parameters, twin._buffers):
        for name, tensor in registry.items():
            if tensor is not None and (name in weights or not before.holds(tensor)):
                outcomes[name] = copy_or_rebind_param(live, name, tensor, like=tensor)
    after = ModuleState.of(twin).entries
    for owner, name in before.entries.keys() - after.keys():
        _dict_of(live, twin, owner).pop(name, None)
    for (owner, name), value in after.items():
        fresh = (owner, name) not in before.entries or before.entries[owner, name] is not value
        if owner and after["", owner] is not before.entries.get(("", owner)):
            continue  # came over as a whole object
        if not fresh and isinstance(value, torch.Tensor) and name not in weights and before.holds(value):
            continue
        into = _dict_of(live, twin, owner)
        there = into.get(name)
        forms = [(t.shape, t.dtype, t.device) for t in (value, there) if isinstance(t, torch.Tensor)]
        if there is not None and len(forms) == 2 and forms[0] == forms[1]:
            there.detach().copy_(value.detach())
        elif fresh:
            into[name] = value
    return outcomes


def _dict_of(live: nn.Module, twin: nn.Module, owner: str) -> dict[str, Any]:
    if not owner:
        return live.__dict__
    ours, theirs = live.__dict__.get(owner), twin.__dict__.get(owner)
    if type(ours) is not type(theirs):
        raise ConfigError(
            "post-load state cannot be brought to the live module",
            where=f"{type(live).__name__}.{owner}",
            expected=type(theirs).__name__,
            got=type(ours).__name__,
            remedy="attach an engine that was started with the configuration of its skeleton",
        )
    return vars(ours)


def reachable(module: nn.Module) -> tuple[dict[str, torch.Tensor], bool]:
    """Collect the tensors that a module's own state holds, closures included, to compare modules that cannot be called.

    Returns (path -> tensor, whether something could not be looked into).
    """
    found: dict[str, torch.Tensor] = {}
    opaque = False
    seen: set[int] = {id(module)}
    roots: list[tuple[str, object, int]] = [
        (name, t, 0) for name, t in (*module._parameters.items(), *module._buffers.items())
    ]
    roots += [(name, value, 0) for name, value in module.__dict__.items() if name not in _INTERNAL]
    while roots:
        path, value, depth = roots.pop()
        if value is None or isinstance(value, (str, bytes, int, float, complex, type, torch.dtype, torch.device)):
            continue
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif id(value) not in seen and not isinstance(value, nn.Module):
            seen.add(id(value))
            inside = list(_inside(value))
            opaque |= not inside and not _is_empty(value)
            if depth < _DEPTH:
                roots += [(f"{path}.{name}", item, depth + 1) for name, item in inside]
    return found, opaque


def _inside(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, FunctionType):
        for k, cell in enumerate(value.__closure__ or ()):
            try:
                yield f"closure{k}", cell.cell_contents
            except ValueError:
                continue  # a cell that was never filled
        for k, item in enumerate(value.__defaults__ or ()):
            yield f"default{k}", item
    elif isinstance(value, MethodType):
        yield "self", value.__self__
    elif isinstance(value, ReferenceType):
        yield "referent", value()
    elif isinstance(value, partial):
        yield "func", value.func
        yield from ((f"arg{k}", item) for k, item in enumerate(value.args))
        yield from value.keywords.items()
    elif isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((str(k), item) for k, item in enumerate(value))
    elif hasattr(value, "__dict__"):
        yield from vars(value).items()


def _is_empty(value: object) -> bool:
    """True when an object has nothing inside because it is empty, not because it cannot be looked into."""
    transparent = (FunctionType, MethodType, partial, Mapping, list, tuple, set, frozenset)
    return isinstance(value, transparent) or hasattr(value, "__dict__") or type(value).__module__ == "builtins"
