"""Precomputed copies: pairs of views, and the work lists that move or compare their bytes on several threads.

A pair is made once; in the steady state nothing is sliced, looked up or named. Contiguous host memory goes through libc
(`memmove`, `memcmp`: faster than a tensor copy, and both let other threads run), small pieces through one batched call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from bridge.model.regions import Region
from bridge.shm.memcpy import memcmp, memcmp_held, memmove
from engine_side.live.storage_layout import bits

SMALL = 32 << 10
"""Bytes below which a piece is cheaper inside a batched copy."""
INLINE = 1 << 20
"""Bytes below which handing work to threads costs more than it saves."""
_STEP = 4 << 20
"""Bytes that are cast or compared at once where plain memory comparison cannot be used."""


@dataclass(frozen=True, slots=True)
class CopyPair:
    """`live` and `sent` show the same elements, one for one; `tensor` is the manifest index, `target` the plan's path.

    `run` is (live address, sent address, nbytes) where both are contiguous host memory of one dtype, else None.
    """

    live: torch.Tensor
    sent: torch.Tensor
    tensor: int
    target: str
    module: str
    run: tuple[int, int, int] | None

    @property
    def nbytes(self) -> int:
        return self.live.numel() * self.live.element_size()


def pair(
    live: torch.Tensor, at: Region, sent: torch.Tensor, of: Region, tensor: int, target: str, module: str
) -> CopyPair | None:
    """The pair of two regions (relative to each tensor's first element); None for an empty one."""
    if at.numel == 0:
        return None
    shape, into, out_of = _simplify(at, of)
    a = live.detach().as_strided(shape, into, live.storage_offset() + at.offset)
    b = sent.detach().as_strided(shape, out_of, sent.storage_offset() + of.offset)
    flat = a.is_contiguous() and b.is_contiguous() and a.dtype == b.dtype
    run = None
    if flat and a.device.type == "cpu" and b.device.type == "cpu":
        run = (a.data_ptr(), b.data_ptr(), a.numel() * a.element_size())
    return CopyPair(a, b, tensor, target, module, run)


def _simplify(at: Region, of: Region) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(shape, strides, strides): dimensions of one element dropped, those that run on in both regions joined."""
    dims: list[tuple[int, int, int]] = []
    for size, a, b in zip(at.shape, at.strides, of.strides, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * a and dims[-1][2] == size * b:
            dims[-1] = (dims[-1][0] * size, a, b)
        else:
            dims.append((size, a, b))
    return tuple(d[0] for d in dims), tuple(d[1] for d in dims), tuple(d[2] for d in dims)


@dataclass
class CopyBatch:
    """What one thread does: long runs, one batched copy of small pieces, and strided or casting copies."""

    runs: list[tuple[int, int, int]] = field(default_factory=list)
    live: list[torch.Tensor] = field(default_factory=list)
    sent: list[torch.Tensor] = field(default_factory=list)
    keep: list[CopyPair] = field(default_factory=list)
    nbytes: int = 0

    def copy(self) -> None:
        for into, out_of, nbytes in self.runs:
            memmove(into, out_of, nbytes)
        if self.live:
            torch._foreach_copy_(self.live, self.sent)


def batches(pairs: Sequence[CopyPair], threads: int) -> list[CopyBatch]:
    """Work lists of about equal bytes; a long run may be cut between two of them. Runs that are neighbours on both
    sides are joined."""
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
            step = min(left, max(room, SMALL))
            _append_run(out[which].runs, (into, out_of, step))
            out[which].keep.append(item)
            out[which].nbytes += step
            into, out_of, left = into + step, out_of + step, left - step
    return [batch for batch in out if batch.nbytes]


def _append_run(runs: list[tuple[int, int, int]], run: tuple[int, int, int]) -> None:
    if runs:
        into, out_of, nbytes = runs[-1]
        if into + nbytes == run[0] and out_of + nbytes == run[1]:
            runs[-1] = (into, out_of, nbytes + run[2])
            return
    runs.append(run)


def run_all(pool: ThreadPoolExecutor, jobs: Sequence[Callable[[], None]]) -> None:
    """Run jobs, the last one in this thread; raises the first error after all have ended."""
    if not jobs:
        return
    futures = [pool.submit(job) for job in jobs[:-1]]
    try:
        jobs[-1]()
    finally:
        for future in futures:
            future.exception()
    for future in futures:
        future.result()


def _compare(run: tuple[int, int, int]) -> bool:
    """Do the two sides of a run differ?"""
    return (memcmp if run[2] >= SMALL else memcmp_held)(*run) != 0


def same_bits(item: CopyPair) -> bool:
    """Does the live side hold exactly the bits of the sent side, after the cast to the live dtype?"""
    if item.run is not None:
        return not _compare(item.run)
    return _first_difference(item.live, item.sent) is None


def first_difference(item: CopyPair) -> tuple[int, float, float] | None:
    """(position in the pair, expected, got) of the first element whose bits differ, and None when none does."""
    return None if same_bits(item) else _first_difference(item.live, item.sent)


def _first_difference(live: torch.Tensor, sent: torch.Tensor) -> tuple[int, float, float] | None:
    position = 0
    for a, b in _slabs(live, sent):
        want = b.to(device=a.device, dtype=a.dtype).contiguous().reshape(-1)
        have = a.contiguous().reshape(-1)
        differs = bits(have) != bits(want)
        if bool(differs.any()):
            k = int(differs.to(torch.uint8).argmax())
            return position + k, float(want[k]), float(have[k])
        position += have.numel()
    return None


def _slabs(live: torch.Tensor, sent: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Both tensors in slices along the first dimension of at most about _STEP bytes."""
    if live.dim() == 0:
        return [(live, sent)]
    rows = max(1, _STEP // max(live[0].numel() * live.element_size(), 1))
    starts = range(0, live.shape[0], rows)
    return ((live[k : k + rows], sent[k : k + rows]) for k in starts)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of one pair that one thread compares; `run` None: the whole pair, by value."""

    pair: CopyPair
    run: tuple[int, int, int] | None


CHUNK = 16 << 20
"""Bytes compared by one call, so that threads share even a single large tensor."""


def chunks(pairs: Iterable[CopyPair], threads: int) -> list[list[Chunk]]:
    """Comparison work for each thread, of about equal bytes. All small pieces come last, in one list: comparing them
    holds the interpreter lock, which threads would only pass to and fro."""
    cut: list[tuple[int, Chunk]] = []
    small: list[Chunk] = []
    for item in pairs:
        if item.run is not None and item.nbytes < SMALL:
            small.append(Chunk(item, item.run))
            continue
        if item.run is None:
            cut.append((item.nbytes * 4, Chunk(item, None)))  # casting or strided: slower per byte
            continue
        a, b, left = item.run
        while left:
            step = min(left, CHUNK)
            cut.append((step, Chunk(item, (a, b, step))))
            a, b, left = a + step, b + step, left - step
    out: list[list[Chunk]] = [[] for _ in range(threads)]
    share = -(-sum(n for n, _ in cut) // max(threads, 1))
    filled = 0
    for nbytes, chunk in cut:
        out[min(filled // max(share, 1), threads - 1)].append(chunk)
        filled += nbytes
    if small:
        out[-1].extend(small)
    return [work for work in out if work]


def differing(work: Iterable[Chunk]) -> list[Chunk]:
    """Chunks whose two sides differ."""
    return [c for c in work if (not same_bits(c.pair) if c.run is None else _compare(c.run))]
