"""Collected tensors -> an arena slot, in one pass: cast, digest and finite check while the bytes are warm.

A big tensor is cut at the digest's CHUNK; each chunk is a unit of work, copied, digested and checked in blocks that
stay in cache. Small tensors are copied many at a time into views made once per slot, then digested, and checked with
one pass over the stretch of the arena where they lie side by side.

The finite check looks at bit patterns: in any of the floating formats the patterns that are not finite are, per sign,
the largest when read as an integer. So two maxima per block, one signed and one unsigned, decide it exactly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from bridge.arena import Arena
from bridge.digest import CHUNK, fold
from bridge.dtypes import dtype_of, itemsize
from bridge.errors import ConfigError, NonFinite, ProtocolError
from bridge.manifest import Manifest, TensorSpec
from bridge.plan import Region, cut, dense, follow
from bridge.ports import Written
from trainer_side.source import Collected, Layout, Part

BLOCK = 1 << 20
"""Bytes that are copied, digested and checked before the next ones: they fit a core's cache."""
SMALL = 256 << 10
"""Bytes; tensors up to this are copied and checked many at a time."""
_BATCH = 4 << 20
"""Bytes of small tensors in one unit of work."""
_BATCH_TENSORS = 2048

_LIMITS: dict[str, tuple[type[np.signedinteger[Any]], type[np.unsignedinteger[Any]], int]] = {
    "bf16": (np.int16, np.uint16, 0x7F80),
    "fp16": (np.int16, np.uint16, 0x7C00),
    "fp32": (np.int32, np.uint32, 0x7F800000),
    "fp64": (np.int64, np.uint64, 0x7FF0000000000000),
    "fp8_e4m3": (np.int8, np.uint8, 0x7F),
    "fp8_e5m2": (np.int8, np.uint8, 0x7C),
}
"""Wire dtype -> signed and unsigned integer of its size, and the smallest pattern that is not finite, sign bit off."""

Bytes = npt.NDArray[np.uint8]
Job = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Item:
    """One tensor of the manifest that this layout writes."""

    index: int
    spec: TensorSpec
    parts: tuple[Part, ...]


@dataclass(slots=True)
class _Batch:
    """Small tensors that are copied by one call. `spans`: stretches of the arena of one dtype: its name, bytes from
    and to, manifest indices from and to (exclusive)."""

    items: list[_Item]
    spans: list[tuple[str, int, int, int, int]]
    whole: list[int] | None
    """Source index per item when every one is one whole tensor, the usual case."""
    into: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """Slot -> views of the whole tensors there, made once."""


@dataclass(frozen=True, eq=False)
class _Program:
    """What a layout means for a manifest; made once for both."""

    layout: Layout
    big: list[_Item]
    batches: list[_Batch]
    carried: list[int]


@dataclass(slots=True)
class _Slot:
    """Views of one slot, made once."""

    slot: int
    views: list[memoryview]
    flat: Bytes
    dests: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


class _Problems:
    """Tensors that a check found suspicious; filled by worker threads."""

    def __init__(self) -> None:
        self.indices: set[int] = set()
        self._lock = threading.Lock()

    def add(self, indices: Iterable[int]) -> None:
        with self._lock:
            self.indices.update(indices)


