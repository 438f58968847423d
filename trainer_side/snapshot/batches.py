"""Group small tensors into batches, and make the views that one copy call takes.

Views of the arena are made once per slot. Views of the trainer's tensors are made anew for each push, since none may be
kept: fused experts are cut into runs by one call per live tensor, which is far cheaper than a view at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from bridge.model.manifest import TensorSpec
from bridge.model.regions import Region, dense, follow
from bridge.model.torch_dtypes import dtype_of
from trainer_side.names.tensor_layout import TensorPart
from trainer_side.snapshot.finite import ByteArray, can_be_nonfinite

SMALL = 256 << 10
"""Bytes; tensors up to this are copied and checked many at a time."""
_BATCH = 4 << 20
"""Bytes of small tensors in one unit of work."""
_BATCH_TENSORS = 2048


@dataclass(frozen=True, slots=True)
class UnitWritten:
    """Result of one unit of work: the bytes that had to be written, and manifest indices of tensors that it found not
    to be finite."""

    nbytes: int
    nonfinite: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class TensorCopy:
    """One tensor of the manifest that a push writes, and the parts of live tensors that it is made of."""

    index: int
    spec: TensorSpec
    parts: tuple[TensorPart, ...]


@dataclass(frozen=True, slots=True)
class RunSplit:
    """One live tensor cut into consecutive runs of `sizes` elements; run `picks[i]` goes to `parts[i]`."""

    index: int
    sizes: list[int]
    picks: list[int]
    parts: list[tuple[TensorCopy, TensorPart]]


@dataclass(slots=True)
class SnapshotBatch:
    """Small tensors that are copied by one call.

    Attributes:
        indices: manifest index per item.
        nbytes: of all items.
        spans: stretches of the arena of one floating dtype: its name, bytes from and to, manifest indices from and to
            (exclusive).
        whole: source index per item when every one is one whole tensor, the usual case.
        splits: how to cut the sources when every part is a run of consecutive elements, the usual case for fused
            experts.
        into: slot -> views of what is written there, made once, in the order of `whole` or `splits`.
        seen: slot -> the bytes of each item there, made once.
    """

    items: list[TensorCopy]
    indices: npt.NDArray[np.int64]
    nbytes: int
    spans: list[tuple[str, int, int, int, int]]
    whole: list[int] | None
    splits: list[RunSplit] | None
    into: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    seen: dict[int, list[memoryview]] = field(default_factory=dict)


@dataclass(slots=True)
class SlotViews:
    """Views of one slot of the arena, made once."""

    slot: int
    views: list[memoryview]
    flat: ByteArray
    dests: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def bytes_of(self, spec: TensorSpec) -> ByteArray:
        """View the bytes of one tensor."""
        return self.flat[spec.offset : spec.offset + spec.nbytes]


def make_batches(items: Sequence[TensorCopy]) -> Iterator[SnapshotBatch]:
    """Cut small tensors, in manifest order, into units of work."""
    group: list[TensorCopy] = []
    nbytes = 0
    for item in items:
        group.append(item)
        nbytes += item.spec.nbytes
        if nbytes >= _BATCH or len(group) >= _BATCH_TENSORS:
            yield _batch(group)
            group, nbytes = [], 0
    if group:
        yield _batch(group)


def _batch(items: list[TensorCopy]) -> SnapshotBatch:
    whole = [item.parts[0].index for item in items if len(item.parts) == 1 and item.parts[0].source is None]
    plain = len(whole) == len(items)
    indices, nbytes = np.array([item.index for item in items]), sum(item.spec.nbytes for item in items)
    splits = None if plain else _splits(items)
    return SnapshotBatch(items, indices, nbytes, list(_spans(items)), whole if plain else None, splits)


def _spans(items: Sequence[TensorCopy]) -> Iterator[tuple[str, int, int, int, int]]:
    """Join neighbours in the arena of one floating dtype. Padding between them is never written and reads as zero."""
    first = 0
    for k in range(1, len(items) + 1):
        one, last = items[first].spec, items[k - 1]
        if k < len(items) and items[k].index == last.index + 1 and items[k].spec.dtype == one.dtype:
            continue
        if can_be_nonfinite(one.dtype):
            yield one.dtype, one.offset, last.spec.offset + last.spec.nbytes, items[first].index, last.index + 1
        first = k


def _splits(items: Sequence[TensorCopy]) -> list[RunSplit] | None:
    """Cut the parts out of their sources in order; None unless they are disjoint runs on both sides."""
    by_source: dict[int, list[tuple[int, int, TensorCopy, TensorPart]]] = {}
    for item in items:
        for part in item.parts:
            source, dest = part.source or dense(item.spec.shape), part.dest or dense(item.spec.shape)
            if not _is_run(source) or not _is_run(dest) or not source.numel:
                return None
            by_source.setdefault(part.index, []).append((source.offset, source.numel, item, part))
    splits = []
    for index, runs in by_source.items():
        split, at = RunSplit(index, [], [], []), 0
        for offset, numel, item, part in sorted(runs, key=lambda run: run[0]):
            if offset < at:
                return None
            if offset > at:
                split.sizes.append(offset - at)
            split.picks.append(len(split.sizes))
            split.sizes.append(numel)
            split.parts.append((item, part))
            at = offset + numel
        splits.append(split)
    return splits


def _is_run(region: Region) -> bool:
    plain = dense(region.shape).strides
    return all(n == 1 or a == b for n, a, b in zip(region.shape, region.strides, plain, strict=True))


def _cut(splits: Sequence[RunSplit], sources: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """View the runs of every split, flat; None when a source has strides of its own."""
    out_of: list[torch.Tensor] = []
    for split in splits:
        source = sources[split.index]
        if not source.is_contiguous():
            return None
        runs = source.view(-1)[: sum(split.sizes)].split_with_sizes(split.sizes)
        out_of += runs if len(split.picks) == len(runs) else [runs[k] for k in split.picks]
    return out_of


def batch_views(
    batch: SnapshotBatch, place: SlotViews, sources: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """View where a batch goes and where it comes from, equal shapes side by side."""
    into = batch.into.get(place.slot)
    if batch.whole is not None:
        if into is None:
            into = batch.into[place.slot] = [_dest(item, item.parts[0], place) for item in batch.items]
        return into, [sources[k] for k in batch.whole]
    out_of = None if batch.splits is None else _cut(batch.splits, sources)
    if out_of is None or batch.splits is None:
        return copy_views(batch.items, place, sources)
    if into is None:
        parts = [pair for split in batch.splits for pair in split.parts]
        into = batch.into[place.slot] = [_dest(item, part, place).view(-1) for item, part in parts]
    return into, out_of


def copy_views(
    items: Sequence[TensorCopy], place: SlotViews, sources: Sequence[torch.Tensor] | Mapping[int, torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """View where tensors go and where they come from, one part at a time, whatever their strides."""
    into: list[torch.Tensor] = []
    out_of: list[torch.Tensor] = []
    dests = place.dests
    for item in items:
        for number, part in enumerate(item.parts):
            dest = dests.get((item.index, number))
            if dest is None:
                dest = dests[item.index, number] = _dest(item, part, place)
            source = sources[part.index]
            if part.source is None:
                into.append(dest)
                out_of.append(source)
                continue
            for view, where in _shown(source, part, item.spec):
                into.append(dest if where is None else dest.as_strided(*where))
                out_of.append(view)
    return into, out_of


def _dest(item: TensorCopy, part: TensorPart, place: SlotViews) -> torch.Tensor:
    """View a part's place in the arena, in the shape that it has in the source."""
    whole = torch.from_numpy(place.bytes_of(item.spec)).view(dtype_of(item.spec.dtype)).view(item.spec.shape)
    if part.dest is None:
        return whole
    return whole.as_strided(part.dest.shape, part.dest.strides, part.dest.offset)


Where = tuple[tuple[int, ...], tuple[int, ...], int]


def _shown(source: torch.Tensor, part: TensorPart, spec: TensorSpec) -> Iterator[tuple[torch.Tensor, Where | None]]:
    """View a part's region of a live tensor, and say where each view goes when the part had to be split.

    Regions count row-major; a live tensor with strides of its own may need several views.
    """
    region = part.source
    if region is None or part.dest is None:
        yield source, None
    elif source.is_contiguous():
        yield source.as_strided(region.shape, region.strides, source.storage_offset() + region.offset), None
    else:
        held = dense(tuple(source.shape))
        origin = Region(int(source.storage_offset()), tuple(source.shape), tuple(source.stride()))
        found = follow(region, part.dest, held, origin)
        if found is None or found.outside:
            yield from _shown(source.contiguous(), part, spec)
            return
        for at, to in found.inside:
            yield source.as_strided(at.shape, at.strides, at.offset), (to.shape, to.strides, to.offset)
