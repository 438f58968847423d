"""Memory shown to an engine's code that has to let go of it again: the arena's, to a post-load step that packs weights.

Spares the copy into memory of our own, half of what a packed weight costs to move.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class _Window:
    """A dense host tensor's bytes for numpy; keeps their memory alive."""

    def __init__(self, of: torch.Tensor) -> None:
        self._of = of

    @property
    def __array_interface__(self) -> dict[str, Any]:
        nbytes = self._of.numel() * self._of.element_size()
        return {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (self._of.data_ptr(), False)}


class Loan:
    """The memory of a dense host tensor that is not empty, to be taken once as a tensor with a storage of its own.

    `returned` says whether the borrower, and every view that it made, is gone: what still reads lent memory would
    follow whatever is written there next.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._out: weakref.ref[npt.NDArray[np.uint8]] | None = None

    def take(self) -> torch.Tensor:
        """The tensor to lend. Its storage dies with the last tensor that shows it."""
        array: npt.NDArray[np.uint8] = np.asarray(_Window(self._tensor))
        self._out = weakref.ref(array)
        return torch.from_numpy(array).view(self._tensor.dtype).as_strided(self._tensor.shape, self._tensor.stride())

    def returned(self) -> bool:
        """Does nobody hold what was taken?"""
        return self._out is None or self._out() is None
