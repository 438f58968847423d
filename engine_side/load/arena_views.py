"""Views of the arena's own memory for an engine's post-load step, which packs a large weight from it and lets go again.

Spares a copy into memory of our own. The views lie in a private mapping of the same file: a step that writes writes to
pages of its own, as it would in a copy, and a step that keeps a view keeps such pages for good.
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
"""Alignment that a kernel may expect of an allocation's address."""
_Bytes = npt.NDArray[np.uint8]


class ArenaViews:
    """Private views of one arena's memory. One thread at a time.

    Args:
        shared: address of the arena's mapping, in which the tensors to view lie.
        private: a private, writable mapping of the same file.

    Attributes:
        usable: False once a step has kept a view: its pages, and those shared with its neighbours, no longer show the
            arena.
    """

    def __init__(self, shared: int, private: mmap.mmap) -> None:
        self._shared, self._private = shared, private
        self._flat: _Bytes = np.frombuffer(private, dtype=np.uint8)
        self._given: list[tuple[weakref.ref[_Bytes], int, int]] = []
        self.usable = True

    @classmethod
    def of(cls, arena: Arena) -> ArenaViews | None:
        """Map `arena` once more; None where the kernel grants no such mapping (one that never overcommits)."""
        try:
            return cls(arena.address, arena.private())
        except OSError:
            return None

    def view(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Show a tensor of the arena in the private mapping, with a storage of its own. To be followed by `take_back`.

        None for a tensor that is too small to be worth it, not contiguous, or not in this arena.
        """
        if tensor is None or not self.usable or not tensor.is_contiguous():
            return None
        at, nbytes = tensor.data_ptr() - self._shared, tensor.numel() * tensor.element_size()
        if nbytes < LEAST or at < 0 or at + nbytes > len(self._flat) or tensor.data_ptr() % ALIGNED:
            return None
        part = self._flat[at : at + nbytes]
        self._given.append((weakref.ref(part), at, nbytes))
        return torch.from_numpy(part).view(tensor.dtype).view(tensor.shape)

    def take_back(self) -> None:
        """Renew the pages of views that are free again; pages of a view that was kept belong to its keeper from now on.

        Called after the step: no later version may show in a view.
        """
        given, self._given = self._given, []
        for part, at, nbytes in given:
            start = at - at % mmap.PAGESIZE
            if part() is None:
                self._private.madvise(mmap.MADV_DONTNEED, start, at + nbytes - start)
            else:
                self.usable = False
                pages = self._flat[start : at + nbytes : mmap.PAGESIZE]
                pages[...] = pages.copy()  # a page that was written to is a copy

    def close(self) -> None:
        """Let go of the mapping; views that somebody kept stay valid. Idempotent."""
        self.usable = False
        self._flat = np.empty(0, dtype=np.uint8)
        with contextlib.suppress(BufferError):
            self._private.close()
