"""What every Parameter of the engine carries: a `weight_loader` and where it is sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bridge.errors import DtypeMismatch, ShapeMismatch

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


@dataclass(frozen=True)
class Cut:
    """One dimension of a checkpoint tensor and this rank's part of it: elements `start` to `start + size` of `whole` go
    to `offset` in the parameter."""

    offset: int
    start: int
    size: int
    whole: int

    @classmethod
    def all_of(cls, size: int) -> Cut:
        return cls(0, 0, size, size)

    def aligned(self, block: int) -> bool:
        """Do the edges lie between blocks? The end of the tensor may lie inside one."""
        end = self.start + self.size
        return not (self.offset % block or self.start % block or (end % block and end != self.whole))

    def blocks(self, block: int) -> Cut:
        """The same in blocks, of an aligned cut."""
        return Cut(self.offset // block, self.start // block, -(-self.size // block), -(-self.whole // block))


def block_of(param: torch.Tensor) -> tuple[int, int]:
    """How many rows and columns of the layer's matrix one element of `param` stands for: more than one in scales."""
    block: tuple[int, int] = getattr(param, "block_shape", (1, 1))
    return block


def write_cuts(dest: torch.Tensor, loaded: torch.Tensor, cuts: Sequence[Cut]) -> None:
    """Copy this rank's part of a checkpoint tensor, one cut per dimension. Raises ShapeMismatch, DtypeMismatch."""
    expect_shape(loaded, tuple(cut.whole for cut in cuts))
    for dim, cut in enumerate(cuts):
        dest, loaded = dest.narrow(dim, cut.offset, cut.size), loaded.narrow(dim, cut.start, cut.size)
    write(dest, loaded)


def expect_shape(loaded: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ShapeMismatch unless the checkpoint tensor is exactly that large; `load_weights` adds its name."""
    if tuple(loaded.shape) != shape:
        raise ShapeMismatch("a weight has another shape", expected=str(list(shape)), got=str(list(loaded.shape)))


def write(dest: torch.Tensor, loaded: torch.Tensor) -> None:
    """Copy into a view of a parameter; never broadcasts. What is stored in one byte is a code that means nothing
    without its scale: it is copied as it stands, never converted into. Raises ShapeMismatch, DtypeMismatch."""
    expect_shape(loaded, tuple(dest.shape))
    if dest.dtype.itemsize == 1 and loaded.dtype != dest.dtype:
        raise DtypeMismatch(
            "a quantised weight takes no other dtype",
            expected=str(dest.dtype),
            got=str(loaded.dtype),
            remedy="quantise it as the checkpoint is, and send weight and scales",
        )
    dest.copy_(loaded)


def default_weight_loader(param: torch.Tensor, loaded: torch.Tensor, shard_id: object = None) -> None:
    """The whole tensor as it stands: norms, replicated weights."""
    write(param.data, loaded)
