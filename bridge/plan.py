"""Pure geometry: where each element of a tensor goes. No I/O, no torch tensors, no names matched.

A `Region` is a strided window of a flat storage, in elements. A `Move` copies one region of a sent tensor to one region
of an engine parameter; the two have the same shape, dimension by dimension. A `RankPlan` is all moves of one engine
rank. What the plan promises (each destination element exactly once, each sent element at least once) is proven here by
interval arithmetic on runs of consecutive elements, never by counting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from bridge.errors import ProtocolError
from bridge.manifest import Shard

Runs = npt.NDArray[np.int64]
"""Shape [k, 2]: start and end (exclusive) of runs of consecutive elements."""


class Region(msgspec.Struct, frozen=True, array_like=True):
    """A strided window: element offset into the flat storage, shape, strides (in elements, never negative)."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Move(msgspec.Struct, frozen=True, array_like=True):
    """Copy `source` of the sent tensor to `dest` of the engine parameter or buffer at `target`; shapes are equal."""

    tensor: str
    source: Region
    target: str
    dest: Region


class Fill(msgspec.Struct, frozen=True, array_like=True):
    """The engine's loader writes a constant here (vocabulary padding)."""

    target: str
    dest: Region
    value: float


class Target(msgspec.Struct, frozen=True, array_like=True):
    """One canonical parameter or persistent buffer of an engine rank, by its skeleton path."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    buffer: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class RankPlan(msgspec.Struct, frozen=True, dict=True):
    """Everything one rank does with a version. `native` maps module paths that the recorder could not follow to why."""

    targets: tuple[Target, ...]
    moves: tuple[Move, ...]
    fills: tuple[Fill, ...] = ()
    native: dict[str, str] = {}

    @cached_property
    def digest(self) -> bytes:
        """16 bytes over targets, moves and fills in order."""
        return xxhash.xxh3_128_digest(msgspec.msgpack.encode((self.targets, self.moves, self.fills, self.native)))


class Coverage(msgspec.Struct, frozen=True):
    """What a set of regions leaves open or writes twice, as element counts per name."""

    holes: dict[str, int]
    overlaps: dict[str, int]

    @property
    def complete(self) -> bool:
        return not self.holes and not self.overlaps


def dense(shape: Sequence[int], offset: int = 0) -> Region:
    """The row-major region of a whole tensor."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return Region(offset, tuple(shape), tuple(reversed(strides)))


