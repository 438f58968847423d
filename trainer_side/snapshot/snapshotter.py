"""Collected tensors -> an arena slot, in one pass: cast, digest and finite check while the bytes are warm.

A big tensor is cut at the digest's CHUNK; each chunk is a unit of work, copied, digested and checked in blocks that
stay in cache. Small tensors are copied many at a time into views made once per slot, then digested, and checked with
one pass over the stretch of the arena where they lie side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from bridge.errors import ConfigError, ProtocolError
from bridge.model.dtypes import dtype_of, itemsize
from bridge.model.manifest import Manifest
from bridge.model.regions import cut, dense
from bridge.ports import Written
from bridge.shm.arena import Arena
from bridge.shm.memcpy import memcmp, memcmp_held, memmove
from bridge.shm.seal import CHUNK, fold
from trainer_side.names.tensor_layout import Collected, TensorLayout
from trainer_side.snapshot.batches import (
    SMALL,
    CopyBatch,
    SlotViews,
    TensorCopy,
    batch_views,
    bytes_of,
    copy_views,
    make_batches,
)
from trainer_side.snapshot.computed import ComputedGroup, group_computed
from trainer_side.snapshot.computed import jobs as computed_jobs
from trainer_side.snapshot.finite import is_finite, nonfinite_error
from trainer_side.snapshot.value_checks import find_inexact_casts, require_fit

_HELD = 64 << 10
"""Bytes below which a comparison keeps the interpreter lock."""
BLOCK = 1 << 20
"""Bytes that are copied, digested and checked before the next ones: they fit a core's cache."""

ByteArray = npt.NDArray[np.uint8]
CopyJob = Callable[[], None]


@dataclass(frozen=True, eq=False)
class _Program:
    """What a layout means for a manifest; made once for both."""

    layout: TensorLayout
    big: list[TensorCopy]
    batches: list[CopyBatch]
    carried: list[int]
    find_inexact_casts: list[TensorCopy]
    """Items with a cast that may change a value otherwise than by rounding."""
    computed: list[ComputedGroup]
    computes: frozenset[int]
    """Which collected tensors are computed while the snapshot is written."""


