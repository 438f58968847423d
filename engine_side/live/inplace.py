"""Put a new value under a live parameter without losing its attributes, and prove afterwards that nothing was lost.

`copy_or_rebind_param` is the one place where live storage is swapped. `AttributeSnapshot` holds the facts that the
attributes level compares: object, address, strides, dtype, shape, class, attributes and aliases of every parameter.
"""

from __future__ import annotations

import enum
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from types import MethodType
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn

from bridge.errors import ConfigError

SHARDING_ATTRIBUTES = ("input_dim", "output_dim")
"""Names that engines give to the dimension along which a parameter is cut; a transpose swaps them."""


TensorRegistry = dict[str, Any]
"""The dictionary of a module in which a tensor hangs: parameters, buffers or plain attributes."""


class Outcome(enum.Enum):
    """The branch that `copy_or_rebind_param` took."""

    COPIED = "copied"
    REBOUND = "rebound"
    CREATED = "created"


def copy_or_rebind_param(
    module: nn.Module, name: str, value: torch.Tensor, *, like: torch.Tensor | None = None
) -> Outcome:
    """Make `module.name` hold `value`, touching as little as possible. Blocks; no collective.

    Same shape, dtype and device: the value is copied into the live storage (COPIED), also when it is a view of that
    very storage. Otherwise the storage is swapped under the same object (REBOUND). A name that is absent, or registered
    as None, becomes a Parameter (CREATED) with the class, attributes and `requires_grad` of `like`. A buffer stays a
    buffer, a plain tensor attribute stays one. Sharding attributes follow when the value is the transpose of what was
    there.

    Called by the loader after an engine's own post-load step. Raises ConfigError when the storage cannot be swapped.
    """
    new = value.detach()
    old = find_tensor(module, name)
    if old is None:
        if like is not None and not isinstance(like, nn.Parameter):
            module.register_buffer(name, twin_parameter(like, new))
            return Outcome.CREATED
        module.__dict__.pop(name, None)  # register_parameter refuses a name that is an attribute
        made = nn.Parameter(new, requires_grad=False) if like is None else twin_parameter(like, new)
        module._parameters[name] = made  # type: ignore[assignment]
        return Outcome.CREATED
    swapped = _transposed_dims(old, new)
    if old.shape == new.shape and old.dtype == new.dtype and old.device == new.device:
        live = old.detach()
        shared = live.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
        if not shared or live.data_ptr() != new.data_ptr() or live.stride() != new.stride():
            live.copy_(new.clone() if shared else new)  # a view of itself would be read while it is written
        outcome = Outcome.COPIED
    else:
        _swap_storage(old, new, f"{type(module).__name__}.{name}")
        outcome = Outcome.REBOUND
    if swapped is not None:
        _follow_transpose(old, *swapped)
    return outcome


def find_registry(module: nn.Module, name: str) -> TensorRegistry | None:
    """Find the dictionary in which a tensor of that name hangs: parameters, buffers or plain attributes."""
    for registry in (module._parameters, module._buffers, module.__dict__):
        if isinstance(registry.get(name), torch.Tensor):
            return registry
    return None


def find_tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    """Find the parameter, buffer or plain tensor attribute of that name."""
    registry = find_registry(module, name)
    return None if registry is None else registry[name]


def twin_parameter(
    like: torch.Tensor, data: torch.Tensor, owner: tuple[nn.Module, nn.Module] | None = None
) -> torch.Tensor:
    """Make a tensor with the memory of `data` and the class, attributes and `requires_grad` of `like`.

    Args:
        owner: (from, to); attributes that are bound methods of the first module become methods of the second. A
            `weight_loader` must act on the module on which its parameter hangs.
    """
    if type(like) is torch.Tensor:
        made = data.detach()
    else:
        grad = like.requires_grad and (data.is_floating_point() or data.is_complex())
        made = torch.Tensor._make_subclass(type(like), data.detach(), grad)
    for key, item in like.__dict__.items():
        if owner is not None and isinstance(item, MethodType) and item.__self__ is owner[0]:
            item = MethodType(item.__func__, owner[1])
        made.__dict__[key] = item
    return made


