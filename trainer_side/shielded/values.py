"""Contents of containers and objects, read and put back without a call of what a class overrides."""

from __future__ import annotations

import copy
import copyreg
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

_CONTAINERS: tuple[type[Any], ...] = (OrderedDict, defaultdict, dict, list, set, deque)


def _same_state(generator: torch.Generator) -> torch.Generator:
    double = torch.Generator(generator.device)
    double.set_state(generator.get_state())
    return double


DUPLICATES: Mapping[type[Any], Callable[[Any], Any]] = {
    torch.Generator: _same_state,
    np.random.Generator: copy.deepcopy,
    np.random.RandomState: copy.deepcopy,
    random.Random: copy.copy,
    np.ndarray: np.ndarray.copy,
    bytearray: bytearray,
}
"""Mutable values that refer to nothing else, and how another one with the same contents is made."""


def put_back(value: Any, duplicate: Any) -> None:
    """Give a value of a type in DUPLICATES the contents that it had when the duplicate was made."""
    if isinstance(value, torch.Generator):
        value.set_state(duplicate.get_state())
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = duplicate.bit_generator.state
    elif isinstance(value, np.random.RandomState):
        value.set_state(duplicate.get_state())
    elif isinstance(value, random.Random):
        value.setstate(duplicate.getstate())
    elif isinstance(value, np.ndarray):
        value[...] = duplicate
    else:
        value[:] = duplicate


def container_base(kind: type[Any]) -> Any:
    """Return the built-in mutable container that a class is or is derived from; None when it is none."""
    if kind in _CONTAINERS:
        return kind
    return next((base for base in _CONTAINERS if issubclass(kind, base)), None)


def empty_container(value: Any) -> Any:
    """Make a container of the same class without contents."""
    base = container_base(type(value))
    double = base.__new__(type(value))
    if base is deque:
        deque.__init__(double, (), value.maxlen)
    elif base is defaultdict:
        double.default_factory = value.default_factory
    return double


def contents(value: Any) -> list[Any]:
    """Return the items of a container: pairs where it is a mapping."""
    base = container_base(type(value))
    return list(base.items(value) if issubclass(base, dict) else base.__iter__(value))


def fill_container(value: Any, items: Iterable[Any]) -> None:
    """Replace the items of a container."""
    base = container_base(type(value))
    base.clear(value)
    if issubclass(base, dict):
        for key, item in items:
            base.__setitem__(value, key, item)
    elif base is set:
        base.update(value, items)
    else:
        base.extend(value, items)


def slots_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object that lie in slots and are set."""
    found: dict[str, Any] = {}
    for name in copyreg._slotnames(type(value)):  # type: ignore[attr-defined]
        try:
            found[name] = object.__getattribute__(value, name)
        except AttributeError:
            continue  # not set
    return found