class _Tally:
    """What worker threads found: tensors that are not finite, bytes that had to be written."""

    def __init__(self) -> None:
        self.indices: set[int] = set()
        self.nbytes = 0
        self._lock = threading.Lock()

    def suspect(self, indices: Iterable[int]) -> None:
        with self._lock:
            self.indices.update(indices)

    def add_bytes(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes += nbytes


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
        self._slots: dict[int, SlotViews] = {}
        self._program: _Program | None = None
        self._known: dict[int, dict[int, list[int]]] = {}
        """Slot -> manifest index -> chunk digests of what this object wrote there last and found finite."""

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
        DtypeMismatch (a value that the wire dtype does not hold, where that dtype or the trainer's is not floating),
        ProtocolError (a collected tensor that the manifest lacks or holds with another shape; tensors to carry over but
        no base).
        """
        program = self._compiled(collected)
        place = self._slot(slot)
        digests = np.zeros(len(self.manifest.tensors), dtype="<u8")
        _wait_for_devices(collected.sources)
        tally = _Tally()
        known = self._known.pop(slot, {})  # gone for good when this write fails
        with torch.no_grad():
            later = self._run(program, place, collected, digests, tally, known)
        for index, pieces in later:
            digests[index] = fold(pieces)
        for item in program.find_inexact_casts:
            require_fit(item, place, collected.sources)
        if tally.indices and not allow_nonfinite:
            raise nonfinite_error(self.manifest, self.arena.tensors(slot), sorted(tally.indices))
        self._known[slot] = {index: pieces for index, pieces in later if index not in tally.indices}
        carried = self._carry(program.carried, slot, base, digests)
        return Written(digests.tobytes(), tally.nbytes + carried)

    def _run(
        self,
        program: _Program,
        place: SlotViews,
        collected: Collected,
        digests: npt.NDArray[np.uint64],
        tally: _Tally,
        known: dict[int, list[int]],
    ) -> list[tuple[int, list[int]]]:
        """Run all units of work; (manifest index, chunk digests) of the tensors that were cut come back."""
        sources, computed = collected.sources, collected.computed
        jobs: list[CopyJob] = list(
            computed_jobs(program.computed, place, sources, computed, digests, tally.suspect, tally.add_bytes)
        )
        later: list[tuple[int, list[int]]] = []
        for item in program.big:
            pieces = [0] * -(-item.spec.nbytes // CHUNK)
            later.append((item.index, pieces))
            jobs += _big_jobs(item, place, sources, pieces, tally, known.get(item.index))
        jobs += [_small_job(batch, place, sources, digests, tally) for batch in program.batches]
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
        nbytes = 0
        for index in carried:
            spec = self.manifest.tensors[index]
            into, out_of = (flat[spec.offset : spec.offset + spec.nbytes] for flat in (here, there))
            if memcmp(into.ctypes.data, out_of.ctypes.data, spec.nbytes):
                np.copyto(into, out_of)
                nbytes += spec.nbytes
            digests[index] = known[index]
        return nbytes

    def _slot(self, slot: int) -> SlotViews:
        if slot not in self._slots:
            self._slots[slot] = SlotViews(slot, self.arena.views(slot), self.arena.flat(slot))
        return self._slots[slot]

    def _compiled(self, collected: Collected) -> _Program:
        last = self._program
        if last is None or last.layout is not collected.layout or last.computes != collected.computed.keys():
            last = self._program = _compile(self.manifest, collected)
            for place in self._slots.values():
                place.dests.clear()
        return last


def _compile(manifest: Manifest, collected: Collected) -> _Program:
    """Sort a layout's tensors into computed ones, big ones and batches, in manifest order."""
    layout = collected.layout
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
        items.append(TensorCopy(index, spec, parts))
    items.sort(key=lambda item: item.index)
    written = {item.index for item in items}
    computed = group_computed(items, collected.computed)
    apart = {item.index for group in computed for item in group.items}
    copied = [item for item in items if item.index not in apart]
    return _Program(
        layout,
        [item for item in copied if item.spec.nbytes > SMALL],
        list(make_batches([item for item in copied if item.spec.nbytes <= SMALL])),
        [k for k in range(len(manifest.tensors)) if k not in written],
        find_inexact_casts(copied, collected.sources),
        computed,
        frozenset(collected.computed),
    )


def _small_job(
    batch: CopyBatch,
    place: SlotViews,
    sources: list[torch.Tensor],
    digests: npt.NDArray[np.uint64],
    tally: _Tally,
) -> CopyJob:
    def job() -> None:
        with torch.no_grad():
            into, out_of = batch_views(batch, place, sources)
            if not all(map(already_holds, into, out_of)):
                torch._foreach_copy_(into, out_of)
                tally.add_bytes(sum(item.spec.nbytes for item in batch.items))
        indices = batch.indices
        digests[indices] = np.fromiter(map(xxhash.xxh3_64_intdigest, batch.views(place)), "<u8", len(indices))
        for dtype, start, end, first, stop in batch.spans:
            if not is_finite(place.flat[start:end], dtype):
                tally.suspect(
                    item.index
                    for item in batch.items
                    if first <= item.index < stop and not is_finite(bytes_of(item.spec, place), dtype)
                )

    return job


def _big_jobs(
    item: TensorCopy,
    place: SlotViews,
    sources: list[torch.Tensor],
    pieces: list[int],
    tally: _Tally,
    known: list[int] | None,
) -> Iterator[CopyJob]:
    """Units of work of one big tensor: its chunks when its elements lie in order, else the tensor as a whole. `known`
    are the digests of the chunks that the slot holds now."""
    raw, dtype = bytes_of(item.spec, place), dtype_of(item.spec.dtype)
    source = _in_order(item, sources)
    if source is None:
        into, out_of = copy_views([item], place, sources)
        yield lambda: _scattered(item, into, out_of, raw, pieces, tally)
        return
    size = itemsize(item.spec.dtype)
    plain = source.dtype == dtype and source.device.type == "cpu"
    flat = None if plain else torch.from_numpy(raw).view(dtype)
    for number, (start, end) in enumerate(cut(len(raw), CHUNK)):
        piece = source[start // size : end // size]
        if flat is None:
            given: ByteArray = piece.view(torch.uint8).numpy()
            job = _chunk_job(item, _moved(given, raw[start:end]), given, pieces, number, tally)
            yield job if known is None else _unless_held(given, raw[start:end], known, pieces, number, job)
        else:
            write = _cast(piece, flat[start // size : end // size], BLOCK // size)
            yield _chunk_job(item, write, raw[start:end], pieces, number, tally)


def _in_order(item: TensorCopy, sources: list[torch.Tensor]) -> torch.Tensor | None:
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


WriteBlock = Callable[[int, int], int]
"""(first byte, nbytes) of a block of a chunk: bring it into the arena; how many bytes had to be written."""


def _moved(source: ByteArray, into: ByteArray) -> WriteBlock:
    """Bytes as they stand. What lies there from two versions ago and is the same needs no write; where it is not, the
    comparison ends at once."""

    def write(at: int, nbytes: int) -> int:
        out_of, to = source.ctypes.data, into.ctypes.data  # asked for here, so that both live as long as this function
        if not memcmp(to + at, out_of + at, nbytes):
            return 0
        memmove(to + at, out_of + at, nbytes)
        return nbytes

    return write


def _cast(source: torch.Tensor, into: torch.Tensor, step: int) -> WriteBlock:
    """Another dtype, or memory of a device; `step` elements are one block."""
    size = into.itemsize

    def write(at: int, nbytes: int) -> int:
        first = at // size
        into[first : first + step].copy_(source[first : first + step])
        return nbytes

    return write


def _chunk_job(
    item: TensorCopy, write: WriteBlock, shown: ByteArray, pieces: list[int], number: int, tally: _Tally
) -> CopyJob:
    """`shown` is what is digested and checked: the trainer's own bytes where they travel as they are (the arena's may
    not be in cache, and a tensor that changes meanwhile is found out), else what the cast has written."""
    dtype = item.spec.dtype

    def job() -> None:
        hasher, finite, copied = xxhash.xxh3_64(), True, 0
        for start in range(0, len(shown), BLOCK):
            block = shown[start : start + BLOCK]
            copied += write(start, len(block))
            hasher.update(block.data)
            finite = finite and is_finite(block, dtype)
        pieces[number] = hasher.intdigest()
        tally.add_bytes(copied)
        if not finite:
            tally.suspect((item.index,))

    return job


def _unless_held(
    source: ByteArray, raw: ByteArray, known: list[int], pieces: list[int], number: int, job: CopyJob
) -> CopyJob:
    """Where the slot still has all of a chunk, its digest is known: a comparison is all that is left to do."""

    def run() -> None:
        if memcmp(raw.ctypes.data, source.ctypes.data, len(raw)):
            job()
        else:
            pieces[number] = known[number]

    return run


def already_holds(into: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether a view of the arena already has a tensor's bits, where that is cheap to tell. `source` is a collected
    tensor or a view of one: its memory holds its values."""
    if source.dtype != into.dtype or not source.is_contiguous() or source.device.type != "cpu":
        return False
    nbytes = into.numel() * into.itemsize
    compare = memcmp_held if nbytes < _HELD else memcmp
    return compare(into.data_ptr(), source.data_ptr(), nbytes) == 0


def _scattered(
    item: TensorCopy,
    into: list[torch.Tensor],
    out_of: list[torch.Tensor],
    raw: ByteArray,
    pieces: list[int],
    tally: _Tally,
) -> None:
    """A big tensor whose elements lie in some other order in the trainer."""
    with torch.no_grad():
        torch._foreach_copy_(into, out_of)
    finite = True
    for number, (start, end) in enumerate(cut(len(raw), CHUNK)):
        pieces[number] = xxhash.xxh3_64_intdigest(raw[start:end].data)
        finite = finite and is_finite(raw[start:end], item.spec.dtype)
    if not finite:
        tally.suspect((item.index,))
    tally.add_bytes(item.spec.nbytes)


def _wait_for_devices(sources: Sequence[torch.Tensor]) -> None:
    """Workers copy on their own streams: what the trainer's stream still computes has to be there first."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in {tensor.device for tensor in sources if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()


def _single_threaded_pool(threads: int) -> ThreadPoolExecutor:
    """A pool whose workers run torch on one thread each, leaving the trainer's own setting as it is.

    torch keeps the number per thread, but a thread takes the last one set anywhere when it first asks: so each worker
    asks, then sets its own, and then the trainer's is put back from here.
    """
    kept = torch.get_num_threads()
    started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="weighbridge-snapshot", initializer=start)
    for _ in range(threads):
        pool.submit(lambda: None)
    started.wait()
    torch.set_num_threads(kept)
    return pool