class Snapshotter:
    """Writes versions into the slots of one arena. One call at a time.

    Args:
        arena: open for writing.
        threads: workers that copy; each runs torch single-threaded.
    """

    def __init__(self, arena: Arena, threads: int = 1) -> None:
        if threads < 1:
            raise ConfigError("a snapshot needs at least one thread", got=str(threads))
        self.arena = arena
        self.manifest: Manifest = arena.manifest
        self._pool = _single_threaded_pool(threads)
        self._slots: dict[int, _Slot] = {}
        self._program: _Program | None = None

    def close(self) -> None:
        """Stop the workers and drop every view of the arena. Idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._slots.clear()

    def write(
        self, slot: int, collected: Collected, *, base: int | None = None, allow_nonfinite: bool = False
    ) -> Written:
        """Write every tensor, cast to its wire dtype (`tensor.to(dtype)`), into an unsealed slot; blocks for one pass.

        Tensors of the manifest that were not collected are carried over from slot `base`. The caller begins and seals
        the slot; when this raises, the slot's contents are undefined and nothing else has changed. When it returns, the
        trainer's tensors may change.

        Raises NonFinite (names of all tensors with NaN or infinity after the cast, where the first one is),
        ProtocolError (a collected tensor that the manifest lacks or holds with another shape; tensors to carry over but
        no base).
        """
        program = self._compiled(collected.layout)
        place = self._slot(slot)
        digests = np.zeros(len(self.manifest.tensors), dtype="<u8")
        _wait_for_devices(collected.sources)
        problems = _Problems()
        with torch.no_grad():
            later = self._run(program, place, collected.sources, digests, problems)
        for index, pieces in later:
            digests[index] = fold(pieces)
        if problems.indices and not allow_nonfinite:
            raise _nonfinite(self.manifest, self.arena.tensors(slot), sorted(problems.indices))
        nbytes = sum(item.spec.nbytes for item in program.big)
        nbytes += sum(item.spec.nbytes for batch in program.batches for item in batch.items)
        nbytes += self._carry(program.carried, slot, base, digests)
        return Written(digests.tobytes(), nbytes)

    def _run(
        self,
        program: _Program,
        place: _Slot,
        sources: list[torch.Tensor],
        digests: npt.NDArray[np.uint64],
        problems: _Problems,
    ) -> list[tuple[int, list[int]]]:
        """Run all units of work; (manifest index, chunk digests) of the tensors that were cut come back."""
        jobs: list[Job] = []
        later: list[tuple[int, list[int]]] = []
        for item in program.big:
            pieces = [0] * -(-item.spec.nbytes // CHUNK)
            later.append((item.index, pieces))
            jobs += _big_jobs(item, place, sources, pieces, problems)
        jobs += [_small_job(batch, place, sources, digests, problems) for batch in program.batches]
        futures = [self._pool.submit(job) for job in jobs]
        try:
            for future in futures:
                future.result()
        finally:
            # A failed unit ends the snapshot: nobody may still write when the caller reuses the slot.
            for future in futures:
                future.cancel()
            for future in futures:
                if not future.cancelled():
                    future.exception()
        return later

    def _carry(self, carried: list[int], slot: int, base: int | None, digests: npt.NDArray[np.uint64]) -> int:
        """Copy the tensors that were not sent from the base slot, with the digests it was sealed with."""
        if not carried:
            return 0
        seal = None if base is None else self.arena.seal_of(base)
        if base is None or seal is None:
            name = self.manifest.tensors[carried[0]].name
            raise ProtocolError(
                "tensors were not sent and there is no version to take them from",
                where=name,
                got=f"{len(carried)} of {len(self.manifest.tensors)} tensors missing",
                remedy="push all tensors first",
                names=tuple(self.manifest.tensors[k].name for k in carried),
            )
        known = np.frombuffer(seal.digests, dtype="<u8")
        here, there = self.arena.flat(slot), self.arena.flat(base)
        for index in carried:
            spec = self.manifest.tensors[index]
            np.copyto(here[spec.offset : spec.offset + spec.nbytes], there[spec.offset : spec.offset + spec.nbytes])
            digests[index] = known[index]
        return sum(self.manifest.tensors[index].nbytes for index in carried)

    def _slot(self, slot: int) -> _Slot:
        if slot not in self._slots:
            self._slots[slot] = _Slot(slot, self.arena.views(slot), self.arena.flat(slot))
        return self._slots[slot]

    def _compiled(self, layout: Layout) -> _Program:
        if self._program is None or self._program.layout is not layout:
            self._program = _compile(self.manifest, layout)
            for place in self._slots.values():
                place.dests.clear()
        return self._program


def _compile(manifest: Manifest, layout: Layout) -> _Program:
    """Sort a layout's tensors into big ones and batches, in manifest order."""
    position = {spec.name: k for k, spec in enumerate(manifest.tensors)}
    items = []
    for info, parts in zip(layout.tensors, layout.parts, strict=True):
        index = position.get(info.name)
        spec = None if index is None else manifest.tensors[index]
        if index is None or spec is None or spec.shape != info.shape:
            raise ProtocolError(
                "a collected tensor is not the one that was planned",
                where=info.name,
                expected="absent" if spec is None else str(list(spec.shape)),
                got=str(list(info.shape)),
                remedy="plan again before the snapshot",
                names=(info.name,),
            )
        items.append(_Item(index, spec, parts))
    items.sort(key=lambda item: item.index)
    written = {item.index for item in items}
    return _Program(
        layout,
        [item for item in items if item.spec.nbytes > SMALL],
        list(_batches([item for item in items if item.spec.nbytes <= SMALL])),
        [k for k in range(len(manifest.tensors)) if k not in written],
    )


