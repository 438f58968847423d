"""Check that all values are finite: exactly, at memory speed, from bit patterns.

In any of the floating formats the patterns that are not finite are, per sign, the largest when read as an integer. So
two maxima, one signed and one unsigned, decide it. A format without a sign needs only the unsigned one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bridge.errors import NonFinite
from bridge.model.manifest import Manifest

ByteArray = npt.NDArray[np.uint8]

_BLOCK = 1 << 20
"""Elements that the exact scan widens at a time."""

_LIMITS: dict[str, tuple[type[np.signedinteger[Any]], type[np.unsignedinteger[Any]], int]] = {
    "bf16": (np.int16, np.uint16, 0x7F80),
    "fp16": (np.int16, np.uint16, 0x7C00),
    "fp32": (np.int32, np.uint32, 0x7F800000),
    "fp64": (np.int64, np.uint64, 0x7FF0000000000000),
    "fp8_e4m3": (np.int8, np.uint8, 0x7F),
    "fp8_e5m2": (np.int8, np.uint8, 0x7C),
    "fp8_e8m0": (np.int8, np.uint8, 0xFF),
}
"""Wire dtype -> signed and unsigned integer of its size, and the smallest pattern that is not finite, sign bit off."""


def is_finite(raw: ByteArray, dtype: str) -> bool:
    """Tell whether all elements are finite, from their bit patterns; True for dtypes that cannot be otherwise."""
    limits = _LIMITS.get(dtype)
    if limits is None or not len(raw):
        return True
    signed, unsigned, limit = limits
    # Positive patterns are the largest of the signed reading, negative ones the largest of the unsigned reading.
    top = 1 << (8 * np.dtype(unsigned).itemsize - 1)
    return bool(raw.view(signed).max() < limit) and bool(raw.view(unsigned).max() < (top | limit))


def nonfinite_error(manifest: Manifest, tensors: Sequence[torch.Tensor], indices: list[int]) -> NonFinite:
    """Build the error for tensors that are known not to be finite: how many elements of the first one, and where."""
    first, flat = manifest.tensors[indices[0]], tensors[indices[0]].view(-1)
    count, index, value = 0, 0, float("nan")
    for start in range(0, len(flat), _BLOCK):
        block = flat[start : start + _BLOCK].to(torch.float64)
        bad = torch.nonzero(~torch.isfinite(block)).flatten()
        if len(bad) and not count:
            index, value = start + int(bad[0]), float(block[bad[0]])
        count += len(bad)
    at = [int(k) for k in np.unravel_index(index, first.shape)] if first.shape else []
    names = tuple(manifest.tensors[k].name for k in indices)
    more = f", and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return NonFinite(
        f"{first.name} holds values that are not finite{more}",
        where=f"{first.name}{at}",
        expected=f"finite values after the cast to {first.dtype}",
        got=f"{count} of {first.numel} elements, the first is {value}",
        remedy="look for a diverged step or an overflow of the cast; allow_nonfinite=True sends them as they are",
        names=names,
    )


def can_be_nonfinite(dtype: str) -> bool:
    """Tell whether a wire dtype has values that are not finite."""
    return dtype in _LIMITS
