"""Round in a trainer's forward as an engine that declares losses does: keys and values as its KV cache, operands of
matrix products as its quantised weights and activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.model.declared_losses import Rounding
from bridge.model.torch_dtypes import dtype_of

_aten = torch.ops.aten
_PRODUCTS = frozenset({_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten._grouped_mm})
"""Matrix products, of linear layers and of experts; an operand has two dimensions or more."""


class KvRounding(TorchFunctionMode):
    """Inside, every `scaled_dot_product_attention` gets its keys and values rounded to a dtype and back. Other
    implementations of attention (eager, kernels of a package) do not pass here.

    Attributes:
        reached: an attention was met.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.reached = False
        self._dtype = dtype
        self._largest = torch.finfo(dtype).max

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            self.reached = True
            query, *rest = args
            kept = [self._rounded(tensor) if place < 2 else tensor for place, tensor in enumerate(rest)]
            args = (query, *kept)
            kwargs |= {name: self._rounded(kwargs[name]) for name in ("key", "value") if name in kwargs}
        return func(*args, **kwargs)

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clamp(-self._largest, self._largest).to(self._dtype).to(tensor.dtype)


class ProductRounding(TorchDispatchMode):
    """Inside, operands of matrix products are rounded to the codes of a dtype, with one scale for each tensor: finer
    scales, or activations that stay as they are, change less.

    Attributes:
        reached: a product was met.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reached = False
        self._dtype = dtype
        self._largest = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "overloadpacket", None) in _PRODUCTS:
            self.reached = True
            args = tuple(self._rounded(value) for value in args)
        return func(*args, **(kwargs or {}))

    def _rounded(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or not value.is_floating_point():
            return value
        scale = value.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny) / self._largest
        codes = value.float() / scale
        codes = codes.to(self._dtype) if self._dtype.is_floating_point else codes.round()
        return (codes.float() * scale).to(value.dtype)


@contextmanager
def rounded_as(rounding: Rounding) -> Iterator[list[KvRounding | ProductRounding]]:
    """Round inside the block as `rounding` says. Gives the modes that do it."""
    modes: list[KvRounding | ProductRounding] = []
    if rounding.kv is not None:
        modes.append(KvRounding(dtype_of(rounding.kv)))
    if rounding.codes is not None:
        modes.append(ProductRounding(dtype_of(rounding.codes)))
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield modes