def _batches(items: Sequence[_Item]) -> Iterator[_Batch]:
    group: list[_Item] = []
    nbytes = 0
    for item in items:
        group.append(item)
        nbytes += item.spec.nbytes
        if nbytes >= _BATCH or len(group) >= _BATCH_TENSORS:
            yield _batch(group)
            group, nbytes = [], 0
    if group:
        yield _batch(group)


def _batch(items: list[_Item]) -> _Batch:
    whole = [item.parts[0].index for item in items if len(item.parts) == 1 and item.parts[0].source is None]
    return _Batch(items, list(_spans(items)), whole if len(whole) == len(items) else None)


def _spans(items: Sequence[_Item]) -> Iterator[tuple[str, int, int, int, int]]:
    """Neighbours in the arena of the same floating dtype. Padding between them is never written and reads as zero."""
    run: list[_Item] = []
    for item in items:
        if run and (item.index != run[-1].index + 1 or item.spec.dtype != run[-1].spec.dtype):
            yield from _span(run)
            run = []
        run.append(item)
    yield from _span(run)


def _span(run: Sequence[_Item]) -> Iterator[tuple[str, int, int, int, int]]:
    if run and run[0].spec.dtype in _LIMITS:
        last = run[-1].spec
        yield run[0].spec.dtype, run[0].spec.offset, last.offset + last.nbytes, run[0].index, run[-1].index + 1


def _small_job(
    batch: _Batch,
    place: _Slot,
    sources: list[torch.Tensor],
    digests: npt.NDArray[np.uint64],
    problems: _Problems,
) -> Job:
    def job() -> None:
        with torch.no_grad():
            if batch.whole is None:
                into, out_of = _copies(batch.items, place, sources)
            else:
                if place.slot not in batch.into:
                    batch.into[place.slot] = [_dest(item, item.parts[0], place) for item in batch.items]
                into, out_of = batch.into[place.slot], [sources[k] for k in batch.whole]
            torch._foreach_copy_(into, out_of)
        views = place.views
        indices = [item.index for item in batch.items]
        digests[indices] = np.fromiter(map(xxhash.xxh3_64_intdigest, [views[k] for k in indices]), dtype="<u8")
        for dtype, start, end, first, stop in batch.spans:
            if not _finite(place.flat[start:end], dtype):
                problems.add(
                    item.index
                    for item in batch.items
                    if first <= item.index < stop and not _finite(_bytes_of(item.spec, place), dtype)
                )

    return job


