"""Round keys and values in a forward, as an engine's KV cache of another dtype does."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


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
