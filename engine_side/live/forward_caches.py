"""What a forward keeps on its module the first time it runs: two weights joined, a transpose, a table. It is made of
the weights of then; no loader and no post-load step makes it anew, and it would outlive every sync. So it is dropped,
and the module makes it again.

Where a module can be called alone, an experiment tells what it keeps. Elsewhere its constructor does: what that left as
None, and the engine's loader after it, and what is a floating-point tensor now, came with use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True, eq=False)
class CacheAttribute:
    """One attribute of a live module that a forward may fill; `absent`: it is not there before, instead of None."""

    path: str
    state: dict[str, object]
    name: str
    absent: bool

    def clear(self) -> None:
        if self.absent:
            self.state.pop(self.name, None)
        else:
            self.state[self.name] = None


class ForwardCaches:
    """What the modules of one live engine may keep.

    Args:
        root: the live model.
        pairs: (path, module of a skeleton that went through the engine's loader, its live namesake).
        found: path -> names that an experiment has shown.
    """

    def __init__(
        self,
        root: nn.Module,
        pairs: Iterable[tuple[str, nn.Module, nn.Module]],
        found: Mapping[str, AbstractSet[str]],
    ) -> None:
        self._root = root
        self._slots: list[CacheAttribute] = []
        self._dropped: dict[CacheAttribute, object] = {}
        for path, fresh, live in pairs:
            if type(fresh) is not type(live):
                continue
            names = found.get(path)
            if names is None:
                names = {name for name, value in fresh.__dict__.items() if value is None}
            self._slots += [
                CacheAttribute(path, live.__dict__, n, fresh.__dict__.get(n, self) is self) for n in sorted(names)
            ]

    def drop(self) -> tuple[str, ...]:
        """Drop it all; "module.name" of each. About 50 ns for what is not there. A view of a parameter follows by
        itself, and stays."""
        full = [slot for slot in self._slots if slot.state.get(slot.name) is not None]
        full = [slot for slot in full if _is_values(slot.state[slot.name])]
        if not full:
            return ()
        views = {t.untyped_storage().data_ptr() for t in (*self._root.parameters(), *self._root.buffers())}
        out: list[str] = []
        for slot in full:
            value = slot.state[slot.name]
            if not views.issuperset(_addresses(value)):
                self._dropped[slot] = value
                slot.clear()
                out.append(f"{slot.path}.{slot.name}" if slot.path else slot.name)
        return tuple(out)

    def put_back(self) -> bool:
        """A forward without what was dropped has failed: it was not the module's to make. Never dropped again. False
        where nothing was dropped."""
        dropped, self._dropped = self._dropped, {}
        for slot, value in dropped.items():
            slot.state[slot.name] = value
        self._slots = [slot for slot in self._slots if slot not in dropped]
        return bool(dropped)

    def settle(self) -> None:
        """A forward went well without what was dropped."""
        self._dropped.clear()


def names_set(module: nn.Module) -> frozenset[str]:
    """The attributes of a module that are set."""
    return frozenset(name for name, value in module.__dict__.items() if value is not None)


def tensors_set_since(module: nn.Module, before: AbstractSet[str]) -> frozenset[str]:
    """The attributes that hold tensors now, and were not set `before`."""
    return frozenset(name for name in names_set(module) - before if _is_values(module.__dict__[name]))


def _is_values(value: object) -> bool:
    """A floating-point tensor, or nothing but such."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and value.device.type != "meta"
    return isinstance(value, (list, tuple)) and bool(value) and all(_is_values(item) for item in value)


def _addresses(value: object) -> Iterator[int]:
    if isinstance(value, torch.Tensor):
        yield value.untyped_storage().data_ptr()
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _addresses(item)
