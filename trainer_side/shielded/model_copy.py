"""Copy a model's modules over the weights that they have: what a forward sets is set on the copy."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import OrderedDict
from enum import Enum
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader, Dataset

from bridge.errors import BridgeError, ConfigError
from trainer_side.shielded.values import (
    DUPLICATES,
    container_base,
    contents,
    empty_container,
    fill_container,
    slots_of,
)

_COMPILED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Wrappers that compute what their module does; a compiled one would find its way back into the live tree."""
_CONSTANTS = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size, Enum)
_ATOMS = frozenset({str, bytes, int, float, bool, type(None), torch.dtype, torch.device, torch.Size})
_PLAIN_DICTS = (dict, OrderedDict)
_SHARED = (type, FunctionType, ModuleType, torch.optim.Optimizer, Dataset, DataLoader)
"""What may hang on a model, is no state of its layers and may hold as much memory as they do."""
_WEAK_DICTS = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
_DEPTH = 4
"""Objects within objects that are copied: a cache for two kinds of attention holds two that hold layers. A limit,
because an object may lead from the model to all of the program."""
_NO_FORWARD = "push with verify='weights': read-back and probes need no forward of the trainer"


class ModelCopier:
    """Copies the modules of a model for one forward; nothing that the forward sets is set on the model.

    New are: every module; every Parameter, over the same storage, of the same class, with its attributes; every buffer
    and plain tensor attribute, by value; every container, and every object that hangs on a module or a parameter
    (quantisation states), down to a depth. References to modules and parameters lead into the copy. A write into the
    weights themselves reaches the model: `ReferenceGuard` refuses it. Calls nothing of the model, not its `state_dict`
    either. Copies each thing once; must live as long as the copy is used, which may refer to some of it weakly.

    Attributes:
        originals: what was copied.
        lent: tensors of the model whose storage the copy uses.
    """

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}
        self.originals: list[Any] = []  # an id says something only while its object lives
        self.lent: list[torch.Tensor] = []

    def copy(self, model: nn.Module) -> nn.Module:
        """The copy of a model, or of the one inside it. Raises ConfigError for one whose parameters are sharded (FSDP,
        DTensor), and for one that cannot be copied."""
        try:
            return self._module(model)
        except BridgeError:
            raise
        except Exception as error:  # attributes of a model are objects of any class
            raise _not_copied(model, f"{type(error).__name__}: {error}") from error

    def double_of(self, original: nn.Module | torch.Tensor) -> Any:
        """The copy of a module, parameter or buffer; None when it was not copied."""
        return self._made.get(id(original))

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

    def _module(self, module: nn.Module) -> nn.Module:
        module = self.inside(module)
        made = self._made.get(id(module))
        if made is not None:
            return made  # type: ignore[no-any-return]
        if isinstance(module, torch.jit.ScriptModule):
            raise _not_copied(module, "a module of TorchScript")
        double: nn.Module = object.__new__(_without_end(type(module)))
        self._remember(module, double)  # known before its children are: a child may refer back to it
        held = dict(vars(module))
        # registries come first: attributes that refer back to this module look things up in them
        double.__dict__.update(_parameters={}, _buffers={}, _modules={})
        for name, parameter in module._parameters.items():
            weight: Any = None if parameter is None else self._weight(parameter, type(module).__name__)
            double._parameters[name] = weight
        for name, buffer in module._buffers.items():
            double._buffers[name] = None if buffer is None else self._value(buffer, 0)
        for name, child in module._modules.items():
            double._modules[name] = None if child is None else self._module(child)
        for name, value in held.items():
            kind = type(value)
            if kind in _ATOMS:
                double.__dict__[name] = value
            elif kind in _PLAIN_DICTS and not value:  # most modules have a dozen registries of hooks, all empty
                double.__dict__[name] = kind()
                self._remember(value, double.__dict__[name])
            elif name not in ("_parameters", "_buffers", "_modules"):
                double.__dict__[name] = self._value(value, 0)
        double.__dict__["_compiled_call_impl"] = None
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
            self.lent.append(parameter)
            for name, value in vars(parameter).items():
                double.__dict__.setdefault(name, self._beside(value, parameter))
        return double

    def _beside(self, value: Any, parameter: torch.Tensor) -> Any:
        """An attribute of a parameter. Gradients and moments that hang there are as large as the model: lent too."""
        plain = type(value) is torch.Tensor and id(value) not in self._made
        if not plain or value.numel() < max(parameter.numel(), 2):
            return self._value(value, 0)
        self._remember(value, value.detach())
        self.lent.append(value)
        return self._made[id(value)]

    def _value(self, value: Any, depth: int) -> Any:
        """An attribute as the copy holds it: a forward must neither find its way back into the live tree nor change
        what hangs there."""
        kind = type(value)  # not `isinstance`, which asks the object, and believes a proxy
        if kind in _ATOMS:
            return value
        if issubclass(kind, _CONSTANTS) or issubclass(kind, _SHARED):
            return value
        made = self._made.get(id(value))
        if made is not None:
            return made
        if issubclass(kind, nn.Module):
            return self._module(value)
        if issubclass(kind, torch.Tensor):
            return self._tensor(value)
        if kind is MethodType:
            return self._method(value, depth)
        if issubclass(kind, functools.partial):
            arguments = [self._value(a, depth) for a in value.args]
            named = {key: self._value(a, depth) for key, a in value.keywords.items()}
            return functools.partial(self._value(value.func, depth), *arguments, **named)
        if kind in (weakref.ref, weakref.WeakMethod, *weakref.ProxyTypes):
            return self._reference(value, depth)
        if issubclass(kind, (tuple, frozenset)) or container_base(kind) is not None:
            return self._container(value, depth)
        if kind in DUPLICATES:
            double = DUPLICATES[kind](value)
            self._remember(value, double)
            return double
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
            return MethodType(value.__func__, self._value(owner, depth))
        double = self._module(owner)
        if isinstance(double, type(owner)):
            return MethodType(value.__func__, double)
        return getattr(double, value.__name__)  # of a wrapper that is gone: the layer inside answers with its own

    def _reference(self, value: Any, depth: int) -> Any:
        """A weak reference, or proxy, to the copy of what the model's one refers to, if that is copied."""
        if isinstance(value, weakref.ref):
            target = value()
        elif isinstance(value, nn.Module):  # a proxy answers as what it stands for, and so do its methods
            method: Any = value._get_name
            target = method.__self__
        else:
            return value
        if isinstance(target, nn.Module):
            double: Any = self._module(target)
        elif isinstance(value, weakref.WeakMethod) and isinstance(target, MethodType):
            return weakref.WeakMethod(self._method(target, depth))
        elif id(target) in self._made:
            double = self._made[id(target)]
        else:
            return value
        return weakref.ref(double) if isinstance(value, weakref.ref) else weakref.proxy(double)

    def _key(self, value: Any) -> Any:
        """A key, or an element of a set: what is looked up by identity is looked up in the copy."""
        kinds = (nn.Module, torch.Tensor, MethodType)
        return self._value(value, 0) if issubclass(type(value), kinds) else value

    def _container(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if issubclass(kind, tuple):
            items = tuple(self._value(item, depth) for item in tuple.__iter__(value))
            return items if kind is tuple else tuple.__new__(kind, items)
        if issubclass(kind, frozenset):
            return frozenset.__new__(kind, (self._key(item) for item in frozenset.__iter__(value)))
        double = empty_container(value)
        self._remember(value, double)
        if issubclass(kind, dict):
            fill_container(double, ((self._key(k), self._value(item, depth)) for k, item in contents(value)))
        elif issubclass(kind, set):
            fill_container(double, (self._key(item) for item in contents(value)))
        else:
            fill_container(double, (self._value(item, depth) for item in contents(value)))
        if hasattr(double, "__dict__"):
            double.__dict__.update((name, self._value(item, depth)) for name, item in vars(value).items())
        return double

    def _state(self, value: Any, depth: int) -> Any:
        """A shallow copy of an object, made without its own `__copy__`; the object itself where that cannot be had, or
        where the end of a copy would do something: its `__del__` closes what the model still uses."""
        kind = type(value)
        if depth >= _DEPTH or hasattr(kind, "__del__"):
            return value
        if kind in _WEAK_DICTS:
            return self._weak_dict(value, depth)
        slots = slots_of(value)
        if not (slots or hasattr(value, "__dict__")):
            return value
        try:
            double = object.__new__(kind)
        except TypeError:  # built on a type with a layout of its own
            return value
        self._remember(value, double)
        for name, item in vars(value).items() if hasattr(value, "__dict__") else ():
            double.__dict__[name] = self._value(item, depth + 1)
        for name, item in slots.items():
            object.__setattr__(double, name, self._value(item, depth + 1))
        return double

    def _weak_dict(self, value: Any, depth: int) -> Any:
        double = type(value)()
        self._remember(value, double)
        for key, item in value.items():
            double[self._key(key)] = self._value(item, depth)
        return double


def _without_end(kind: Any) -> Any:
    """The class itself; of one with a `__del__` a class that has none: a copy owns nothing that its end could free."""
    if not hasattr(kind, "__del__"):
        return kind
    body = {"__del__": lambda _: None, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return types.new_class(kind.__name__, (kind,), exec_body=lambda namespace: namespace.update(body))


def _not_copied(model: nn.Module, got: str) -> ConfigError:
    return ConfigError(
        "the canary's forward runs on a copy of the model's modules, and these cannot be copied",
        where=type(model).__name__,
        expected="modules and attributes of plain Python classes",
        got=got,
        remedy=_NO_FORWARD,
    )


def sharded_error(where: str) -> ConfigError:
    """The error for a model of which this process holds only a part."""
    return ConfigError(
        "the model's parameters are sharded: its forward communicates, and no process may enter that alone",
        where=where,
        expected="a model whose weights lie whole in this process",
        got="sharded parameters",
        remedy=_NO_FORWARD,
    )


def _alias(parameter: torch.Tensor) -> torch.Tensor:
    """A tensor object of its own over a parameter's storage, of the same class, with a version counter of its own."""
    inference = torch.inference_mode(parameter.is_inference())
    with torch.no_grad(), inference, torch._C.DisableTorchFunctionSubclass():
        wraps: bool = is_traceable_wrapper_subclass(parameter)  # a flag of its own: mypy knows no such subclass
        if wraps:
            inner: torch.Tensor = parameter.detach()
            return nn.Parameter(inner, requires_grad=parameter.requires_grad)
        plain = parameter.data.as_subclass(torch.Tensor)
        double: torch.Tensor = torch.Tensor._make_subclass(type(parameter), plain, parameter.requires_grad)
        return double
