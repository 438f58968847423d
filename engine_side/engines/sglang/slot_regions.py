"""Find the rectangles of a LoRA's tensors, and the zeros around them, in matrices of element numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from bridge.errors import UnsupportedLora
from bridge.model.manifest import TensorInfo
from engine_side.protocol import LoraView

Codes = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Box = tuple[slice, slice]
"""Rows and columns of a matrix."""


@dataclass(frozen=True)
class SglangSlotRegion:
    """`box` of `buffer` holds the elements `index` of `tensor`."""

    buffer: str
    box: Box
    tensor: str
    index: Box


@dataclass(frozen=True)
class SglangSlotLayout:
    """The layout of a LoRA in a slot: where its tensors lie, and which boxes of the slot are zero."""

    regions: tuple[SglangSlotRegion, ...]
    zeros: tuple[tuple[str, Box], ...]

    def views(self, buffers: Mapping[str, torch.Tensor]) -> list[LoraView]:
        """Return the regions as views of one slot's matrices; the first view carries all zeros."""
        padding = tuple(buffers[name][box] for name, box in self.zeros)
        return [
            LoraView(region.tensor, buffers[region.buffer][region.box], region.index, () if k else padding)
            for k, region in enumerate(self.regions)
        ]


def read_layout(buffers: Mapping[str, Codes], tensors: Sequence[TensorInfo], starts: Sequence[int]) -> SglangSlotLayout:
    """Read a slot's layout after the engine loaded tensors of element numbers into it.

    Args:
        buffers: matrices in which 0 is no element and `starts[k] + i` is element i of tensor k.
        starts: ascending, from 1.

    Raises UnsupportedLora for an arrangement that is not made of rectangles.
    """
    regions: list[SglangSlotRegion] = []
    zeros: list[tuple[str, Box]] = []
    widths = np.asarray([0, *(info.shape[1] for info in tensors)], dtype=np.int64)
    for name, codes in buffers.items():
        if not codes.size:
            continue
        filled = codes > 0
        left, count = filled.argmax(axis=1), filled.sum(axis=1)
        rows = np.arange(len(codes))
        first = np.where(count > 0, codes[rows, left], 0).astype(np.int64)
        owner = np.searchsorted(np.asarray(starts), first, side="right")  # 0 for a row without elements
        origin = first - rows * widths[owner]  # stays equal over rows that follow each other in the tensor too
        keys = np.stack([left, count, owner, origin], axis=1)
        edges = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1
        for top, bottom in pairwise([0, *edges.tolist(), len(codes)]):
            begin, end = int(left[top]), int(left[top] + count[top])
            around = (slice(0, begin), slice(end, codes.shape[1]))
            zeros += [(name, (slice(top, bottom), columns)) for columns in around if columns.start < columns.stop]
            if end > begin:
                k, box = int(owner[top]) - 1, (slice(top, bottom), slice(begin, end))
                index = _index(codes[box], int(first[top]), starts[k], tensors[k], name)
                regions.append(SglangSlotRegion(name, box, tensors[k].name, index))
    return SglangSlotLayout(tuple(regions), tuple(zeros))


def _index(codes: Codes, first: int, start: int, info: TensorInfo, buffer: str) -> Box:
    height, width = info.shape
    row, column = divmod(first - start, width)
    rows, columns = codes.shape
    wanted = first + np.arange(rows, dtype=np.int64)[:, None] * width + np.arange(columns, dtype=np.int64)
    if row + rows > height or column + columns > width or not np.array_equal(codes, wanted):
        raise UnsupportedLora(
            "the engine arranges an adapter in a way that cannot be read back",
            where=f"{info.name} in {buffer}",
            expected="rectangles of the adapter's tensors",
            got=f"rows of other elements from row {row}, column {column} on",
            remedy="push mode='merged'",
        )
    return slice(row, row + rows), slice(column, column + columns)
