"""Write collected tensors into an arena slot, in one pass: cast, digest and finite check while the bytes are warm.

A big tensor is cut at the digest's CHUNK; each chunk is a unit of work, copied, digested and checked in blocks that
stay in cache. Small tensors are copied many at a time into views made once per slot, then digested, and checked with
one pass over the stretch of the arena where they lie side by side.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xxhash

from bridge.errors import Busy, ConfigError, DeadlineExceeded, ProtocolError
from bridge.model.dtypes import itemsize
from bridge.model.manifest import Manifest
from bridge.model.regions import dense
from bridge.model.torch_dtypes import dtype_of
from bridge.protocol.deadline import Deadline
from bridge.shm.arena import Arena
from bridge.shm.memcpy import memcmp, memcmp_held, memmove
from bridge.shm.seal import CHUNK, fold
from trainer_side.names.tensor_layout import Collected, TensorLayout
from trainer_side.snapshot.batches import (
    SMALL,
    SlotViews,
    SnapshotBatch,
    TensorCopy,
    UnitWritten,
    batch_views,
    make_batches,
)
from trainer_side.snapshot.computed import ComputedGroup, Digests, group_computed, write_group, write_items
from trainer_side.snapshot.finite import ByteArray, is_finite, nonfinite_error
from trainer_side.snapshot.value_checks import find_inexact_casts, require_fit

_HELD = 64 << 10
"""Bytes below which a comparison keeps the interpreter lock."""
BLOCK = 1 << 20
"""Bytes that are copied, digested and checked before the next ones: they fit a core's cache."""
WRITE_TIMEOUT_S = 300.0

WriteJob = Callable[[], UnitWritten]


@dataclass(frozen=True, eq=False)
class _Program:
    """The units of work of one layout into one manifest; made once for both.

    Attributes:
        carried: manifest indices of the tensors that were not sent.
        inexact: items with a cast that may change a value otherwise than by rounding.
        computes: which collected tensors are computed while the snapshot is written.
    """

    layout: TensorLayout
    big: list[TensorCopy]
    batches: list[SnapshotBatch]
    carried: list[int]
    inexact: list[TensorCopy]
    computed: list[ComputedGroup]
    computes: frozenset[int]


@dataclass(frozen=True)
class Copied:
    """Result of one `write`: 8-byte digests in manifest order, and the bytes that had to be written."""

    digests: bytes
    nbytes: int


