"""Make twins: modules of a fresh skeleton, given memory, so that experiments and rebuilds spare the live engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from engine_side.live.inplace import reflect, twin_parameter
from engine_side.live.storage_layout import ViewKey, whole_view_key
from engine_side.plan.clusters import Cluster
from engine_side.plan.experiment_errors import experiment_step
from engine_side.plan.post_load import INTERNAL, ModuleState, reachable, require_tensor
from engine_side.protocol import RankHost

_REGISTRIES = ("_parameters", "_buffers", "_modules")


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
    module.__dict__.update({n: reflect(v, swap) for n, v in module.__dict__.items() if n not in INTERNAL})


def _take_memory(like: torch.Tensor, device: torch.device, spare: Spare) -> torch.Tensor:
    old = spare.get((like.shape, like.stride(), like.dtype, device))
    return old.pop() if old else torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


def device_of(module: nn.Module) -> torch.device:
    """Find the device of a live module's tensors; cpu for a module that has none left."""
    tensors = (*module._parameters.values(), *module._buffers.values(), *module.parameters())
    return next((t.device for t in tensors if t is not None and t.device.type != "meta"), torch.device("cpu"))
