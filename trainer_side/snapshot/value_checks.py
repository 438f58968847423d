"""Check the casts that are not roundings.

Floating to floating rounds, as agreed; every other cast keeps the value or is refused: 0.7 must not become the integer
0, nor 300 the byte 44.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from bridge.errors import DtypeMismatch
from bridge.model.torch_dtypes import dtype_name, dtype_of
from bridge.tracing.provenance import exact
from trainer_side.snapshot.batches import SlotViews, TensorCopy, copy_views

_BLOCK = 1 << 20
"""Elements that are widened at a time."""
_LIMIT = 2.0**63


def find_inexact_casts(items: Iterable[TensorCopy], sources: Sequence[torch.Tensor]) -> list[TensorCopy]:
    """List the items with a cast that may change a value otherwise than by rounding; none in the usual case."""
    found = []
    for item in items:
        wire = dtype_of(item.spec.dtype)
        for dtype in {sources[part.index].dtype for part in item.parts} - {wire}:
            rounds = dtype.is_floating_point and wire.is_floating_point
            if not rounds and not exact(dtype, wire):
                found.append(item)
                break
    return found


def require_fit(item: TensorCopy, place: SlotViews, sources: list[torch.Tensor]) -> None:
    """Compare an item as it was written with the tensor that it was cast from.

    Raises DtypeMismatch, exact about the first value that the wire dtype does not hold."""
    for into, out_of in zip(*copy_views([item], place, sources), strict=True):
        written, given = into.detach().reshape(-1), out_of.detach().reshape(-1)
        for start in range(0, len(given), _BLOCK):
            a, b = written[start : start + _BLOCK], given[start : start + _BLOCK].cpu()
            bad = torch.nonzero(~_same_values(a, b)).flatten()
            if len(bad):
                at = start + int(bad[0])
                raise _misfit(item, place, _index(item, into, at), given[at])


def _same_values(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compare values element by element, exactly.

    Casting back would not do: an int8 holds 200 as -56, and gives it back as 200.
    """
    (x, x_whole), (y, y_whole) = _integers(a), _integers(b)
    return (x == y) & x_whole & y_whole


def _integers(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values as int64, and where they are integers of that range."""
    if not t.is_floating_point():
        return t.to(torch.int64), torch.ones_like(t, dtype=torch.bool)
    wide = t.to(torch.float64)
    whole = (wide == wide.trunc()) & (wide >= -_LIMIT) & (wide < _LIMIT)
    return torch.where(whole, wide, 0.0).to(torch.int64), whole


def _index(item: TensorCopy, into: torch.Tensor, at: int) -> list[int]:
    """Element `at` of a view of the item's place in the arena, as an index of the item's tensor."""
    if not item.spec.shape:
        return []
    steps = np.unravel_index(at, tuple(into.shape)) if into.dim() else ()
    linear = int(into.storage_offset()) + sum(int(k) * n for k, n in zip(steps, into.stride(), strict=True))
    return [int(k) for k in np.unravel_index(linear, item.spec.shape)]


def _misfit(item: TensorCopy, place: SlotViews, index: list[int], value: torch.Tensor) -> DtypeMismatch:
    spec = item.spec
    whole = torch.from_numpy(place.bytes_of(spec)).view(dtype_of(spec.dtype)).view(spec.shape)
    return DtypeMismatch(
        f"{spec.name} holds a value that its wire dtype does not",
        where=f"{spec.name}{index}",
        expected=f"values that {spec.dtype} holds exactly",
        got=f"{value.item()!r} of {dtype_name(value.dtype, spec.name)}, which {spec.dtype} makes "
        f"{whole[tuple(index)].item()!r}",
        remedy="push a tensor of the engine's dtype, or check that this name belongs to this tensor",
        names=(spec.name,),
    )
