"""Put a new value under a live parameter without losing what hangs on it, and prove afterwards that nothing was lost.

`copy_or_rebind_param` is the one place where live storage is swapped. `AttributeSnapshot` is the fingerprint that the
attributes level compares: object, address, strides, dtype, shape, class, attributes and aliases of every parameter.
"""

from __future__ import annotations

import enum
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import is_
from types import MethodType
from weakref import ReferenceType, ref

import torch
from torch import nn

from bridge.errors import ConfigError

SHARDING_ATTRIBUTES = ("input_dim", "output_dim")
"""What engines call the dimension along which a parameter is cut; a transpose swaps them."""


class Outcome(enum.Enum):
    """Which branch `copy_or_rebind_param` took."""

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
    old = held(module, name)
    if old is None:
        _create(module, name, new, like)
        return Outcome.CREATED
    swapped = _transposed_dims(old, new)
    if old.shape == new.shape and old.dtype == new.dtype and old.device == new.device:
        _copy_in(old, new)
        outcome = Outcome.COPIED
    else:
        _swap_storage(old, new, f"{type(module).__name__}.{name}")
        outcome = Outcome.REBOUND
    if swapped is not None:
        _follow_transpose(old, *swapped)
    return outcome


def held(module: nn.Module, name: str) -> torch.Tensor | None:
    """The parameter, buffer or plain tensor attribute of that name, if there is one."""
    for registry in (module._parameters, module._buffers, module.__dict__):
        found = registry.get(name)
        if isinstance(found, torch.Tensor):
            return found
    return None


def twin_parameter(
    like: torch.Tensor, data: torch.Tensor, owner: tuple[nn.Module, nn.Module] | None = None
) -> torch.Tensor:
    """`data` as a tensor of the class, attributes and `requires_grad` of `like`.

    With `owner` = (from, to), bound methods of the first module become methods of the second: a `weight_loader` must
    speak for the module on which the parameter hangs.
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
    """`value` with each tensor whose id `swap` knows exchanged, in plain containers and weak references too, `depth`
    levels down.

    For attributes of a copied module: what a recurrent layer keeps in a list besides its registry must be the copy's.
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


def _create(module: nn.Module, name: str, new: torch.Tensor, like: torch.Tensor | None) -> None:
    if like is not None and not isinstance(like, nn.Parameter):
        module.register_buffer(name, twin_parameter(like, new))
        return
    made = nn.Parameter(new, requires_grad=False) if like is None else twin_parameter(like, new)
    module.__dict__.pop(name, None)
    module._parameters[name] = made  # type: ignore[assignment]  # register_parameter refuses a name that is an attribute


def _copy_in(old: torch.Tensor, new: torch.Tensor) -> None:
    live = old.detach()
    if live.numel() == 0:
        return
    if live.untyped_storage().data_ptr() == new.untyped_storage().data_ptr():
        if live.data_ptr() == new.data_ptr() and live.stride() == new.stride():
            return
        new = new.clone()  # a view of itself would be read while it is written
    with torch.no_grad():
        live.copy_(new)


def _swap_storage(old: torch.Tensor, new: torch.Tensor, where: str) -> None:
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
    """The two dimensions that changed places between `old` and `new`, or None."""
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
    turn = {i: j, j: i}
    for name in SHARDING_ATTRIBUTES:
        # some engines keep the value behind a read-only property
        for key in (name, f"_{name}"):
            dim = param.__dict__.get(key)
            if isinstance(dim, int) and not isinstance(dim, bool):
                at = dim % param.dim()
                param.__dict__[key] = turn.get(at, at)


# ---- attribute snapshot --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fingerprint:
    """Everything about one parameter or buffer that a sync must not change."""

    object_id: int
    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    cls: type
    requires_grad: bool
    buffer: bool
    attributes: tuple[tuple[str, object], ...]
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """One fact about `path` that is not what it was."""

    path: str
    what: str
    before: str
    after: str


MOVED = frozenset({"address", "shape", "stride", "dtype"})
"""Facts that a swapped storage explains; nothing explains the others."""


@dataclass
class _EntryCheck:
    """The cheap check of one entry: the same object in the same place with the same storage and the same attributes."""

    path: str
    registry: dict[str, torch.Tensor | None]
    name: str
    tensor: torch.Tensor
    address: int
    stride: tuple[int, ...]
    dtype: torch.dtype
    attributes: dict[str, object]

    def same(self) -> bool:
        t = self.tensor
        return (
            self.registry.get(self.name) is t
            and t.data_ptr() == self.address
            and t.dtype is self.dtype
            and t.stride() == self.stride
            and len(t.__dict__) == len(self.attributes)
            and all(map(is_, t.__dict__.values(), self.attributes.values()))
        )

    def put_back(self) -> None:
        self.registry[self.name] = self.tensor
        self.tensor.__dict__.clear()
        self.tensor.__dict__.update(self.attributes)