def _copies(
    items: Sequence[_Item], place: _Slot, sources: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
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


def _dest(item: _Item, part: Part, place: _Slot) -> torch.Tensor:
    """The part's place in the arena, in the shape that it has in the source."""
    whole = torch.from_numpy(_bytes_of(item.spec, place)).view(dtype_of(item.spec.dtype)).view(item.spec.shape)
    if part.dest is None:
        return whole
    return whole.as_strided(part.dest.shape, part.dest.strides, part.dest.offset)


Where = tuple[tuple[int, ...], tuple[int, ...], int]


def _shown(source: torch.Tensor, part: Part, spec: TensorSpec) -> Iterator[tuple[torch.Tensor, Where | None]]:
    """Views of a live tensor that show a part's region, and where each goes when the part had to be split.

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


def _big_jobs(
    item: _Item, place: _Slot, sources: list[torch.Tensor], pieces: list[int], problems: _Problems
) -> Iterator[Job]:
    """Units of work of one big tensor: its chunks when its elements lie in order, else the tensor as a whole."""
    raw, dtype = _bytes_of(item.spec, place), dtype_of(item.spec.dtype)
    source = _in_order(item, sources)
    if source is None:
        into, out_of = _copies([item], place, sources)
        yield lambda: _scattered(item, into, out_of, raw, pieces, problems)
        return
    size = itemsize(item.spec.dtype)
    flat = torch.from_numpy(raw).view(dtype)
    for number, (start, end) in enumerate(cut(len(raw), CHUNK)):
        piece = source[start // size : end // size]
        into_piece = flat[start // size : end // size]
        yield _chunk_job(item, piece, into_piece, raw[start:end], pieces, number, problems)


def _in_order(item: _Item, sources: list[torch.Tensor]) -> torch.Tensor | None:
    """The tensor's elements as one flat view of the live tensor, when they lie so."""
    if len(item.parts) != 1:
        return None
    part = item.parts[0]
    source = sources[part.index]
    if part.source is not None:
        if part.dest != dense(item.spec.shape) or not source.is_contiguous():
            return None
        region = part.source
        source = source.as_strided(region.shape, region.strides, source.storage_offset() + region.offset)
    return source.detach().view(-1) if source.is_contiguous() else None


def _chunk_job(
    item: _Item,
    source: torch.Tensor,
    into: torch.Tensor,
    raw: Bytes,
    pieces: list[int],
    number: int,
    problems: _Problems,
) -> Job:
    dtype = item.spec.dtype
    step = BLOCK // itemsize(dtype)

    def job() -> None:
        hasher, finite = xxhash.xxh3_64(), True
        for start in range(0, len(into), step):
            block = into[start : start + step]
            block.copy_(source[start : start + step])
            written = raw[start * block.itemsize : (start + len(block)) * block.itemsize]
            hasher.update(written.data)
            finite = finite and _finite(written, dtype)
        pieces[number] = hasher.intdigest()
        if not finite:
            problems.add((item.index,))

    return job


def _scattered(
    item: _Item,
    into: list[torch.Tensor],
    out_of: list[torch.Tensor],
    raw: Bytes,
    pieces: list[int],
    problems: _Problems,
) -> None:
    """A big tensor whose elements lie in some other order in the trainer."""
    with torch.no_grad():
        torch._foreach_copy_(into, out_of)
    finite = True
    for number, (start, end) in enumerate(cut(len(raw), CHUNK)):
        pieces[number] = xxhash.xxh3_64_intdigest(raw[start:end].data)
        finite = finite and _finite(raw[start:end], item.spec.dtype)
    if not finite:
        problems.add((item.index,))


def _bytes_of(spec: TensorSpec, place: _Slot) -> Bytes:
    return place.flat[spec.offset : spec.offset + spec.nbytes]


def _finite(raw: Bytes, dtype: str) -> bool:
    """Whether all elements are finite, exactly, from their bit patterns; True for dtypes that cannot be otherwise."""
    limits = _LIMITS.get(dtype)
    if limits is None or not len(raw):
        return True
    signed, unsigned, limit = limits
    # Positive patterns are the largest of the signed reading, negative ones the largest of the unsigned reading.
    top = 1 << (8 * np.dtype(unsigned).itemsize - 1)
    return bool(raw.view(signed).max() < limit) and bool(raw.view(unsigned).max() < (top | limit))


def _nonfinite(manifest: Manifest, tensors: Sequence[torch.Tensor], indices: list[int]) -> NonFinite:
    """The error for tensors that are known not to be finite, exact about the first one."""
    first = manifest.tensors[indices[0]]
    count, index, value = _scan(tensors[indices[0]].view(-1))
    at = [int(k) for k in np.unravel_index(index, first.shape)] if first.shape else []
    names = tuple(manifest.tensors[k].name for k in indices)
    more = f", and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return NonFinite(
        f"{first.name} holds values that are not finite{more}",
        where=f"{first.name}{at}",
        expected=f"finite values after the cast to {first.dtype}",
        got=f"{count} of {first.numel} elements, the first is {value}",
        remedy="look for a diverged step or an overflow of the cast; allow_nonfinite=True sends them as they are",
        names=names,
    )


def _scan(flat: torch.Tensor) -> tuple[int, int, float]:
    """(how many elements are not finite, index of the first, its value), by blocks."""
    count, index, value = 0, 0, float("nan")
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK].to(torch.float64)
        bad = torch.nonzero(~torch.isfinite(block)).flatten()
        if len(bad) and not count:
            index, value = start + int(bad[0]), float(block[bad[0]])
        count += len(bad)
    return count, index, value


def _wait_for_devices(sources: Sequence[torch.Tensor]) -> None:
    """Workers copy on their own streams: what the trainer's stream still computes has to be there first."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in {tensor.device for tensor in sources if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()


def _single_threaded_pool(threads: int) -> ThreadPoolExecutor:
    """A pool whose workers run torch on one thread each, leaving the trainer's own setting as it is.

    torch keeps the number per thread, but remembers the last one set for threads to come: so it is set in the workers
    first and then put back from here.
    """
    kept = torch.get_num_threads()
    started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="weighbridge-snapshot", initializer=start)
    for _ in range(threads):
        pool.submit(lambda: None)
    started.wait()
    torch.set_num_threads(kept)
    return pool
