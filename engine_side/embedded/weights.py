"""Parameters of the engine: each carries a `weight_loader` and says along which dimensions it is sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bridge.errors import DtypeMismatch, ShapeMismatch
from engine_side.embedded.parallel import Parallel, divide

WeightLoader = Callable[..., None]
"""Called as loader(param, loaded, shard_id, expert_id?) with a whole checkpoint tensor; writes this rank's part."""


class Layer(nn.Module):
    """A module whose call returns a tensor, as the type checker cannot know of torch's own."""

    __call__: Callable[..., torch.Tensor]


def parameter(shape: tuple[int, ...], dtype: torch.dtype, loader: WeightLoader, **attributes: Any) -> nn.Parameter:
    """Make an uninitialised Parameter on the current default device, with its loader and other attributes."""
    param = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    return set_attributes(param, weight_loader=loader, **attributes)


def sharded_parameter(
    shape: tuple[int, ...], dtype: torch.dtype, loader: WeightLoader, tp: Parallel, **attributes: Any
) -> nn.Parameter:
    """Make a Parameter [..., outputs, inputs], or [outputs], with the sharding attributes that vLLM's layers set."""
    sharding = {"output_dim": max(len(shape) - 2, 0), "tp_rank": tp.rank, "tp_size": tp.size}
    if len(shape) > 1:
        sharding["input_dim"] = len(shape) - 1
    return parameter(shape, dtype, loader, **sharding, **attributes)


def set_attributes(param: nn.Parameter, **attributes: Any) -> nn.Parameter:
    """Set attributes of a Parameter object and return it."""
    for name, value in attributes.items():
        setattr(param, name, value)
    return param


def stored(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of what checkpoints hold of this one module: its parameters and persistent buffers."""
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
        """Return the cut that takes everything."""
        return cls(0, 0, size, size)

    @classmethod
    def of_rank(cls, whole: int, tp: Parallel, what: str, offset: int = 0) -> Cut:
        """Return this rank's share of `whole` elements. Raises ConfigError, naming `what`, where ranks do not divide
        it."""
        size = divide(whole, tp.size, what)
        return cls(offset, tp.rank * size, size, whole)

    @property
    def span(self) -> slice:
        """The part's elements in the checkpoint tensor."""
        return slice(self.start, self.start + self.size)

    def aligned(self, block: int) -> bool:
        """Tell if the edges lie between blocks. The end of the tensor may lie inside one."""
        end = self.start + self.size
        return not (self.offset % block or self.start % block or (end % block and end != self.whole))

    def blocks(self, block: int) -> Cut:
        """Return the same cut counted in blocks. The cut must be aligned."""
        return Cut(self.offset // block, self.start // block, -(-self.size // block), -(-self.whole // block))


def load_cuts(param: torch.Tensor, dest: torch.Tensor, loaded: torch.Tensor, cuts: Sequence[Cut]) -> None:
    """Copy this rank's part of a checkpoint tensor into `dest`, a view of `param`: one cut of the layer's matrix per
    dimension. A parameter of scales has `block_shape`: one element stands for that many rows and columns.

    Raises ShapeMismatch, DtypeMismatch.
    """
    block: tuple[int, int] = getattr(param, "block_shape", (1, 1))
    own = [cut.blocks(size) for cut, size in zip(cuts, block)]
    expect_shape(loaded, tuple(cut.whole for cut in own))
    for dim, cut in enumerate(own):
        dest, loaded = dest.narrow(dim, cut.offset, cut.size), loaded.narrow(dim, cut.start, cut.size)
    write(dest, loaded)


def expect_shape(loaded: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ShapeMismatch unless the checkpoint tensor has this shape; `load_weights` adds the tensor's name."""
    if tuple(loaded.shape) != shape:
        raise ShapeMismatch(
            "a weight has another shape",
            where="a weight",
            expected=str(list(shape)),
            got=str(list(loaded.shape)),
            remedy="load a checkpoint of the configuration that the engine was started with",
        )


def write(dest: torch.Tensor, loaded: torch.Tensor) -> None:
    """Copy into a view of a parameter, without broadcasting.

    One-byte dtypes are codes that mean nothing without their scales: they are copied bit for bit, and no other dtype is
    converted into them. Raises ShapeMismatch, DtypeMismatch.
    """
    expect_shape(loaded, tuple(dest.shape))
    if dest.dtype.itemsize == 1 and loaded.dtype != dest.dtype:
        raise DtypeMismatch(
            "a quantised weight takes no other dtype",
            where="a weight",
            expected=str(dest.dtype),
            got=str(loaded.dtype),
            remedy="quantise it as the checkpoint is and send both, or push its values and leave its scales out",
        )
    dest.copy_(loaded)


def default_weight_loader(param: torch.Tensor, loaded: torch.Tensor, shard_id: object = None) -> None:
    """Copy the whole tensor: norms, replicated weights."""
    write(param.data, loaded)