@dataclass
class AttributeSnapshot:
    """Fingerprints of every parameter and buffer under a module, by path. Holds references, so ids stay unique."""

    entries: dict[str, Fingerprint]
    _watches: list[_EntryCheck] = field(default_factory=list, repr=False)
    _root: nn.Module | None = field(default=None, repr=False)
    _modules: Container[int] | None = field(default=None, repr=False)

    @classmethod
    def take(cls, root: nn.Module, modules: Container[int] | None = None) -> AttributeSnapshot:
        """Walk `root` once. Costs about 10 us per tensor; taken when a plan is compiled.

        `modules` (ids) restricts the entries to tensors that hang on these modules, under all their names in `root`.
        """
        found = list(_tensors(root))
        shared: dict[int, list[str]] = {}
        for path, _, _, tensor, _, _ in found:
            shared.setdefault(id(tensor), []).append(path)
        if modules is not None:
            ours = {id(tensor) for _, _, _, tensor, _, owner in found if owner in modules}
            found = [entry for entry in found if id(entry[3]) in ours]
        entries = {
            path: _fingerprint(tensor, buffer, tuple(shared[id(tensor)])) for path, _, _, tensor, buffer, _ in found
        }
        watches = [_watch(path, registry, name, tensor) for path, registry, name, tensor, _, _ in found]
        return cls(entries, watches, root, modules)

    def unchanged(self) -> bool:
        """Is every entry still what it was, about 1 us each? Does not see entries that were added."""
        return all(watch.same() for watch in self._watches)

    def put_back(self) -> None:
        """Former objects in their places, with their former attributes: undoes a load that lost some. Storage that was
        swapped under an object stays; values are undefined until the next load."""
        for watch in self._watches:
            if not watch.same():
                watch.put_back()

    def retake(self) -> AttributeSnapshot:
        """The same module, now."""
        if self._root is None:
            raise ConfigError("this snapshot was built from values; it has no module to look at again")
        return AttributeSnapshot.take(self._root, self._modules)


def diff(before: AttributeSnapshot, after: AttributeSnapshot, allowed: Iterable[str] = ()) -> list[Difference]:
    """What changed between two snapshots. For paths in `allowed` (rebound by us) moved storage is no difference."""
    moved = set(allowed)
    out: list[Difference] = []
    for path, old in before.entries.items():
        new = after.entries.get(path)
        if new is None:
            out.append(Difference(path, "presence", f"{old.cls.__name__} {old.shape}", "gone"))
            continue
        for what in Fingerprint.__dataclass_fields__:
            a, b = getattr(old, what), getattr(new, what)
            if a == b or (path in moved and what in MOVED):
                continue
            if what == "attributes":
                out.extend(_attribute_differences(path, dict(a), dict(b)))
            else:
                out.append(Difference(path, what, _show(what, a), _show(what, b)))
    for path in after.entries.keys() - before.entries.keys():
        out.append(Difference(path, "presence", "absent", f"appeared as {after.entries[path].cls.__name__}"))
    return out


def _attribute_differences(path: str, a: dict[str, object], b: dict[str, object]) -> Iterator[Difference]:
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            yield Difference(path, f"attribute {key}", str(a.get(key, "absent")), str(b.get(key, "absent")))


def _show(what: str, value: object) -> str:
    if what in ("object_id", "address") and isinstance(value, int):
        return hex(value)
    return value.__name__ if isinstance(value, type) else str(value)


def _tensors(
    root: nn.Module,
) -> Iterator[tuple[str, dict[str, torch.Tensor | None], str, torch.Tensor, bool, int]]:
    for prefix, module in root.named_modules(remove_duplicate=False):
        for registry, buffer in ((module._parameters, False), (module._buffers, True)):
            for name, tensor in registry.items():
                if tensor is not None:
                    yield f"{prefix}.{name}" if prefix else name, registry, name, tensor, buffer, id(module)


def _watch(path: str, registry: dict[str, torch.Tensor | None], name: str, tensor: torch.Tensor) -> _EntryCheck:
    attributes = dict(tensor.__dict__)
    return _EntryCheck(path, registry, name, tensor, tensor.data_ptr(), tensor.stride(), tensor.dtype, attributes)


def _fingerprint(tensor: torch.Tensor, buffer: bool, aliases: tuple[str, ...]) -> Fingerprint:
    return Fingerprint(
        object_id=id(tensor),
        address=tensor.data_ptr(),
        shape=tuple(tensor.shape),
        stride=tensor.stride(),
        dtype=tensor.dtype,
        cls=type(tensor),
        requires_grad=tensor.requires_grad,
        buffer=buffer,
        attributes=tuple((key, _identity(item)) for key, item in sorted(tensor.__dict__.items())),
        aliases=aliases,
    )


def _identity(item: object) -> object:
    """A value that is equal exactly when the attribute is the same thing."""
    if isinstance(item, MethodType):
        return f"{item.__func__.__qualname__} of {type(item.__self__).__name__} at {id(item.__self__):#x}"
    if item is None or isinstance(item, (bool, int, float, str, torch.dtype)):
        return item
    return f"{type(item).__name__} at {id(item):#x}"
