"""The arena's memory shown to an engine's post-load step, which packs a large weight from it and lets go again.

Spares a copy into memory of our own. What is shown is a private mapping of the same file: a step that writes writes to
pages of its own, as it would in a copy, and a step that keeps what it was shown is left with such pages for good.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref

import numpy as np
import numpy.typing as npt
import torch

from bridge.shm.arena import Arena

LEAST = 1 << 20
"""Bytes below which a copy costs less than putting the pages back in order."""
ALIGNED = 64
"""What a kernel may expect of an allocation's address."""
_Bytes = npt.NDArray[np.uint8]


class ArenaViews:
    """One arena's memory, to lend. One thread at a time.

    Args:
        shared: address of the arena's mapping, in which the tensors to lend lie.
        private: a private, writable mapping of the same file.
    """

    def __init__(self, shared: int, private: mmap.mmap) -> None:
        self._shared, self._private = shared, private
        self._flat: _Bytes = np.frombuffer(private, dtype=np.uint8)
        self._out: list[tuple[weakref.ref[_Bytes], int, int]] = []
        self.lends = True
        """Until something was kept: its pages, and those shared with its neighbours, are the arena's no more."""

    @classmethod
    def of(cls, arena: Arena) -> ArenaViews | None:
        """A lender of `arena`; None where no such mapping is to be had (a kernel that never overcommits)."""
        try:
            return cls(arena.address, arena.private())
        except OSError:
            return None

    def lend(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """The same values in the private mapping, as a tensor with a storage of its own; None for what is not worth it,
        not contiguous, or not in this arena. To be followed by `settle`."""
        if tensor is None or not self.lends or not tensor.is_contiguous():
            return None
        at, nbytes = tensor.data_ptr() - self._shared, tensor.numel() * tensor.element_size()
        if nbytes < LEAST or at < 0 or at + nbytes > len(self._flat) or tensor.data_ptr() % ALIGNED:
            return None
        part = self._flat[at : at + nbytes]
        self._out.append((weakref.ref(part), at, nbytes))
        return torch.from_numpy(part).view(tensor.dtype).view(tensor.shape)

    def settle(self) -> None:
        """What was lent is back, or belongs to who has it: no later version may show there."""
        out, self._out = self._out, []
        for part, at, nbytes in out:
            start = at - at % mmap.PAGESIZE
            if part() is None:
                self._private.madvise(mmap.MADV_DONTNEED, start, at + nbytes - start)
            else:
                self.lends = False
                pages = self._flat[start : at + nbytes : mmap.PAGESIZE]
                pages[...] = pages.copy()  # a page that was written to is a copy

    def close(self) -> None:
        """Let go of the mapping; what somebody kept stays valid. Idempotent."""
        self.lends = False
        self._flat = np.empty(0, dtype=np.uint8)
        with contextlib.suppress(BufferError):
            self._private.close()