def runs_of(region: Region) -> Runs:
    """The sorted runs of consecutive elements that a region touches; the order of its dimensions does not matter."""
    if region.numel == 0:
        return np.empty((0, 2), dtype=np.int64)
    dims = sorted(((s, n) for n, s in zip(region.shape, region.strides, strict=True) if n > 1), reverse=True)
    length = 1
    while dims and dims[-1][0] <= length:
        stride, size = dims.pop()
        if stride != length:
            raise ProtocolError("a region overlaps itself", got=f"shape {region.shape}, strides {region.strides}")
        length *= size
    starts = np.array([region.offset], dtype=np.int64)
    for stride, size in dims:
        starts = (starts[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
    starts.sort()
    return np.stack([starts, starts + length], axis=1)


def union_gaps(runs: Iterable[Runs], numel: int) -> tuple[int, int]:
    """(elements of [0, numel) that no run touches, elements touched more than once)."""
    parts = [r for r in runs if len(r)]
    if not parts:
        return numel, 0
    merged = np.concatenate(parts)
    order = np.argsort(merged[:, 0], kind="stable")
    starts, ends = merged[order, 0], merged[order, 1]
    if starts[0] < 0 or ends.max() > numel:
        raise ProtocolError("a region reaches outside its tensor", expected=f"[0, {numel})", got=f"up to {ends.max()}")
    reach = np.maximum.accumulate(ends)
    before = np.concatenate([np.zeros(1, dtype=np.int64), reach[:-1]])
    holes = int(np.maximum(starts - before, 0).sum()) + numel - int(reach[-1])
    overlap = int(np.clip(np.minimum(ends, before) - starts, 0, None).sum())
    return holes, overlap


def dest_coverage(plan: RankPlan) -> Coverage:
    """Prove that every element of every target is written exactly once. Natively loaded modules are left out."""
    written: dict[str, list[Runs]] = {t.path: [] for t in plan.targets}
    for item in (*plan.moves, *plan.fills):
        written[item.target].append(runs_of(item.dest))
    holes: dict[str, int] = {}
    overlaps: dict[str, int] = {}
    for target in plan.targets:
        if target.path.rpartition(".")[0] in plan.native:
            continue
        missing, twice = union_gaps(written[target.path], target.numel)
        if missing:
            holes[target.path] = missing
        if twice:
            overlaps[target.path] = twice
    return Coverage(holes, overlaps)


def source_coverage(sizes: dict[str, int], regions: Iterable[tuple[str, Region]]) -> dict[str, int]:
    """Sent tensor -> elements that no rank of an engine reads; empty when every element is used somewhere.

    Reading twice is fine (replicated KV heads), so only holes count. `sizes` maps tensor names to element counts.
    """
    read: dict[str, list[Runs]] = {name: [] for name in sizes}
    for name, region in regions:
        read[name].append(runs_of(region))
    holes = {name: union_gaps(read[name], numel)[0] for name, numel in sizes.items()}
    return {name: missing for name, missing in holes.items() if missing}


def intersect(a: Shard, b: Shard) -> Shard | None:
    """The common box of two shards of the same tensor, or None. Raises ProtocolError when the tensors differ."""
    if a.global_shape != b.global_shape:
        raise ProtocolError("shards of different tensors", expected=str(a.global_shape), got=str(b.global_shape))
    offsets = tuple(max(x, y) for x, y in zip(a.offsets, b.offsets, strict=True))
    ends = tuple(min(x + n, y + m) for x, n, y, m in zip(a.offsets, a.shape, b.offsets, b.shape, strict=True))
    if any(end <= start for start, end in zip(offsets, ends, strict=True)):
        return None
    return Shard(a.global_shape, offsets, tuple(e - s for s, e in zip(offsets, ends, strict=True)))


def cut(nbytes: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut [0, nbytes) into consecutive (start, end) pieces of at most `chunk` bytes."""
    if chunk <= 0:
        raise ProtocolError("a chunk must hold at least one byte", got=str(chunk))
    for start in range(0, nbytes, chunk):
        yield start, min(start + chunk, nbytes)


def compose(view: Region, held: Region, origin: Region) -> Region | None:
    """Translate `view` of a storage into the region it came from.

    The elements of region `held` of that storage are, one for one, the elements of `origin` in another storage (same
    shape). Returns the region of the other storage that `view` shows, with `view`'s shape, or None when `view` is not
    wholly inside `held` in an affine way. Used to follow casts, clones and concatenations between a sent tensor and the
    parameter it ends in.
    """
    digits = _digits(held, origin)
    start = view.offset - held.offset
    source = origin.offset
    position: list[int] = []
    for size, stride, origin_stride in digits:
        index = min(start // stride, size - 1) if start >= 0 else -1
        if index < 0:
            return None
        position.append(index)
        source += index * origin_stride
        start -= index * stride
    if start:
        return None
    strides: list[int] = []
    reach = list(position)
    for size, stride in zip(view.shape, view.strides, strict=True):
        if size <= 1:
            strides.append(0 if not digits else digits[-1][2])
            continue
        for k, (_, held_stride, origin_stride) in enumerate(digits):
            if stride >= held_stride and stride % held_stride == 0:
                reach[k] += (size - 1) * (stride // held_stride)
                strides.append(stride // held_stride * origin_stride)
                break
        else:
            return None
    if any(last >= size for last, (size, _, _) in zip(reach, digits, strict=True)):
        return None
    return Region(source, view.shape, tuple(strides))


def _digits(held: Region, origin: Region) -> list[tuple[int, int, int]]:
    """(size, held stride, origin stride) by falling held stride; neighbours that run on in both are merged."""
    dims = sorted(
        ((n, s, o) for n, s, o in zip(held.shape, held.strides, origin.strides, strict=True) if n > 1),
        key=lambda dim: -dim[1],
    )
    merged: list[tuple[int, int, int]] = []
    for size, stride, origin_stride in dims:
        if merged and merged[-1][1] == size * stride and merged[-1][2] == size * origin_stride:
            merged[-1] = (merged[-1][0] * size, stride, origin_stride)
        else:
            merged.append((size, stride, origin_stride))
    return merged
