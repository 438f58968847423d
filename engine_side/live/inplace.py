"""Put a new value under a live parameter without losing its attributes.

`copy_or_rebind_param` is the one place where live storage is swapped; `bindings` proves that nothing was lost by it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
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
    module: nn.Module, name: str, value: torch.Tensor, *, like: torch.Tensor | None = None, swap: bool = False
) -> Outcome:
    """Make `module.name` hold `value`, touching as little as possible. Blocks; no collective.

    Same shape, dtype and device: the value is copied into the live storage (COPIED), also when it is a view of that
    very storage. Otherwise, and with `swap` always, the storage is swapped under the same object (REBOUND). A name that
    is absent, or registered as None, becomes a Parameter (CREATED) with the class, attributes and `requires_grad` of
    `like`. A buffer stays a buffer, a plain tensor attribute stays one. Sharding attributes follow when the value is
    the transpose of what was there.

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
    live = old.detach()
    shared = live.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
    alike = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    if alike and (shared or not swap):
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


def unregistered_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of a module's non-persistent buffers and of its plain attributes."""
    for name in module._non_persistent_buffers_set:
        buffer = module._buffers.get(name)
        if buffer is not None:
            yield name, buffer
    yield from ((name, value) for name, value in module.__dict__.items() if isinstance(value, torch.Tensor))


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


def meta_twin(tensor: torch.Tensor, made: dict[int, torch.Tensor]) -> torch.Tensor:
    """Make a meta tensor of the class, attributes and form of `tensor`, once per tensor object; views of one storage
    stay views of one storage.

    Args:
        made: what was made so far for tensors of the same model; filled here.
    """
    if id(tensor) not in made:
        storage = tensor.untyped_storage()
        flat = torch.empty(storage.nbytes() // tensor.element_size(), dtype=tensor.dtype, device="meta")
        base = made.setdefault(-storage._cdata, flat)
        made[id(tensor)] = twin_parameter(
            tensor, base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        )
    return made[id(tensor)]


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
