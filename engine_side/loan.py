"""Memory shown to an engine's code that has to let go of it again: the arena's, to a post-load step that packs weights.

Spares the copy into memory of our own, half of what a packed weight costs to move.
"""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
import torch


class Loan:
    """The memory of a dense host tensor that is not empty, to be taken once as a tensor with a storage of its own.

    The lender keeps the memory alive. `returned` says whether the borrower, and every view that it made, is gone: what
    still reads lent memory would follow whatever is written there next.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._out: weakref.ref[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] | None = None

    def take(self) -> torch.Tensor:
        """The tensor to lend. Its storage dies with the last tensor that shows it."""
        of = self._tensor
        nbytes = of.numel() * of.element_size()
        memory = (ctypes.c_uint8 * nbytes).from_address(of.data_ptr())
        array = np.frombuffer(memoryview(memory), dtype=np.uint8)
        self._out = weakref.ref(array)
        return torch.from_numpy(array).view(of.dtype).as_strided(of.shape, of.stride())

    def returned(self) -> bool:
        """Does nobody hold what was taken?"""
        return self._out is None or self._out() is None
