"""Find the rows and columns of the expert of a live weight that a checkpoint tensor is. Pure geometry on regions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bridge.model.regions import Region, dense
from trainer_side.names.naming import CanonicalTensor


@dataclass(frozen=True)
class ExpertSlice:
    """Part of one matrix of a live weight, as the layer stores it.

    Attributes:
        expert: index of the matrix in a 3-D weight; 0 of a 2-D one.
        rows, columns: which of the matrix's.
        transposed: the checkpoint holds the part the other way round.
    """

    expert: int
    rows: slice
    columns: slice
    transposed: bool


def find_slice(tensor: CanonicalTensor, live: str, shape: tuple[int, ...]) -> ExpertSlice | None:
    """Find the part of the live weight of this shape that a checkpoint tensor is; None when it is no such part."""
    if len(tensor.pieces) != 1 or len(tensor.shape) != 2 or len(shape) not in (2, 3):
        return None
    piece = tensor.pieces[0]
    whole = piece.dest.offset == 0 and _strides(piece.dest, tensor.shape) == dense(tensor.shape).strides
    if piece.live != live or not whole:
        return None
    strides = _strides(piece.source, tensor.shape)
    if strides is None:
        return None
    height, width = shape[-2:]
    expert, start = divmod(piece.source.offset, height * width)
    row, column = divmod(start, width)
    # (along the rows, step) of each dimension; one with a single element goes along whatever the other does not
    first, second = (
        None if n == 1 else (stride % width == 0, stride // width if stride % width == 0 else stride)
        for n, stride in zip(tensor.shape, strides, strict=True)
    )
    first = first or ((not second[0], 1) if second else (True, 1))
    second = second or (not first[0], 1)
    spans: dict[bool, slice] = {}
    for n, (is_row, step) in zip(tensor.shape, (first, second), strict=True):
        if is_row in spans:
            return None
        begin, limit = (row, height) if is_row else (column, width)
        if begin + (n - 1) * step >= limit:
            return None
        spans[is_row] = slice(begin, begin + (n - 1) * step + 1, step)
    return ExpertSlice(expert, spans[True], spans[False], transposed=not first[0])


def _strides(region: Region, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Compute the strides of a region seen in another shape, row-major; None where there are none."""
    if region.numel != torch.Size(shape).numel() or not region.numel:
        return None
    try:
        return torch.empty_strided(region.shape, region.strides, device="meta").view(shape).stride()
    except RuntimeError:  # torch's way to say that no view has this shape
        return None
