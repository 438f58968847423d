"""Pure geometry of plans: regions of tensors, moves between them, and proofs about both. No I/O, no torch.

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

from bridge.errors import REPORT, ProtocolError
from bridge.model.manifest import Shard

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


class Routes(msgspec.Struct, frozen=True):
    """The ways of checkpoint tensors into a module.

    Attributes:
        moves: from sent names to live tensors; regions count from the live tensor's first element in its storage.
        shapes: the shape of every name that the module takes.
    """

    moves: tuple[Move, ...]
    shapes: dict[str, tuple[int, ...]]


class Fill(msgspec.Struct, frozen=True, array_like=True):
    """A constant that the engine's loader writes to a region (vocabulary padding)."""

    target: str
    dest: Region
    value: float


class TargetTensor(msgspec.Struct, frozen=True, array_like=True):
    """One canonical parameter or persistent buffer of an engine rank, by its skeleton path."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    buffer: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class RankPlan(msgspec.Struct, frozen=True, dict=True):
    """The moves and fills of one rank. `computed` maps targets whose values the recorder could not follow to why."""

    targets: tuple[TargetTensor, ...]
    moves: tuple[Move, ...]
    fills: tuple[Fill, ...] = ()
    computed: dict[str, str] = {}

    @cached_property
    def digest(self) -> bytes:
        """16 bytes over targets, moves and fills in order."""
        return xxhash.xxh3_128_digest(msgspec.msgpack.encode((self.targets, self.moves, self.fills, self.computed)))


class Coverage(msgspec.Struct, frozen=True):
    """The elements that a set of regions leaves open or writes twice, as counts per name."""

    holes: dict[str, int]
    overlaps: dict[str, int]

    @property
    def complete(self) -> bool:
        return not self.holes and not self.overlaps


def dense(shape: Sequence[int], offset: int = 0) -> Region:
    """Make the row-major region of a whole tensor."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return Region(offset, tuple(shape), tuple(reversed(strides)))


