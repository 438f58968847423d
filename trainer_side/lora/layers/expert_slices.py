"""Which rows and columns of which expert of a live weight a checkpoint tensor is. Pure geometry on baked regions."""

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
    """The part of the live weight of this shape that a checkpoint tensor is; None when it is no such part."""
    if len(tensor.pieces) != 1 or len(tensor.shape) != 2 or len(shape) not in (2, 3):
        return None
    piece = tensor.pieces[0]
    if piece.live != live or not _whole(piece.dest, tensor.shape):
        return None
    strides = _strides(piece.source, tensor.shape)
    if strides is None:
        return None
    height, width = shape[-2:]
    expert, start = divmod(piece.source.offset, height * width)
    row, column = divmod(start, width)
    axes = [_axis(n, stride, width) for n, stride in zip(tensor.shape, strides, strict=True)]
    first, second = axes
    if first is None and second is None:
        axes = [(True, 1), (False, 1)]
    elif first is None and second is not None:
        axes = [(not second[0], 1), second]
    elif second is None and first is not None:
        axes = [first, (not first[0], 1)]
    spans: dict[bool, slice] = {}
    for n, axis in zip(tensor.shape, axes, strict=True):
        if axis is None or axis[0] in spans:
            return None
        is_row, step = axis
        begin, limit = (row, height) if is_row else (column, width)
        if begin + (n - 1) * step >= limit:
            return None
        spans[is_row] = slice(begin, begin + (n - 1) * step + 1, step)
    return ExpertSlice(expert, spans[True], spans[False], transposed=axes[0] is not None and not axes[0][0])


def _whole(region: Region, shape: tuple[int, ...]) -> bool:
    return region.offset == 0 and _strides(region, shape) == dense(shape).strides


def _strides(region: Region, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of a region seen in another shape, row-major; None where there are none."""
    if region.numel != torch.Size(shape).numel() or not region.numel:
        return None
    try:
        return torch.empty_strided(region.shape, region.strides, device="meta").view(shape).stride()
    except RuntimeError:  # torch's way to say that no view has this shape
        return None


def _axis(n: int, stride: int, width: int) -> tuple[bool, int] | None:
    """(along the rows, step) of a dimension; None of one that has a single element."""
    if n == 1:
        return None
    if stride % width == 0:
        return True, stride // width
    return False, stride
