"""What a live layer computes, seen from outside: its forward on a deep copy, never PEFT's merge.

A forward may write to the layer (merged and disabled adapters unmerge, PEFT's attention merges and unmerges), so
everything here runs on a copy. Use float64 layers: the tolerance is 1e-9.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

TOLERANCE = 1e-9


def quiet_copy(module: nn.Module) -> nn.Module:
    """A deep copy in eval mode: forwards of it leave the live module alone."""
    return copy.deepcopy(module).eval()


@torch.no_grad()
def live_linear(module: nn.Module, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(W [outputs, inputs], b [outputs]) of a linear-like layer: `b = M(0)`, `W = (M(I) - M(0))^T`."""
    layer = quiet_copy(module)
    bias = layer(torch.zeros(1, inputs, dtype=torch.float64))
    eye = layer(torch.eye(inputs, dtype=torch.float64))
    return (eye - bias).T.contiguous(), bias[0]


@torch.no_grad()
def live_embedding(module: nn.Module, vocabulary: int, scale: float = 1.0) -> torch.Tensor:
    """[vocabulary, hidden]: `M(arange) / embed_scale`."""
    rows: torch.Tensor = quiet_copy(module)(torch.arange(vocabulary)) / scale
    return rows


@torch.no_grad()
def live_output(module: nn.Module, *inputs: Any) -> Any:
    """The forward of a copy."""
    return quiet_copy(module)(*inputs)


@torch.no_grad()
def base_output(base: nn.Module, tensors: dict[str, torch.Tensor], *inputs: Any) -> Any:
    """The forward of a base layer with other tensors in place of its own; the layer itself is left alone."""
    return torch.func.functional_call(quiet_copy(base), tensors, inputs)


def innermost(module: Any) -> nn.Module:
    """The base layer at the end of a chain."""
    while True:
        if "token_adapter" in module._modules:
            module = module._modules["token_adapter"]
        elif "base_layer" in module._modules:
            module = module._modules["base_layer"]
        else:
            return module  # type: ignore[no-any-return]


def fingerprint(model: nn.Module, *, versions: bool = True) -> dict[str, Any]:
    """Everything that reading a model must leave as it was: bytes, addresses, identities, flags. Walks `_modules`, as
    PEFT's attention changes itself when it is walked by `named_modules`. Without `versions`, torch's counters of
    in-place operations do not count: PEFT's forward of expert parameters raises them and writes nothing."""
    found: dict[str, Any] = {}
    _collect(model, "", found, set(), versions)
    return found


def _collect(module: nn.Module, prefix: str, found: dict[str, Any], seen: set[int], versions: bool) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    loose = {k: v for k, v in vars(module).items() if isinstance(v, torch.Tensor)}
    for name, tensor in (*module._parameters.items(), *module._buffers.items(), *loose.items()):
        if tensor is not None:
            plain = tensor.detach().as_subclass(torch.Tensor)
            words = b"" if plain.is_meta else plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[f"{prefix}{name}"] = (
                id(tensor), plain.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.requires_grad,
                tensor._version if versions else None, words,
            )  # fmt: skip
    flags = ("training", "_disable_adapters", "_active_adapter", "merged_adapters", "scaling", "r", "lora_alpha",
             "_did_swap_in_out_features", "token_indices")  # fmt: skip
    for flag in flags:
        if flag in vars(module):
            found[f"{prefix}#{flag}"] = copy.deepcopy(vars(module)[flag])
    found[f"{prefix}#attributes"] = {k: id(v) for k, v in vars(module).items() if k[:1] != "_" or k[:2] == "__"}
    for kind in ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"):
        entries = vars(module)[kind]
        found[f"{prefix}#{kind}"] = (id(entries), [(name, id(value)) for name, value in entries.items()])
    for name, child in module._modules.items():
        if child is not None:
            _collect(child, f"{prefix}{name}.", found, seen, versions)


@contextmanager
def untouched(model: nn.Module, *, versions: bool = True) -> Iterator[None]:
    """Fails if anything of the model is another after the block, whether it raised or not."""
    before = fingerprint(model, versions=versions)
    try:
        yield
    finally:
        after = fingerprint(model, versions=versions)
        changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
        assert not changed, f"the live model changed: {sorted(changed)}"
