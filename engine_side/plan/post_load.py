"""Bring what an engine's post-load step makes to a live module: by redoing it there, or by grafting it from a twin."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any
from weakref import ReferenceType

import torch
from torch import nn

from bridge.errors import REPORT, ConfigError
from bridge.model.same_bits import same_bits
from engine_side.live.inplace import Outcome, copy_or_rebind_param, find_tensor, twin_parameter, unregistered_tensors
from engine_side.protocol import RankHost

INTERNAL = frozenset(nn.Module().__dict__)
"""Attributes of every module: its registries, its hooks and `training`. Nothing writes these on a live module."""
_DEPTH = 4
"""Levels of objects, containers and closures that `reachable` looks into."""


@dataclass(frozen=True)
class ModuleState:
    """Holds what a module has outside its parameters and persistent buffers.

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
            if name in INTERNAL:
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
    host: RankHost,
    module: nn.Module,
    template: nn.Module,
    values: Mapping[str, torch.Tensor],
    *,
    swap: bool = False,
    dropped: list[torch.Tensor] | None = None,
) -> dict[str, Outcome]:
    """Run a module's post-load again on canonical values, and bring the results into the storages that were there; with
    `swap`, leave them where the step put them.

    A value that already *is* the module's storage is left where it is. Returns the outcome by name. When the step
    raises, the former objects are back in place, with undefined values.

    Args:
        dropped: receives, zeroed, the memory of results that were copied and that nothing refers to any more. For an
            experiment: a kernel that has noted such an address shows zeros as long as the list lives, and not by chance
            the right values in freed memory.
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
    copied: dict[int, torch.UntypedStorage] = {}
    for name, old in former.items():
        new = find_tensor(module, name)
        if new is None or new is old:
            continue
        if old is not None:
            _register(module, name, old)
            outcomes[name] = copy_or_rebind_param(module, name, new, swap=swap)
            if outcomes[name] is Outcome.COPIED:
                copied.setdefault(new.untyped_storage()._cdata, new.untyped_storage())
        else:
            outcomes[name] = Outcome.CREATED
        del new
    if dropped is not None:
        dropped += _zeroed_where_free(copied.values())
    added = {name for registry in (module._parameters, module._buffers) for name in registry} - former.keys()
    return outcomes | dict.fromkeys(added, Outcome.CREATED)


def _zeroed_where_free(storages: Iterable[torch.UntypedStorage]) -> Iterator[torch.Tensor]:
    """Zero each of these storages that no tensor has any more, and yield its bytes."""
    for storage in storages:
        if torch._C._storage_Use_Count(storage._cdata) == 1:
            yield torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()


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
    roots += [(name, value, 0) for name, value in module.__dict__.items() if name not in INTERNAL]
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