class Snapshotter:
    """Writes versions into the slots of one arena. One call at a time.

    Args:
        arena: open for writing.
        threads: workers that copy; each runs torch single-threaded. They start with the first `write`.
    """

    def __init__(self, arena: Arena, threads: int = 1) -> None:
        if threads < 1:
            raise ConfigError(
                "a snapshot needs at least one thread",
                where="copy_threads",
                expected="1 or more",
                got=str(threads),
                remedy="leave copy_threads out, or give the number of cores that may copy",
            )
        self.arena = arena
        self.manifest: Manifest = arena.manifest
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._stuck: list[Future[UnitWritten]] = []
        """Units of an earlier write that had not ended at its deadline."""
        self._slots: dict[int, SlotViews] = {}
        self._program: _Program | None = None
        self._known: dict[int, dict[int, list[int]]] = {}
        """Slot -> manifest index -> chunk digests of what this object wrote there last and found finite."""

    def close(self) -> None:
        """Stop the workers and drop every view of the arena; waits for no thread that hangs. Idempotent."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._slots.clear()

    def write(
        self,
        slot: int,
        collected: Collected,
        *,
        base: int | None = None,
        allow_nonfinite: bool = False,
        deadline: Deadline | None = None,
        unused: Collection[str] = (),
    ) -> Copied:
        """Write every tensor but the `unused` ones, cast to its wire dtype (`tensor.to(dtype)`), into an unsealed slot;
        blocks for one pass.

        Tensors of the manifest that were not collected are carried over from slot `base`. The caller begins and seals
        the slot; when this raises, the slot's contents are undefined and nothing else has changed. When it returns, the
        trainer's tensors may change. The deadline is WRITE_TIMEOUT_S from now when none is given.

        Raises:
            NonFinite: the tensors with NaN or infinity after the cast, and where in the first one.
            DtypeMismatch: a value that the wire dtype does not hold, unless both dtypes are floating.
            ProtocolError: a collected tensor that the manifest lacks or holds with another shape; tensors to carry over
                but no base.
            DeadlineExceeded: the copying threads did not start, or did not end, in time.
            Busy: a copying thread that outlasted an earlier call's deadline still runs, and may still write.
        """
        if slot not in self._slots:
            self._slots[slot] = SlotViews(slot, self.arena.views(slot), self.arena.flat(slot))
        program, place, sources = self._compiled(collected, unused), self._slots[slot], collected.sources
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # Workers copy on their own streams: what the trainer's stream still computes has to be there first.
            for device in {tensor.device for tensor in sources if tensor.is_cuda}:
                torch.cuda.current_stream(device).synchronize()
        digests = np.zeros(len(self.manifest.tensors), dtype="<u8")
        known = self._known.pop(slot, {})  # gone for good when this write fails
        pieces: dict[int, list[int]] = {}
        jobs: list[WriteJob] = [partial(write_group, one, place, collected, digests) for one in program.computed]
        for item in program.big:
            source = _in_order(item, sources)
            if source is None:
                jobs.append(partial(write_items, [item], place, sources, digests))
                continue
            chunks = pieces[item.index] = [0] * -(-item.spec.nbytes // CHUNK)
            big = _BigTensor(item, place.bytes_of(item.spec), source, chunks, known.get(item.index))
            jobs += [partial(big.write_chunk, number) for number in range(len(chunks))]
        jobs += [partial(_write_batch, batch, place, sources, digests) for batch in program.batches]
        done = self._run(jobs, deadline or Deadline.after(WRITE_TIMEOUT_S))
        for index, found in pieces.items():
            digests[index] = fold(found)
        for item in program.inexact:
            require_fit(item, place, sources)
        nonfinite = {index for unit in done for index in unit.nonfinite}
        if nonfinite and not allow_nonfinite:
            raise nonfinite_error(self.manifest, self.arena.tensors(slot), sorted(nonfinite))
        self._known[slot] = {index: found for index, found in pieces.items() if index not in nonfinite}
        carried = self._carry(program.carried, slot, base, digests) if program.carried else 0
        return Copied(digests.tobytes(), sum(unit.nbytes for unit in done) + carried)

    def _run(self, jobs: list[WriteJob], deadline: Deadline) -> list[UnitWritten]:
        """Run all units of work on the copying threads; their results in the same order. A failed unit, or the
        deadline, ends the others."""
        if not all(unit.done() for unit in self._stuck):
            raise Busy(
                "a copying thread of an earlier push still runs and may still write",
                where="the snapshot",
                expected="copying threads that end within a push's timeout_s",
                got=f"{sum(not unit.done() for unit in self._stuck)} that did not",
                remedy="push again when it has ended (its device or memory hangs), or restart the trainer",
            )
        pool = self._pool = self._pool or _single_threaded_pool(self._threads, deadline)
        units = [pool.submit(job) for job in jobs]
        try:
            wait(units, deadline.remaining_s, FIRST_EXCEPTION)
        finally:
            # Nobody may still write when the caller reuses the slot.
            running = [unit for unit in units if not unit.cancel() and not unit.done()]
            self._stuck = list(wait(running, deadline.remaining_s).not_done) if running else []
            if self._stuck:
                pool.shutdown(wait=False, cancel_futures=True)
                self._pool = None
        ended = [unit for unit in units if unit.done() and not unit.cancelled()]
        failed = next((error for unit in ended if (error := unit.exception()) is not None), None)
        if len(ended) < len(units) and (self._stuck or failed is None):
            raise DeadlineExceeded(
                "the snapshot's copying threads did not end within the push's timeout",
                where=f"{len(self._stuck)} of {self._threads} threads still run",
                expected="every tensor copied into the arena",
                got=f"{len(ended)} of {len(units)} units of work done",
                remedy="raise timeout_s if the model is large; else look for a device or memory that hangs",
            ) from failed
        if failed is not None:
            raise failed
        return [unit.result() for unit in units]

    def _carry(self, carried: list[int], slot: int, base: int | None, digests: Digests) -> int:
        """Copy the tensors that were not sent from the base slot, with the digests it was sealed with."""
        seal = None if base is None else self.arena.seal_of(base)
        if base is None or seal is None:
            name = self.manifest.tensors[carried[0]].name
            raise ProtocolError(
                "tensors were not sent and there is no version to take them from",
                where=name,
                expected="all tensors of the manifest, or a version to take the rest from",
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

    def _compiled(self, collected: Collected, unused: Collection[str]) -> _Program:
        last = self._program  # of one arena, so that the same tensors are unused
        if last is None or last.layout is not collected.layout or last.computes != collected.computed.keys():
            last = self._program = _compile(self.manifest, collected, frozenset(unused))
            for place in self._slots.values():
                place.dests.clear()
        return last


def _compile(manifest: Manifest, collected: Collected, unused: frozenset[str]) -> _Program:
    """Sort a layout's tensors, but the unused ones, into computed ones, big ones and batches, in manifest order."""
    layout = collected.layout
    position = {spec.name: k for k, spec in enumerate(manifest.tensors)}
    items = []
    for info, parts in zip(layout.tensors, layout.parts, strict=True):
        if info.name in unused:
            continue
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


def _write_batch(
    batch: SnapshotBatch,
    place: SlotViews,
    sources: list[torch.Tensor],
    digests: Digests,
) -> UnitWritten:
    """Copy, digest and check one batch of small tensors. One unit of work of a copying thread."""
    with torch.no_grad():
        into, out_of = batch_views(batch, place, sources)
        copied = 0 if all(map(already_holds, into, out_of)) else batch.nbytes
        if copied:
            torch._foreach_copy_(into, out_of)
    views = batch.seen.get(place.slot)
    if views is None:
        views = batch.seen[place.slot] = [place.views[item.index] for item in batch.items]
    digests[batch.indices] = np.fromiter(map(xxhash.xxh3_64_intdigest, views), "<u8", len(views))
    bad: list[int] = []
    for dtype, start, end, first, stop in batch.spans:
        if not is_finite(place.flat[start:end], dtype):
            inside = [item for item in batch.items if first <= item.index < stop]
            bad += [item.index for item in inside if not is_finite(place.bytes_of(item.spec), dtype)]
    return UnitWritten(copied, bad)


