"""From a matrix of element numbers to the rectangles of tensors that lie in it, and the zeros around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bridge.errors import UnsupportedLora
from bridge.model.manifest import TensorInfo
from engine_side.protocol import LoraView

Codes = npt.NDArray[np.int32] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class Box:
    """Rows and columns of a buffer: half-open ranges."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix[self.top : self.bottom, self.left : self.right]

    @property
    def empty(self) -> bool:
        return self.top >= self.bottom or self.left >= self.right


@dataclass(frozen=True)
class View:
    """`box` of `buffer` holds the elements of `tensor` from (row, column) on."""

    buffer: str
    box: Box
    tensor: str
    row: int
    column: int


@dataclass(frozen=True)
class Placed:
    """Where an adapter lies in a slot, and what of the slot is zero."""

    views: tuple[View, ...]
    zeros: tuple[tuple[str, Box], ...]

    def of(self, buffers: Mapping[str, torch.Tensor]) -> list[LoraView]:
        """The same in a slot's matrices. The zeros come with the first view."""
        padding = tuple(box.of(buffers[name]) for name, box in self.zeros)
        out: list[LoraView] = []
        for view in self.views:
            live = view.box.of(buffers[view.buffer])
            index = (slice(view.row, view.row + live.shape[0]), slice(view.column, view.column + live.shape[1]))
            out.append(LoraView(view.tensor, live, index, padding if not out else ()))
        return out


def places(buffers: Mapping[str, Codes], tensors: Sequence[TensorInfo], starts: Sequence[int]) -> Placed:
    """Read matrices in which 0 is nothing and `starts[k] + i` is element i of tensor k (starts ascend). Raises
    UnsupportedLora for an arrangement that is not made of rectangles."""
    views: list[View] = []
    zeros: list[tuple[str, Box]] = []
    for name, codes in buffers.items():
        for box, code in _boxes(codes, starts):
            for empty in _around(box, codes.shape[1]):
                zeros.append((name, empty))
            if code is None:
                zeros.append((name, box))
                continue
            k = int(np.searchsorted(np.asarray(starts), code, side="right")) - 1
            shape = tensors[k].shape
            row, column = divmod(code - starts[k], shape[1])
            views.append(View(name, box, tensors[k].name, row, column))
            _require_rectangle(codes, box, code, shape[1], starts[k] + shape[0] * shape[1], name)
    return Placed(tuple(views), tuple(zeros))


def _boxes(codes: Codes, starts: Sequence[int]) -> Iterator[tuple[Box, int | None]]:
    """Runs of rows of one tensor that go on like their first: (box, its first number), or (box, None) where there is
    nothing."""
    filled = codes > 0
    left, count = filled.argmax(axis=1), filled.sum(axis=1)
    first = np.where(count > 0, codes[np.arange(len(codes)), left], 0).astype(np.int64)
    owner = np.searchsorted(np.asarray(starts), first, side="right")
    top = 0
    step: int | None = None
    for row in range(1, len(codes) + 1):
        like = row < len(codes) and left[row] == left[top] and count[row] == count[top] and owner[row] == owner[top]
        if like:
            by = int(first[row] - first[row - 1])
            if count[row] == 0 or by == step or (step is None and by > 0):
                step = by
                continue
        right = int(left[top] + count[top]) if count[top] else codes.shape[1]
        yield Box(top, row, int(left[top]), right), int(first[top]) if count[top] else None
        top, step = row, None


def _around(box: Box, width: int) -> list[Box]:
    found = [Box(box.top, box.bottom, 0, box.left), Box(box.top, box.bottom, box.right, width)]
    return [each for each in found if not each.empty]


def _require_rectangle(codes: Codes, box: Box, code: int, width: int, end: int, name: str) -> None:
    rows, columns = box.bottom - box.top, box.right - box.left
    wanted = code + np.arange(rows, dtype=np.int64)[:, None] * width + np.arange(columns, dtype=np.int64)
    if (
        columns > width
        or wanted[-1, -1] >= end
        or not np.array_equal(codes[box.top : box.bottom, box.left : box.right], wanted)
    ):
        raise UnsupportedLora(
            "the engine arranges an adapter in a way that cannot be read back",
            where=name,
            expected="rectangles of its tensors",
            got=f"rows {box.top} to {box.bottom}",
            remedy="push mode='merged'",
        )
