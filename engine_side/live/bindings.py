"""Watch what a plan is bound to in the live tree: that its modules and tensors still hang and lie where they did, and
that no fact about a tensor has changed. Asked before every load and by every check.

`AttributeSnapshot` holds the facts that the attributes level compares: object, address, strides, dtype, shape, class,
attributes and aliases of every parameter.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from types import MethodType

import torch
from torch import nn

from engine_side.live.inplace import TensorRegistry, find_registry

_MOVED = frozenset({"address", "shape", "stride", "dtype"})
"""Facts that a swapped storage explains; nothing explains the others."""


@dataclass(frozen=True)
class Replaced:
    """A place of the live tree that has another module than when the plan was made, or none."""

    path: str
    before: nn.Module
    after: nn.Module | None

    @property
    def expected(self) -> str:
        return f"{type(self.before).__name__} at {id(self.before):#x}, which the plan writes to"

    @property
    def got(self) -> str:
        if self.after is None:
            return "no module"
        return f"{type(self.after).__name__} at {id(self.after):#x}, which no plan knows"


class BoundModules:
    """The links from a live root to every module of `bound`, by all paths. Walks the tree once, then compares objects.

    Holds the modules, so that their ids stay unique.
    """

    def __init__(self, root: nn.Module, bound: Iterable[nn.Module]) -> None:
        self._bound = {id(module): module for module in bound}
        self._walk(root)

    def _walk(self, root: nn.Module) -> None:
        self._root = root
        self._places: list[tuple[dict[str, nn.Module | None], str]] = []
        self._children: list[nn.Module] = []
        self._paths: list[str] = []
        self._leads: dict[int, bool] = {}
        self._follow(root, "")

    def _follow(self, module: nn.Module, path: str) -> bool:
        """Note the links below `module`; True when it is bound or one of them leads to a bound module."""
        known = self._leads.get(id(module))
        if known is not None:
            return known
        leads = self._leads[id(module)] = id(module) in self._bound
        for name, child in module._modules.items():
            below = f"{path}.{name}" if path else name
            if child is not None and self._follow(child, below):
                leads = True
                self._places.append((module._modules, name))
                self._children.append(child)
                self._paths.append(below)
        self._leads[id(module)] = leads
        return leads

    def replaced(self, root: nn.Module) -> list[Replaced]:
        """List the modules that no longer hang where they did, `root` itself included. About 60 ns per link.

        A module that was wrapped still hangs below its wrapper and is not listed.
        """
        now = [children.get(name) for children, name in self._places]
        if root is self._root and all(map(is_, now, self._children)):
            return []
        places = [("", self._root, root), *zip(self._paths, self._children, now, strict=True)]
        found = [
            Replaced(path, before, after)
            for path, before, after in places
            if after is not before and (after is None or all(module is not before for module in after.modules()))
        ]
        if not found:
            self._walk(root)
        return found

    def below(self, replaced: Iterable[Replaced]) -> set[int]:
        """Collect the ids of the bound modules that hang, or hung, below the replaced ones."""
        return {id(m) for each in replaced for m in each.before.modules() if id(m) in self._bound}


class BoundTensors:
    """Live tensors with the registries in which they hang and the addresses at which they lie.

    Args:
        places: (path, registry, name in it) of each tensor.
        absent: (module, name) of tensors that were looked for and hang nowhere.
    """

    def __init__(
        self, places: Sequence[tuple[str, TensorRegistry, str]], absent: Sequence[tuple[nn.Module, str]] = ()
    ) -> None:
        self.places = places
        self._absent = absent
        self.tensors: list[torch.Tensor] = [registry[name] for _, registry, name in places]
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]

    def in_place(self) -> bool:
        """True while every tensor is the same object in the same registry at the same address, and what was absent
        still is. About 0.4 us each."""
        now = [registry.get(name) for _, registry, name in self.places]
        if not all(map(is_, now, self.tensors)) or [t.data_ptr() for t in self.tensors] != self.addresses:
            return False
        return not any(find_registry(module, name) for module, name in self._absent)

    def swapped(self) -> list[str]:
        """Paths of the tensors that are the same objects, with their storage elsewhere."""
        rows = zip(self.places, self.tensors, self.addresses, strict=True)
        return [p for (p, registry, name), t, at in rows if registry.get(name) is t and t.data_ptr() != at]


@dataclass(frozen=True)
class Difference:
    """One fact about the tensor at `path` that is not what it was."""

    path: str
    what: str
    before: str
    after: str


class AttributeSnapshot:
    """Facts about every parameter and buffer under a module, by path. Holds references, so ids stay unique.

    Walks `root` once, at about 10 us per tensor; taken when a plan is compiled.

    Args:
        root: the live model.
        modules: ids of modules; restricts the entries to the tensors that hang on these, under all their paths.
    """

    def __init__(self, root: nn.Module, modules: Container[int] | None = None) -> None:
        self._root, self._modules = root, modules
        found = [
            (f"{prefix}.{name}" if prefix else name, kind, registry, name, id(module))
            for prefix, module in root.named_modules(remove_duplicate=False)
            for kind, registry in (("parameter", module._parameters), ("buffer", module._buffers))
            for name, tensor in registry.items()
            if tensor is not None
        ]
        aliases: dict[int, list[str]] = {}
        for path, _, registry, name, _ in found:
            aliases.setdefault(id(registry[name]), []).append(path)
        if modules is not None:
            ours = {id(registry[name]) for _, _, registry, name, owner in found if owner in modules}
            found = [entry for entry in found if id(entry[2][entry[3]]) in ours]
        self.bound = BoundTensors([(path, registry, name) for path, _, registry, name, _ in found])
        self._views = [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in self.bound.tensors]
        self._attributes = [dict(tensor.__dict__) for tensor in self.bound.tensors]
        self.entries = {
            path: {"kind": kind, **_facts(tensor), "aliases": ", ".join(aliases[id(tensor)])}
            for (path, kind, *_), tensor in zip(found, self.bound.tensors, strict=True)
        }

    def unchanged(self) -> bool:
        """True while every entry is what it was, at about 1 us each. Does not see entries that were added."""
        tensors = self.bound.tensors
        if not self.bound.in_place() or [(t.dtype, t.shape, t.stride()) for t in tensors] != self._views:
            return False
        for tensor, attributes in zip(tensors, self._attributes, strict=True):
            now = tensor.__dict__
            if len(now) != len(attributes) or not all(map(is_, now.values(), attributes.values())):
                return False
        return True

    def put_back(self) -> None:
        """Put former objects back in their places, with their former attributes: undoes a load that lost some.

        Storage that was swapped under an object stays; values are undefined until the next load.
        """
        for (_, registry, name), tensor, attributes in zip(
            self.bound.places, self.bound.tensors, self._attributes, strict=True
        ):
            registry[name] = tensor
            tensor.__dict__.clear()
            tensor.__dict__.update(attributes)

    def retake(self) -> AttributeSnapshot:
        """Look at the same module again."""
        return AttributeSnapshot(self._root, self._modules)


def diff(before: AttributeSnapshot, after: AttributeSnapshot, allowed: Iterable[str] = ()) -> list[Difference]:
    """List what changed between two snapshots. Moved storage is no difference for the paths in `allowed`."""
    moved, out = set(allowed), list[Difference]()
    for path, old in before.entries.items():
        new = after.entries.get(path)
        if new is None:
            out.append(Difference(path, "presence", f"{old['class']} {old['shape']}", "gone"))
            continue
        for what in dict.fromkeys((*old, *new)):
            a, b = old.get(what, "absent"), new.get(what, "absent")
            if a != b and not (path in moved and what in _MOVED):
                out.append(Difference(path, what, a, b))
    for path in after.entries.keys() - before.entries.keys():
        out.append(Difference(path, "presence", "absent", f"appeared as {after.entries[path]['class']}"))
    return out


def _facts(tensor: torch.Tensor) -> dict[str, str]:
    """Describe everything about a parameter or buffer that a sync must not change, by name of the fact."""
    return {
        "object_id": hex(id(tensor)),
        "address": hex(tensor.data_ptr()),
        "shape": str(tuple(tensor.shape)),
        "stride": str(tensor.stride()),
        "dtype": str(tensor.dtype),
        "class": f"{type(tensor).__module__}.{type(tensor).__qualname__}",
        "requires_grad": str(tensor.requires_grad),
        **{f"attribute {key}": _identity(item) for key, item in sorted(tensor.__dict__.items())},
    }


def _identity(item: object) -> str:
    """A text that is equal exactly when the attribute is the same object, or the same plain value."""
    if isinstance(item, MethodType):
        return f"{item.__func__.__qualname__} of {type(item.__self__).__name__} at {id(item.__self__):#x}"
    if item is None or isinstance(item, (bool, int, float, str, torch.dtype)):
        return repr(item)
    return f"{type(item).__name__} at {id(item):#x}"