@dataclass(frozen=True, eq=False)
class _BigTensor:
    """One big tensor of one push. Its chunks are units of work.

    Attributes:
        raw: its bytes in the arena.
        source: its elements in the trainer, flat.
        digests: of its chunks, filled in by the units of work.
        known: digests of the chunks that the slot holds now.
    """

    item: TensorCopy
    raw: ByteArray
    source: torch.Tensor
    digests: list[int]
    known: list[int] | None

    def write_chunk(self, number: int) -> UnitWritten:
        """Bring one chunk into the arena, digest and check it.

        Where bytes travel as they are, the digest is of the trainer's own: the arena's may not be in cache, and changes
        meanwhile are found out. What lies in the slot from two versions ago and is the same needs no write.
        """
        step = CHUNK // itemsize(self.item.spec.dtype)
        source = self.source[number * step : (number + 1) * step]
        raw, wire = self.raw[number * CHUNK : (number + 1) * CHUNK], dtype_of(self.item.spec.dtype)
        plain = source.dtype == wire and source.device.type == "cpu"
        shown = source.view(torch.uint8).numpy() if plain else raw
        into, to, out_of = torch.from_numpy(raw).view(wire), raw.ctypes.data, shown.ctypes.data
        if plain and self.known is not None and not memcmp(to, out_of, len(raw)):
            self.digests[number] = self.known[number]
            return UnitWritten(0)
        hasher, finite, copied = xxhash.xxh3_64(), True, 0
        for start in range(0, len(raw), BLOCK):
            block = shown[start : start + BLOCK]
            if not plain:
                part = slice(start // wire.itemsize, (start + BLOCK) // wire.itemsize)
                into[part].copy_(source[part])
                copied += len(block)
            elif memcmp(to + start, out_of + start, len(block)):
                memmove(to + start, out_of + start, len(block))
                copied += len(block)
            hasher.update(block.data)
            finite = finite and is_finite(block, self.item.spec.dtype)
        self.digests[number] = hasher.intdigest()
        return UnitWritten(copied, () if finite else (self.item.index,))


def _in_order(item: TensorCopy, sources: list[torch.Tensor]) -> torch.Tensor | None:
    """View the tensor's elements as one flat part of the live tensor; None when they do not lie so."""
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


def already_holds(into: torch.Tensor, source: torch.Tensor) -> bool:
    """Tell whether a view of the arena already has a tensor's bits, where that is cheap to tell.

    `source` is a collected tensor or a view of one: its memory holds its values.
    """
    if source.dtype != into.dtype or not source.is_contiguous() or source.device.type != "cpu":
        return False
    nbytes = into.numel() * into.itemsize
    compare = memcmp_held if nbytes < _HELD else memcmp
    return compare(into.data_ptr(), source.data_ptr(), nbytes) == 0


def _single_threaded_pool(threads: int, deadline: Deadline) -> ThreadPoolExecutor:
    """Start a pool whose workers run torch on one thread each; the trainer's own setting stays as it is.

    torch keeps the number per thread, but a thread takes the last one set anywhere when it first asks: so each worker
    asks, then sets its own, and then the trainer's is put back from here.

    Raises DeadlineExceeded when a worker does not start in time, ConfigError when it cannot; the others are released.
    """
    kept = torch.get_num_threads()
    started = threading.Barrier(threads + 1)
    errors: list[Exception] = []

    def start() -> None:
        try:
            torch.get_num_threads()
            torch.set_num_threads(1)
        except Exception as error:  # a thread's outermost frame: raised again where the pool was asked for
            errors.append(error)
            started.abort()
        with contextlib.suppress(threading.BrokenBarrierError):
            started.wait(deadline.remaining_s)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="weighbridge-snapshot", initializer=start)
    try:
        for _ in range(threads):
            pool.submit(int)
        started.wait(deadline.remaining_s)
    except (threading.BrokenBarrierError, RuntimeError) as error:  # RuntimeError: the system starts no more threads
        started.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        hung = not errors and isinstance(error, threading.BrokenBarrierError)
        cause = errors[0] if errors else error
        kind = DeadlineExceeded if hung else ConfigError
        raise kind(
            "the snapshot's copying threads did not start",
            where="the trainer's process",
            expected=f"{threads} threads within the push's timeout",
            got="a thread that hangs" if hung else f"{type(cause).__name__}: {cause}",
            remedy="lower copy_threads, or look at the limits of this process (ulimit -u, cgroup pids.max)",
        ) from error
    finally:
        torch.set_num_threads(kept)
    return pool
