"""Copy a model's modules over the weights that they have: what a forward sets is set on the copy."""

from __future__ import annotations

import copyreg
import functools
import sys
import weakref
from collections import OrderedDict, defaultdict
from enum import Enum
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bridge.errors import ConfigError

_COMPILED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Wrappers that compute what their module does; a compiled one would find its way back into the live tree."""
_CONTAINERS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
"""What a module keeps in containers of its own (parameters, hooks, children): the copy gets its own ones."""
_CONSTANTS = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size, Enum)
_SHARED = (type, FunctionType, ModuleType, torch.Generator)
"""Attributes that are no state of a layer."""
_DEPTH = 2
"""Objects within objects that are copied: a quantisation state may hold another."""


def shielded_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of a model for one forward; nothing that the forward sets is set on the model.

    New are: every module; every Parameter, over the same storage, of the same class, with its attributes; every buffer
    and plain tensor attribute, by value; every container, and every object that hangs on a module or a parameter
    (quantisation states). References to modules and parameters lead into the copy. A write into the weights themselves
    reaches the model: `ReferenceGuard` refuses it. Calls nothing of the model, not its `state_dict` either.

    Raises ConfigError for a model whose parameters are sharded (FSDP, DTensor).
    """
    return ModelCopier().copy(model)


class ModelCopier:
    """Copies a tree once; every module, parameter and state by identity once."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}
        self.originals: list[Any] = []
        """What was copied; an id says something only while its object lives."""

    def inside(self, module: nn.Module) -> nn.Module:
        """The module to copy in place of `module`: what it wraps, if the wrapper computes nothing itself. Raises
        ConfigError for one that cannot be copied."""
        while True:
            if "_fsdp_wrapped_module" in module._modules:
                raise sharded_error(type(module).__name__)
            inner = next((module._modules[name] for name in _COMPILED if name in module._modules), None)
            if inner is None:
                return module
            module = inner

    def copy(self, module: nn.Module) -> nn.Module:
        """The copy of a module, or of the one inside it."""
        module = self.inside(module)
        made = self._made.get(id(module))
        if made is not None:
            return made  # type: ignore[no-any-return]
        double: nn.Module = object.__new__(type(module))
        self._remember(module, double)  # known before its children are: a child may refer back to it
        held = dict(vars(module))
        for name in _CONTAINERS:
            if name in held:
                held[name] = held[name].copy()
        held["_modules"] = {}
        held["_compiled_call_impl"] = None
        double.__dict__.update(held)
        for name, parameter in module._parameters.items():
            weight: Any = None if parameter is None else self._weight(parameter, type(module).__name__)
            double._parameters[name] = weight
        for name, buffer in module._buffers.items():
            double._buffers[name] = None if buffer is None else self._value(buffer, 0)
        for name, child in module._modules.items():
            double._modules[name] = None if child is None else self.copy(child)
        for name, value in held.items():
            if name not in ("_parameters", "_buffers", "_modules"):
                double.__dict__[name] = self._value(value, 0)
        return double

    def _remember(self, original: Any, double: Any) -> None:
        self._made[id(original)] = double
        self.originals.append(original)

    def _weight(self, parameter: torch.Tensor, owner: str) -> torch.Tensor:
        """A Parameter of its own over the same storage, with copies of what hangs on it."""
        made = self._made.get(id(parameter))
        if made is not None:
            return made  # type: ignore[no-any-return]
        library = sys.modules.get("torch.distributed.tensor")
        if library is not None and isinstance(parameter, library.DTensor):
            raise sharded_error(owner)
        double = parameter if is_lazy(parameter) else _alias(parameter)
        self._remember(parameter, double)
        if double is not parameter:
            for name, value in vars(parameter).items():
                double.__dict__.setdefault(name, self._value(value, 0))
        return double

    def _value(self, value: Any, depth: int) -> Any:
        """An attribute as the copy holds it: a forward must neither find its way back into the live tree nor change
        what hangs there."""
        if isinstance(value, (*_CONSTANTS, *_SHARED)):
            return value
        made = self._made.get(id(value))
        if made is not None:
            return made
        if isinstance(value, nn.Module):
            return self.copy(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, MethodType):
            return self._method(value, depth)
        if isinstance(value, functools.partial):
            arguments = [self._value(a, depth) for a in value.args]
            named = {key: self._value(a, depth) for key, a in value.keywords.items()}
            return functools.partial(self._value(value.func, depth), *arguments, **named)
        if type(value) is weakref.ref:
            target = value()
            return weakref.ref(self.copy(target)) if isinstance(target, nn.Module) else value
        if isinstance(value, (list, tuple, set, dict)):
            return self._container(value, depth)
        return self._state(value, depth)

    def _tensor(self, value: torch.Tensor) -> torch.Tensor:
        if isinstance(value, nn.Parameter):
            return self._weight(value, "an attribute")
        double = value if value.is_meta else value.detach().clone()
        self._remember(value, double)
        return double

    def _method(self, value: MethodType, depth: int) -> Any:
        owner = value.__self__
        if not isinstance(owner, nn.Module):
            return MethodType(value.__func__, self._value(owner, depth)) if id(owner) in self._made else value
        double = self.copy(owner)
        if isinstance(double, type(owner)):
            return MethodType(value.__func__, double)
        return getattr(double, value.__name__)  # of a wrapper that is gone: the layer inside answers with its own

    def _container(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is tuple:
            return tuple(self._value(item, depth) for item in value)
        if kind not in (list, set, dict, OrderedDict, defaultdict):
            return value
        double = value.copy()  # a defaultdict keeps its factory
        self._remember(value, double)
        if kind is list:
            double[:] = [self._value(item, depth) for item in value]
        elif kind is not set:
            double.update((key, self._value(item, depth)) for key, item in value.items())
        return double

    def _state(self, value: Any, depth: int) -> Any:
        """A shallow copy of an object, made without its own `__copy__`; the object itself where that cannot be had."""
        slots = copyreg._slotnames(type(value))  # type: ignore[attr-defined]
        if depth >= _DEPTH or not (hasattr(value, "__dict__") or slots):
            return value
        try:
            double = object.__new__(type(value))
        except TypeError:  # built on a type with a layout of its own
            return value
        self._remember(value, double)
        for name, item in vars(value).items() if hasattr(value, "__dict__") else ():
            double.__dict__[name] = self._value(item, depth + 1)
        for name in slots:
            if hasattr(value, name):
                object.__setattr__(double, name, self._value(getattr(value, name), depth + 1))
        return double


def sharded_error(where: str) -> ConfigError:
    """The error for a model of which this process holds only a part."""
    return ConfigError(
        "the model's parameters are sharded: its forward communicates, and no process may enter that alone",
        where=where,
        expected="a model whose weights lie whole in this process",
        got="sharded parameters",
        remedy="push with verify='weights': read-back and probes need no forward of the trainer",
    )


def _alias(parameter: torch.Tensor) -> torch.Tensor:
    """A tensor object of its own over a parameter's storage, of the same class, with a version counter of its own."""
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        wraps: bool = is_traceable_wrapper_subclass(parameter)  # a flag of its own: mypy knows no such subclass
        if wraps:
            inner: torch.Tensor = parameter.detach()
            return nn.Parameter(inner, requires_grad=parameter.requires_grad)
        plain = parameter.data.as_subclass(torch.Tensor)
        double: torch.Tensor = torch.Tensor._make_subclass(type(parameter), plain, parameter.requires_grad)
        return double
