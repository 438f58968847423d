"""What every Parameter of the engine carries: a `weight_loader` and where it is sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bridge.errors import ShapeMismatch

Loader = Callable[..., None]
"""Called as loader(param, loaded, shard_id, expert_id?) with a whole checkpoint tensor; writes this rank's part."""


def parameter(shape: tuple[int, ...], dtype: torch.dtype, loader: Loader, **attributes: Any) -> nn.Parameter:
    """An uninitialised Parameter on the current default device, with its loader and sharding attributes."""
    param = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    return set_attributes(param, weight_loader=loader, **attributes)


def set_attributes(param: nn.Parameter, **attributes: Any) -> nn.Parameter:
    for name, value in attributes.items():
        setattr(param, name, value)
    return param


def stored(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of what checkpoints hold of this one module: its parameters and persistent buffers."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def expect_shape(loaded: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ShapeMismatch unless the checkpoint tensor is exactly that large; `load_weights` adds its name."""
    if tuple(loaded.shape) != shape:
        raise ShapeMismatch("a weight has another shape", expected=str(list(shape)), got=str(list(loaded.shape)))


def write(dest: torch.Tensor, loaded: torch.Tensor) -> None:
    """Copy into a view of a parameter; never broadcasts."""
    expect_shape(loaded, tuple(dest.shape))
    dest.copy_(loaded)


def default_weight_loader(param: torch.Tensor, loaded: torch.Tensor, shard_id: object = None) -> None:
    """The whole tensor as it stands: norms, replicated weights."""
    write(param.data, loaded)
