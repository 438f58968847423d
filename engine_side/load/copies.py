"""Precomputed copies: pairs of views, and the work lists that move or compare their bytes on several threads.

A pair is made once; in the steady state nothing is sliced, looked up or named. Contiguous host memory goes through libc
(`memmove`, `memcmp`: faster than a tensor copy, and both let other threads run), small pieces through one batched call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import torch

from bridge.model.regions import Region
from bridge.model.same_bits import bits_of
from bridge.shm.memcpy import memcmp, memcmp_held, memmove

T = TypeVar("T")

SMALL = 32 << 10
"""Bytes below which a piece is cheaper inside a batched copy."""
INLINE = 1 << 20
"""Bytes below which handing work to threads costs more than it saves."""
CHUNK = 16 << 20
"""Bytes compared by one call, so that threads share even a single large tensor."""
_SLAB = 4 << 20
"""Bytes that are cast and compared at once where plain memory comparison cannot be used."""

MemoryRun = tuple[int, int, int]
"""(live address, sent address, nbytes): contiguous host memory of one dtype on both sides."""


@dataclass(frozen=True, slots=True, eq=False)
class CopyPair:
    """Two views that show the same elements, one for one.

    Attributes:
        live, sent: the view of the engine's tensor, the view of the arena's.
        tensor: index of the sent tensor in the manifest.
        target: path of the parameter in the plan.
        run: the same stretch as addresses, where both sides allow it.
    """

    live: torch.Tensor
    sent: torch.Tensor
    tensor: int
    target: str
    run: MemoryRun | None

    @property
    def nbytes(self) -> int:
        return self.live.numel() * self.live.element_size()

    def turned(self) -> CopyPair:
        """Swap the sides, for a copy from the engine into the arena."""
        run = None if self.run is None else (self.run[1], self.run[0], self.run[2])
        return CopyPair(self.sent, self.live, self.tensor, self.target, run)

    def same_bits(self) -> bool:
        """True when the live side holds exactly the bits of the sent side, after the cast to the live dtype."""
        if self.run is not None:
            return not (memcmp if self.run[2] >= SMALL else memcmp_held)(*self.run)
        return self.first_difference() is None

    def first_difference(self) -> tuple[int, float, float] | None:
        """Find (position in the pair, expected, got) of the first element whose bits differ. Reads every element."""
        live, sent, position = self.live, self.sent, 0
        if live.dim() == 0:
            live, sent = live.reshape(1), sent.reshape(1)
        rows = max(1, _SLAB // max(live[:1].numel() * live.element_size(), 1))
        for start in range(0, live.shape[0], rows):
            have = live[start : start + rows].contiguous().reshape(-1)
            want = sent[start : start + rows].to(device=have.device, dtype=have.dtype).contiguous().reshape(-1)
            differs = bits_of(have) != bits_of(want)
            if bool(differs.any()):
                k = int(differs.to(torch.uint8).argmax())
                return position + k, float(want[k]), float(have[k])
            position += have.numel()
        return None


def make_pair(
    live: torch.Tensor, at: Region, sent: torch.Tensor, of: Region, tensor: int, target: str
) -> CopyPair | None:
    """Pair region `at` of `live` with region `of` of `sent`, relative to each tensor's first element; None when empty.

    Dimensions of one element are dropped, those that run on in both regions are joined.
    """
    if at.numel == 0:
        return None
    dims: list[tuple[int, int, int]] = []
    for size, into, out_of in zip(at.shape, at.strides, of.strides, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * into and dims[-1][2] == size * out_of:
            dims[-1] = (dims[-1][0] * size, into, out_of)
        else:
            dims.append((size, into, out_of))
    shape = [size for size, _, _ in dims]
    a = live.detach().as_strided(shape, [into for _, into, _ in dims], live.storage_offset() + at.offset)
    b = sent.detach().as_strided(shape, [out_of for _, _, out_of in dims], sent.storage_offset() + of.offset)
    run = None
    if a.device.type == b.device.type == "cpu" and a.is_contiguous() and b.is_contiguous() and a.dtype == b.dtype:
        run = (a.data_ptr(), b.data_ptr(), a.numel() * a.element_size())
    return CopyPair(a, b, tensor, target, run)


@dataclass
class CopyBatch:
    """The copies of one thread: long runs, and one batched copy of small, strided and casting pieces."""

    runs: list[MemoryRun] = field(default_factory=list)
    live: list[torch.Tensor] = field(default_factory=list)
    sent: list[torch.Tensor] = field(default_factory=list)
    keep: list[CopyPair] = field(default_factory=list)
    nbytes: int = 0

    def copy(self) -> None:
        """Copy all pieces. Called by a thread of the loader's pool."""
        for into, out_of, nbytes in self.runs:
            memmove(into, out_of, nbytes)
        if self.live:
            torch._foreach_copy_(self.live, self.sent)