def runs_of(region: Region) -> Runs:
    """List the sorted runs of consecutive elements that a region touches; the order of dimensions does not matter."""
    if len(region.shape) != len(region.strides):
        raise ProtocolError(
            "a region's shape and strides differ in length",
            where="a region",
            expected="one stride per dimension",
            got=f"{region.shape}, {region.strides}",
            remedy=REPORT,
        )
    if region.numel == 0:
        return np.empty((0, 2), dtype=np.int64)
    dims = sorted(((s, n) for n, s in zip(region.shape, region.strides, strict=True) if n > 1), reverse=True)
    length = 1
    while dims and dims[-1][0] <= length:
        stride, size = dims.pop()
        if stride != length:
            raise ProtocolError(
                "a region overlaps itself",
                where="a region",
                expected="each element once",
                got=f"shape {region.shape}, strides {region.strides}",
                remedy=REPORT,
            )
        length *= size
    starts = np.array([region.offset], dtype=np.int64)
    for stride, size in dims:
        starts = (starts[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
    starts.sort()
    return np.stack([starts, starts + length], axis=1)


def union_gaps(runs: Iterable[Runs], numel: int) -> tuple[int, int]:
    """Count (elements of [0, numel) that no run touches, touches beyond the first of each element)."""
    parts = [r for r in runs if len(r)]
    if not parts:
        return numel, 0
    merged = np.concatenate(parts)
    order = np.argsort(merged[:, 0], kind="stable")
    starts, ends = merged[order, 0], merged[order, 1]
    if starts[0] < 0 or ends.max() > numel:
        raise ProtocolError(
            "a region reaches outside its tensor",
            where="a region",
            expected=f"[0, {numel})",
            got=f"up to {ends.max()}",
            remedy=REPORT,
        )
    reach = np.maximum.accumulate(ends)
    before = np.concatenate([np.zeros(1, dtype=np.int64), reach[:-1]])
    holes = int(np.maximum(starts - before, 0).sum()) + numel - int(reach[-1])
    overlap = int(np.clip(np.minimum(ends, before) - starts, 0, None).sum())
    return holes, overlap


def dest_coverage(plan: RankPlan) -> Coverage:
    """Prove that every element of every target is written exactly once. Computed targets are left out.

    Raises ProtocolError for a move to no target, between different shapes or outside its target.
    """
    written: dict[str, list[Runs]] = {t.path: [] for t in plan.targets}
    for move in plan.moves:
        if move.source.shape != move.dest.shape:
            raise ProtocolError(
                "a move between different shapes", where=f"{move.tensor} -> {move.target}",
                expected=str(move.dest.shape), got=str(move.source.shape), remedy=REPORT
            )  # fmt: skip
    for path, region in [(m.target, m.dest) for m in plan.moves] + [(f.target, f.dest) for f in plan.fills]:
        if path not in written:
            raise ProtocolError(
                "a plan writes to a parameter that it does not list",
                where=path,
                expected="only parameters that it lists",
                got="another",
                remedy=REPORT,
            )
        written[path].append(runs_of(region))
    holes: dict[str, int] = {}
    overlaps: dict[str, int] = {}
    for target in plan.targets:
        if target.path in plan.computed:
            continue
        missing, twice = union_gaps(written[target.path], target.numel)
        if missing:
            holes[target.path] = missing
        if twice:
            overlaps[target.path] = twice
    return Coverage(holes, overlaps)


def source_coverage(sizes: dict[str, int], regions: Iterable[tuple[str, Region]]) -> dict[str, int]:
    """Count per sent tensor the elements that no rank of an engine reads; empty when every element is used somewhere.

    Reading twice is fine (replicated KV heads), so only holes count. `sizes` maps tensor names to element counts.
    """
    read: dict[str, list[Runs]] = {name: [] for name in sizes}
    for name, region in regions:
        if name not in read:
            raise ProtocolError(
                "a plan reads a tensor that was not sent",
                where=name,
                expected="only tensors that were announced",
                got="another",
                remedy=REPORT,
            )
        read[name].append(runs_of(region))
    holes = {name: union_gaps(read[name], numel)[0] for name, numel in sizes.items()}
    return {name: missing for name, missing in holes.items() if missing}


def intersect(a: Shard, b: Shard) -> Shard | None:
    """Intersect two shards of the same tensor; None when they share nothing. Raises ProtocolError for two tensors."""
    if a.global_shape != b.global_shape:
        raise ProtocolError(
            "shards of different tensors",
            where="two shards",
            expected=str(a.global_shape),
            got=str(b.global_shape),
            remedy=REPORT,
        )
    offsets = tuple(max(x, y) for x, y in zip(a.offsets, b.offsets, strict=True))
    ends = tuple(min(x + n, y + m) for x, n, y, m in zip(a.offsets, a.shape, b.offsets, b.shape, strict=True))
    if any(end <= start for start, end in zip(offsets, ends, strict=True)):
        return None
    return Shard(a.global_shape, offsets, tuple(e - s for s, e in zip(offsets, ends, strict=True)))


def cut(nbytes: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut [0, nbytes) into consecutive (start, end) pieces of at most `chunk` bytes."""
    if chunk <= 0:
        raise ProtocolError(
            "a chunk must hold at least one byte", where="a chunk", expected="1 or more", got=str(chunk), remedy=REPORT
        )
    for start in range(0, nbytes, chunk):
        yield start, min(start + chunk, nbytes)


def compose(view: Region, held: Region, origin: Region) -> Region | None:
    """Find the region of another storage that `view` shows, with `view`'s shape; None when it is not one region.

    The elements of region `held` of `view`'s storage are, one for one, the elements of `origin` in the other storage
    (same shape). None when `view` is not wholly inside `held`, or not one region of the other storage: see `follow`.
    """
    found = follow(view, view, held, origin)
    if found is None or found.outside or len(found.inside) != 1 or found.inside[0][0].shape != view.shape:
        return None
    return found.inside[0][0]


class Followed(msgspec.Struct, frozen=True):
    """The result of `follow`: disjoint pairs of regions of equal shape that together are all of the view.

    `inside`: (region of the origin's storage, region of the companion). `outside`: (region of the view's storage,
    region of the companion), for the elements that the held region does not hold.
    """

    inside: list[tuple[Region, Region]]
    outside: list[tuple[Region, Region]]


_Dim = tuple[int, int, int, int, int]
"""size; stride still unexplained; strides in the view's, the companion's and the origin's storage."""


class _Part(msgspec.Struct, frozen=True):
    """A box of the view on its way through the digits: what of its address is still unexplained, and where it lies."""

    level: int
    rest: int
    view: int
    other: int
    origin: int
    dims: tuple[_Dim, ...]

    def window(self, dim: int, start: int, stop: int) -> _Part:
        """Indices [start, stop) of one dimension."""
        _, step, *strides = self.dims[dim]
        changed: _Dim = (stop - start, step, strides[0], strides[1], strides[2])
        return _Part(
            self.level,
            self.rest + start * step,
            self.view + start * strides[0],
            self.other + start * strides[1],
            self.origin + start * strides[2],
            (*self.dims[:dim], changed, *self.dims[dim + 1 :]),
        )

    def fold(self, dim: int, block: int) -> _Part:
        """One dimension as two: whole blocks, and the positions inside a block."""
        size, step, view, other, origin = self.dims[dim]
        outer: _Dim = (size // block, step * block, view * block, other * block, origin * block)
        inner: _Dim = (block, step, view, other, origin)
        return msgspec.structs.replace(self, dims=(*self.dims[:dim], outer, inner, *self.dims[dim + 1 :]))

    def region(self, which: int, offset: int) -> Region:
        return Region(offset, tuple(d[0] for d in self.dims), tuple(d[which] for d in self.dims))


def follow(view: Region, other: Region, held: Region, origin: Region, limit: int = 65536) -> Followed | None:
    """Trace a view of a storage to where its elements came from, splitting it where it must be split.

    The elements of region `held` of the view's storage are, one for one, the elements of `origin` in another storage
    (same shape). `other` is a companion of the view with the same shape (where the view's elements go); it is split
    alongside. None when `held` is not a nest of strides or when more than `limit` parts would be needed.
    """
    if view == held:
        return Followed([(origin, other)] if view.numel else [], [])
    digits = _digits(held, origin)
    found = Followed([], [])
    if digits is None or view.numel == 0:
        return None if digits is None else found
    dims = tuple((n, s, s, o, 0) for n, s, o in zip(view.shape, view.strides, other.strides, strict=True))
    todo = [_Part(0, view.offset - held.offset, view.offset, other.offset, origin.offset, dims)]
    if held.numel == 0:
        return Followed([], [(view, other)])
    for _ in range(limit):
        if not todo:
            return found
        part = todo.pop()
        if part.level == len(digits):
            found.inside.append((part.region(4, part.origin), part.region(3, part.other)))
            continue
        size, stride, origin_stride = digits[part.level]
        pieces = _without_carry(part, stride)
        if pieces is None:
            low = part.rest // stride
            high = low + sum(d[1] // stride * (d[0] - 1) for d in part.dims)
            if high < 0 or low >= size:
                found.outside.append((part.region(2, part.view), part.region(3, part.other)))
                continue
            pieces = [_descend(part, stride, origin_stride)] if low >= 0 and high < size else _clip(part, stride, size)
        todo.extend(reversed(pieces))
    return None


def _descend(part: _Part, stride: int, origin_stride: int) -> _Part:
    """Explain the part's addresses by one digit and go on with what is left of them."""
    dims = tuple((n, t % stride, v, o, g + t // stride * origin_stride) for n, t, v, o, g in part.dims)
    origin = part.origin + part.rest // stride * origin_stride
    return _Part(part.level + 1, part.rest % stride, part.view, part.other, origin, dims)


def _without_carry(part: _Part, stride: int) -> list[_Part] | None:
    """None when no two elements differ by a carry into this digit; else the part, split towards that."""
    spans = [(n - 1) * (t % stride) for n, t, *_ in part.dims]
    phase = part.rest % stride
    if phase + sum(spans) < stride:
        return None
    dim = max((k for k in range(len(spans)) if spans[k]), key=lambda k: part.dims[k][1] % stride)
    size, step = part.dims[dim][0], part.dims[dim][1] % stride
    if stride % step == 0 and part.dims[dim][1] == step:
        block = stride // step
        head = -(phase // step) % block
        whole = (size - head) // block * block
        if head < size and whole and (head or whole < size or size > block):
            cuts = [(0, head), (head, head + whole), (head + whole, size)]
            parts = [part.window(dim, a, b) for a, b in cuts if a < b]
            middle = 1 if head else 0
            parts[middle] = parts[middle].fold(dim, block)
            return parts
    quiet = (stride - 1 - phase - (sum(spans) - spans[dim])) // step + 1
    first = min(max(quiet, 1), size - 1)
    return [part.window(dim, 0, first), part.window(dim, first, size)]


def _clip(part: _Part, stride: int, size: int) -> list[_Part]:
    """Split a part that lies partly outside [0, size) of a digit, towards parts that lie in it or out of it."""
    low = part.rest // stride
    steps = [t // stride for _, t, *_ in part.dims]
    dim = max((k for k in range(len(steps)) if part.dims[k][0] > 1), key=lambda k: steps[k])
    count, step = part.dims[dim][0], steps[dim]
    others = sum(s * (d[0] - 1) for k, (s, d) in enumerate(zip(steps, part.dims, strict=True)) if k != dim)
    first = min(max(0, -(low // step)), count)
    last = min(max((size - 1 - others - low) // step + 1, 0), count)
    if first < last:
        return [part.window(dim, a, b) for a, b in ((0, first), (first, last), (last, count)) if a < b]
    cut = min(max(first, 1), count - 1)
    return [part.window(dim, 0, cut), part.window(dim, cut, count)]


def _digits(held: Region, origin: Region) -> list[tuple[int, int, int]] | None:
    """List (size, held stride, origin stride) by falling held stride, ending at stride 1; neighbours that run on
    in both are merged. None when two indices of `held` could have the same address."""
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
    reach = 0
    for size, stride, _ in reversed(merged):
        if stride <= reach:
            return None
        reach += (size - 1) * stride
    if not merged or merged[-1][1] != 1:
        merged.append((1, 1, 0))
    return merged