def reflect(value: object, swap: Mapping[int, torch.Tensor], depth: int = 4) -> object:
    """Exchange the tensors in an attribute of a copied module for the copy's own; the value itself when there are none.

    Looks into plain containers and weak references: a recurrent layer keeps its parameters in a list too.

    Args:
        swap: id of a tensor -> the tensor that takes its place.
        depth: how many levels of containers are searched.
    """
    if isinstance(value, torch.Tensor):
        return swap.get(id(value), value)
    if type(value) is ReferenceType:
        made = swap.get(id(value()))
        return value if made is None else ref(made)
    if not depth:
        return value
    if type(value) is dict:
        items = {key: reflect(item, swap, depth - 1) for key, item in value.items()}
        return items if any(items[key] is not item for key, item in value.items()) else value
    if type(value) in (list, tuple):
        listed = [reflect(item, swap, depth - 1) for item in value]  # type: ignore[attr-defined]
        same = all(a is b for a, b in zip(listed, value, strict=True))  # type: ignore[call-overload]
        return value if same else type(value)(listed)  # type: ignore[call-arg]
    return value


def _swap_storage(old: torch.Tensor, new: torch.Tensor, where: str) -> None:
    """Put the storage of `new` under the object `old`."""
    try:
        old.data = new
    except (RuntimeError, TypeError):
        # another device or layout: `.data =` refuses, exchanging the implementations under the object does not
        try:
            torch.utils.swap_tensors(old, twin_parameter(old, new))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ConfigError(
                "the storage of a live parameter cannot be swapped",
                where=where,
                expected=f"{old.dtype} {tuple(old.shape)} on {old.device}",
                got=f"{new.dtype} {tuple(new.shape)} on {new.device}: {error}",
                remedy="drop other references to this parameter, or keep its device",
            ) from error


def _transposed_dims(old: torch.Tensor, new: torch.Tensor) -> tuple[int, int] | None:
    """Find the two dimensions that changed places between `old` and `new`."""
    if old.dim() != new.dim() or old.dim() < 2:
        return None
    pairs = [(i, j) for j in range(old.dim()) for i in range(j)]
    for i, j in sorted(pairs, reverse=True):
        if new.shape != old.transpose(i, j).shape:
            continue
        if new.shape != old.shape:
            return i, j
        aliased = old.numel() > 0 and new.data_ptr() == old.data_ptr()
        if aliased and new.stride() != old.stride() and new.stride() == old.transpose(i, j).stride():
            return i, j
    return None


def _follow_transpose(param: torch.Tensor, i: int, j: int) -> None:
    """Let sharding attributes point to the dimensions that they meant before `i` and `j` changed places."""
    turn = {i: j, j: i}
    for name in SHARDING_ATTRIBUTES:
        # some engines keep the value behind a read-only property
        for key in (name, f"_{name}"):
            dim = param.__dict__.get(key)
            if isinstance(dim, int) and not isinstance(dim, bool):
                at = dim % param.dim()
                param.__dict__[key] = turn.get(at, at)


# ---- attribute snapshot --------------------------------------------------------------------------------------------

_MOVED = frozenset({"address", "shape", "stride", "dtype"})
"""Facts that a swapped storage explains; nothing explains the others."""


@dataclass(frozen=True)
class Difference:
    """One fact about the tensor at `path` that is not what it was."""

    path: str
    what: str
    before: str
    after: str


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
        self._views = [(tensor.dtype, tensor.stride()) for tensor in self.bound.tensors]
        self._attributes = [dict(tensor.__dict__) for tensor in self.bound.tensors]
        self.entries = {
            path: {"kind": kind, **_facts(tensor), "aliases": ", ".join(aliases[id(tensor)])}
            for (path, kind, *_), tensor in zip(found, self.bound.tensors, strict=True)
        }

    def unchanged(self) -> bool:
        """True while every entry is what it was, at about 1 us each. Does not see entries that were added."""
        tensors = self.bound.tensors
        if not self.bound.in_place() or [(t.dtype, t.stride()) for t in tensors] != self._views:
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
