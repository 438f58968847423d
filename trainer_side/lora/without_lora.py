"""A second module tree over the same parameters, without adapters: `copy_without_lora`."""

from __future__ import annotations

import functools
import sys
from types import MethodType
from typing import Any

from torch import nn

from bridge.errors import ConfigError
from trainer_side.lora.layers.module_tree import peft_child
from trainer_side.lora.layers.wrapper_chain import is_lora, is_saved, is_token_wrapper, is_tokens, is_tuner
from trainer_side.names.naming import ROOT_WRAPPER

_COMPILED = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""Wrappers that compute what their module does: the tree without adapters does without them."""
_CONTAINERS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
"""What a module keeps in containers of its own (parameters, hooks, children): the copy gets its own ones."""


def copy_without_lora(model: nn.Module) -> nn.Module:
    """The base model as it is without adapters: new module objects over the very same Parameters and buffers.

    Every LoRA wrapper (any chain of `base_layer`), `modules_to_save` and token wrapper is replaced by the layer or
    original module inside, a PEFT model by the model inside; shared submodules stay shared. Its forward is the base
    model's forward (where adapters are merged, with the tensors as they are). Nothing of the live model is written:
    `eval()`, hooks and new attributes on the result stay on the result, in-place changes of its parameters do not.
    Copies no tensor; milliseconds; calls no forward.

    Raises ConfigError for a model whose parameters are sharded (FSDP, DTensor) or wrapped by a tuner that is no LoRA.
    """
    return _Copier().copy(model)


class _Copier:
    """Copies a tree once; every module by identity once."""

    def __init__(self) -> None:
        self._made: dict[int, nn.Module] = {}

    def copy(self, module: nn.Module) -> nn.Module:
        """The copy of a module, or of the layer inside a wrapper."""
        module = _inside(module)
        made = self._made.get(id(module))
        if made is not None:
            return made
        double: nn.Module = object.__new__(type(module))
        # Known before its children are: a child may refer back to it.
        self._made[id(module)] = double
        held = dict(vars(module))
        for name in _CONTAINERS:
            if name in held:
                held[name] = held[name].copy()
        library = sys.modules.get("torch.distributed.tensor")
        for name, parameter in module._parameters.items():
            if library is not None and isinstance(parameter, library.DTensor):
                raise _cannot("a sharded parameter", f"{type(module).__name__}.{name}", "use verify='weights'")
        held["_modules"] = {}
        double.__dict__.update(held)
        for name, child in module._modules.items():
            double._modules[name] = None if child is None else self.copy(child)
        for name, value in held.items():
            if name not in ("_parameters", "_buffers", "_modules"):
                double.__dict__[name] = self._pointed(value)
        return double

    def _pointed(self, value: Any) -> Any:
        """An attribute with every module in it replaced by its copy: a forward must not find its way back into the
        live tree, where the adapters are."""
        if isinstance(value, nn.Module):
            return self.copy(value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            owner = self.copy(value.__self__)
            if isinstance(owner, type(value.__self__)):
                return MethodType(value.__func__, owner)
            return getattr(owner, value.__name__)  # of a wrapper that is gone: the layer inside answers with its own
        if type(value) is functools.partial:
            arguments = [self._pointed(a) for a in value.args]
            named = {key: self._pointed(a) for key, a in value.keywords.items()}
            return functools.partial(self._pointed(value.func), *arguments, **named)
        if type(value) in (list, tuple) and any(map(_points, value)):
            return type(value)(self._pointed(item) for item in value)
        if type(value) is dict and any(map(_points, value.values())):
            return {key: self._pointed(item) for key, item in value.items()}
        return value


def _points(value: Any) -> bool:
    return isinstance(value, (nn.Module, MethodType, functools.partial))


def _inside(module: nn.Module) -> nn.Module:
    """The layer inside any chain of wrappers. Raises ConfigError for a wrapper that cannot be taken off."""
    while True:
        children = module._modules
        inside = None
        data_parallel = isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        hop = peft_child(module) or next((name for name in children if name in _COMPILED), None)
        if is_saved(module):
            inside = children["original_module"]
        elif is_token_wrapper(module):
            inside = children["token_adapter"]
        elif (is_lora(module) or is_tokens(module)) and isinstance(children.get("base_layer"), nn.Module):
            inside = children["base_layer"]
        elif is_tuner(module) and isinstance(children.get("base_layer"), nn.Module):
            raise _cannot("a tuner that is not LoRA", type(module).__name__, "merge it into the model")
        elif "_fsdp_wrapped_module" in children:
            raise _cannot("a sharded module", type(module).__name__, "use verify='weights'")
        elif hop is not None or data_parallel:
            inside = children.get(hop or ROOT_WRAPPER)
        if inside is None:
            return module
        module = inside


def _cannot(what: str, where: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"the model without its adapters cannot be called: {what}",
        where=where,
        expected="plain parameters, LoRA layers, modules_to_save and trainable tokens",
        got=where,
        remedy=remedy,
    )
