"""Forward caches: tensors that a module computes from its weights in a forward and keeps as attributes.

Two weights joined, a transpose, a table: no loader and no post-load step computes them anew, so they would outlive
every sync. A load clears them, and the next forward computes them from the new weights.

Where a module can be called alone, an experiment on a twin shows which attributes these are. Elsewhere a candidate is
an attribute that is None in a freshly loaded skeleton and a floating-point tensor in the live module. A candidate that
the module's forward assigns is cleared by the load; any other is cleared only around a forward of ours, which puts it
back when it fails without it.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import CodeType

import torch
from torch import nn


@dataclass(frozen=True, slots=True, eq=False)
class CacheAttribute:
    """One attribute of a live module that a forward may fill. `absent`: a fresh module does not have it at all."""

    path: str
    state: dict[str, object]
    name: str
    absent: bool


class ForwardCaches:
    """The forward caches of one live model. One thread at a time.

    Args:
        root: the live model.
        pairs: (path, module of a skeleton that went through the engine's loader, its live counterpart).
        found: module path -> attributes that an experiment has shown to be caches.
    """

    def __init__(
        self,
        root: nn.Module,
        pairs: Iterable[tuple[str, nn.Module, nn.Module]],
        found: Mapping[str, AbstractSet[str]],
    ) -> None:
        self._root = root
        self._recomputed: list[CacheAttribute] = []
        self._unproven: list[CacheAttribute] = []
        self._cleared: dict[CacheAttribute, object] = {}
        assigned: dict[type, AbstractSet[str]] = {}
        for path, fresh, live in pairs:
            if type(fresh) is not type(live):
                continue
            names = proven = found.get(path)
            if names is None or proven is None:
                names = {name for name, value in fresh.__dict__.items() if value is None}
                if type(live) not in assigned:
                    assigned[type(live)] = names_assigned_in_forward(live)
                proven = assigned[type(live)]
            for name in sorted(names):
                attribute = CacheAttribute(path, live.__dict__, name, name not in fresh.__dict__)
                (self._recomputed if name in proven else self._unproven).append(attribute)

    def clear(self, *, unproven: bool = False) -> tuple[str, ...]:
        """Clear the caches that the next forward computes anew; "module.name" of each. Called at the end of a load.

        With `unproven`, clear the other candidates instead: just before a forward that is followed by `restore` or
        `confirm`. A view of a live parameter follows the weights by itself and is left alone. About 50 ns per attribute
        that is not set.
        """
        attributes = self._unproven if unproven else self._recomputed
        full = [each for each in attributes if each.state.get(each.name) is not None]
        full = [each for each in full if _is_float_tensors(each.state[each.name])]
        if not full:
            return ()
        views = {t.untyped_storage().data_ptr() for t in (*self._root.parameters(), *self._root.buffers())}
        out: list[str] = []
        for each in full:
            value = each.state[each.name]
            if views.issuperset(_storage_addresses(value)):
                continue
            self._cleared[each] = value
            if each.absent:
                del each.state[each.name]
            else:
                each.state[each.name] = None
            out.append(f"{each.path}.{each.name}" if each.path else each.name)
        return tuple(out)

    def restore(self) -> bool:
        """Put back everything cleared, and never clear it again: a forward failed without it, so the forward does not
        compute it. False when nothing was cleared."""
        cleared, self._cleared = self._cleared, {}
        for each, value in cleared.items():
            each.state[each.name] = value
        self._recomputed = [each for each in self._recomputed if each not in cleared]
        self._unproven = [each for each in self._unproven if each not in cleared]
        return bool(cleared)

    def confirm(self) -> None:
        """Let go of the cleared values after a forward that succeeded without them. Candidates that this forward has
        not filled are put back: another one may need them."""
        for each in self._unproven:
            if each in self._cleared and each.state.get(each.name) is None:
                each.state[each.name] = self._cleared[each]
        self._cleared.clear()


def names_assigned_in_forward(module: nn.Module) -> frozenset[str]:
    """Read off the bytecode which attributes `module.forward`, or a method of its class that this uses, assigns."""
    names: set[str] = set()
    seen: set[CodeType] = set()
    classes = [cls for cls in type(module).__mro__ if cls not in (nn.Module, object)]
    todo: list[object] = [vars(cls).get("forward") for cls in classes]
    while todo:
        function = todo.pop()
        code = getattr(inspect.unwrap(function), "__code__", function) if callable(function) else function
        if not isinstance(code, CodeType) or code in seen:
            continue
        seen.add(code)
        todo += code.co_consts  # functions and comprehensions defined inside
        todo += (vars(cls).get(name) for cls in classes for name in code.co_names)
        todo += (module.__dict__.get(name) for name in code.co_names)
        names.update(each.argval for each in dis.get_instructions(code) if each.opname == "STORE_ATTR")
    return frozenset(names)


def names_set(module: nn.Module) -> frozenset[str]:
    """Names of the attributes of a module that are not None."""
    return frozenset(name for name, value in module.__dict__.items() if value is not None)


def tensors_set_since(module: nn.Module, before: AbstractSet[str]) -> frozenset[str]:
    """Names of the attributes that hold floating-point tensors now and are not among the names set `before`."""
    return frozenset(name for name in names_set(module) - before if _is_float_tensors(module.__dict__[name]))


def _is_float_tensors(value: object) -> bool:
    """True for a floating-point tensor, and for a non-empty sequence of nothing else."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and value.device.type != "meta"
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_float_tensors, value))


def _storage_addresses(value: object) -> Iterator[int]:
    if isinstance(value, torch.Tensor):
        yield value.untyped_storage().data_ptr()
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _storage_addresses(item)
