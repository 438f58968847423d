"""Bit equality of tensors: NaN equals itself, -0.0 differs from 0.0."""

from __future__ import annotations

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes per element -> the integer dtype that shows an element's bits."""


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """View a dense tensor's elements as integers of their size; complex elements as pairs of them."""
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.view(_INTEGERS[tensor.element_size()])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare two dense tensors, on any devices: equal when dtype, shape and the bits of every element are.

    Copies the second one to the first one's device where they differ, and makes both contiguous.
    """
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.is_quantized:
        return torch.equal(one, other)
    here, there = one.detach().contiguous(), other.detach().to(one.device).contiguous()
    return torch.equal(bits_of(here), bits_of(there))