def batches(pairs: Sequence[CopyPair], threads: int) -> list[CopyBatch]:
    """Divide pairs into work lists of about equal bytes; a long run may be cut between two of them.

    Runs that are neighbours on both sides are joined.
    """
    total = sum(p.nbytes for p in pairs)
    count = max(1, threads if total >= INLINE else 1)
    share = -(-total // count)
    out = [CopyBatch() for _ in range(count)]
    which = 0
    for item in pairs:
        if item.run is None or item.nbytes < SMALL:
            if out[which].nbytes >= share and which + 1 < count:
                which += 1
            out[which].live.append(item.live)
            out[which].sent.append(item.sent)
            out[which].nbytes += item.nbytes
            continue
        into, out_of, left = item.run
        while left:
            if out[which].nbytes >= share and which + 1 < count:
                which += 1
            room = share - out[which].nbytes if which + 1 < count else left
            step, runs = min(left, max(room, SMALL)), out[which].runs
            if runs and runs[-1][0] + runs[-1][2] == into and runs[-1][1] + runs[-1][2] == out_of:
                runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + step)
            else:
                runs.append((into, out_of, step))
            out[which].keep.append(item)
            out[which].nbytes += step
            into, out_of, left = into + step, out_of + step, left - step
    return [batch for batch in out if batch.nbytes]


def copy_all(pool: ThreadPoolExecutor, work: Sequence[CopyBatch]) -> int:
    """Copy batches on the pool's threads; returns their bytes. Blocks."""
    _run_all(pool, [batch.copy for batch in work])
    return sum([batch.nbytes for batch in work])


def _run_all(pool: ThreadPoolExecutor, jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Run jobs, the last one in this thread; their results in order. Raises the first error after all have ended.
    Blocks."""
    if not jobs:
        return []
    futures = [pool.submit(job) for job in jobs[:-1]]
    try:
        last = jobs[-1]()
    finally:
        for future in futures:
            future.exception()
    return [*[future.result() for future in futures], last]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparisons of one thread."""

    pieces: list[tuple[CopyPair, MemoryRun | None]] = field(default_factory=list)
    small: list[tuple[CopyPair, MemoryRun]] = field(default_factory=list)

    def compare(self) -> list[CopyPair]:
        """Compare everything; returns the pairs that differ, one of several pieces once for each. Called by a thread
        of the loader's pool."""
        differing = [
            pair
            for pair, run in self.pieces
            if (memcmp(*run) if run is not None else pair.first_difference() is not None)
        ]
        return differing + [pair for pair, run in self.small if memcmp_held(*run)]


def compare_all(pool: ThreadPoolExecutor, work: Sequence[Comparison]) -> list[CopyPair]:
    """Run comparisons on the pool's threads; returns the pairs that differ, each once. Blocks."""
    found = _run_all(pool, [each.compare for each in work])
    return list(dict.fromkeys(chain.from_iterable(found)))


def comparisons(pairs: Iterable[CopyPair], threads: int) -> list[Comparison]:
    """Divide pairs into comparisons of about equal bytes, one per thread.

    All small pieces come last, in one list: comparing them holds the interpreter lock, which threads would only pass to
    and fro.
    """
    cut: list[tuple[int, CopyPair, MemoryRun | None]] = []
    small: list[tuple[CopyPair, MemoryRun]] = []
    for item in pairs:
        if item.run is None:
            cut.append((item.nbytes * 4, item, None))  # casting or strided: slower per byte
        elif item.nbytes < SMALL:
            small.append((item, item.run))
        else:
            a, b, nbytes = item.run
            for at in range(0, nbytes, CHUNK):
                step = min(nbytes - at, CHUNK)
                cut.append((step, item, (a + at, b + at, step)))
    out = [Comparison() for _ in range(threads)]
    share = max(1, -(-sum(nbytes for nbytes, _, _ in cut) // threads))
    filled = 0
    for nbytes, item, run in cut:
        out[min(filled // share, threads - 1)].pieces.append((item, run))
        filled += nbytes
    out[-1].small.extend(small)
    return [work for work in out if work.pieces or work.small]
