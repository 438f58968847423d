"""Digest the tensors of a version, seal a slot with its digests, and check a slot against its seal.

A tensor's digest is xxh3_64 of its bytes; above CHUNK it is xxh3_64 over the little-endian digests of its chunks, so
that several threads share one tensor and each chunk is digested while it is still in cache. The root covers all of
them, in manifest order. Digests find faults; they do not protect against an attacker who may write to the arena.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import xxhash

from bridge.errors import DigestMismatch
from bridge.model.manifest import Manifest
from bridge.model.regions import cut
from bridge.shm.arena import DIGEST_NBYTES, Arena, Seal

CHUNK = 8 << 20
"""Bytes; a tensor above this is digested in pieces of this size."""
_PARALLEL = 32 << 10
"""Bytes; below this, xxhash holds the GIL or spends its time handing it over: threads slow each other down."""
_BATCH = 4 << 20
"""Bytes of middle-sized tensors that make one unit of work."""
_REMEDY = "push again; if it happens again, look for another process that writes to the arena"

Digests = npt.NDArray[np.uint64]


def fold(chunks: Iterable[int]) -> int:
    """Combine the digests of a tensor's chunks, in order, into the tensor's; that of a single chunk stays as it is."""
    digests = np.fromiter(chunks, dtype="<u8")
    if len(digests) == 1:
        return int(digests[0])
    return xxhash.xxh3_64_intdigest(digests.tobytes())


def _digest(view: memoryview) -> int:
    if len(view) <= CHUNK:
        return xxhash.xxh3_64_intdigest(view)
    return fold(xxhash.xxh3_64_intdigest(view[start:end]) for start, end in cut(len(view), CHUNK))


def root_digest(manifest: Manifest, digests: bytes) -> bytes:
    """Compute the root of a version: 16 bytes over name, dtype, shape, offset and digest of every tensor, in manifest
    order. All but the digests enter through the manifest's own digest, which is computed once."""
    return xxhash.xxh3_128_digest(manifest.digest + digests)


def digest_slot(arena: Arena, slot: int, threads: int = 1) -> bytes:
    """Digest all tensors of a slot from its present bytes: 8 bytes each, in manifest order.

    Blocks for one pass over the slot, shared among `threads`.
    """
    views = arena.views(slot)
    out: Digests = np.empty(len(views), dtype="<u8")
    if threads <= 1:
        for index, view in enumerate(views):
            out[index] = _digest(view)
        return out.tobytes()
    sizes = arena.sizes
    small = np.flatnonzero(sizes < _PARALLEL)
    out[small] = np.fromiter((xxhash.xxh3_64_intdigest(views[i]) for i in small.tolist()), dtype="<u8")
    with ThreadPoolExecutor(threads, thread_name_prefix="weighbridge-digest") as pool:
        pieces = {
            index: [
                pool.submit(xxhash.xxh3_64_intdigest, views[index][start:end])
                for start, end in cut(int(sizes[index]), CHUNK)
            ]
            for index in np.flatnonzero(sizes > CHUNK).tolist()
        }
        batches = {batch: pool.submit(_digest_batch, views, batch) for batch in _batches(sizes)}
        for index, jobs in pieces.items():
            out[index] = fold(job.result() for job in jobs)
        for batch, job in batches.items():
            out[list(batch)] = job.result()
    return out.tobytes()


def _digest_batch(views: list[memoryview], batch: tuple[int, ...]) -> list[int]:
    return [xxhash.xxh3_64_intdigest(views[index]) for index in batch]


def _batches(sizes: npt.NDArray[np.int64]) -> Iterator[tuple[int, ...]]:
    """Yield the tensors between _PARALLEL and CHUNK, a few megabytes at a time."""
    middle = np.flatnonzero((sizes >= _PARALLEL) & (sizes <= CHUNK))
    if not len(middle):
        return
    bins = np.cumsum(sizes[middle]) // _BATCH
    for part in np.split(middle, np.flatnonzero(np.diff(bins)) + 1):
        yield tuple(part.tolist())


def seal_slot(arena: Arena, slot: int, version: int, digests: bytes) -> Seal:
    """Seal a written slot with the digests its writer computed; returns the seal. Does not read the tensors."""
    seal = Seal(version, root_digest(arena.manifest, digests), digests)
    arena.seal(slot, seal)
    return seal


def check_slot(arena: Arena, slot: int, threads: int = 1, seal: Seal | None = None) -> Seal:
    """Compare the bytes of a slot with its seal; returns the seal.

    Raises DigestMismatch: the slot is not sealed, its digests are not those of its root, or tensors differ (all of them
    in `names`, the first one's digests as expected and got). Blocks for one pass over the slot.
    """
    seal = seal or arena.seal_of(slot)
    where = f"slot {slot} of {arena.path.name}"
    if seal is None:
        raise DigestMismatch(
            "the slot is not sealed",
            where=where,
            expected="a sealed slot",
            got="none",
            remedy="push again; no engine loaded from it",
        )
    root = root_digest(arena.manifest, seal.digests)
    if root != seal.root:
        raise DigestMismatch(
            "a seal's digests are not those of its root", where=where, expected=seal.root.hex(), got=root.hex(),
            remedy=_REMEDY,
        )  # fmt: skip
    require_equal(arena.manifest, seal.digests, digest_slot(arena, slot, threads), where)
    return seal


def differing(expected: bytes, got: bytes) -> list[int]:
    """Find the tensors whose digests differ: indices in manifest order. Both arguments hold 8 bytes per tensor."""
    left, right = np.frombuffer(expected, dtype="<u8"), np.frombuffer(got, dtype="<u8")
    different: list[int] = np.flatnonzero(left != right).tolist()
    return different


def require_equal(manifest: Manifest, expected: bytes, got: bytes, where: str) -> None:
    """Raise DigestMismatch, naming every tensor whose digest in `got` is not the one in `expected`, if any differs."""
    different = differing(expected, got)
    if not different:
        return
    names = tuple(manifest.tensors[index].name for index in different)
    first = slice(DIGEST_NBYTES * different[0], DIGEST_NBYTES * (different[0] + 1))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    raise DigestMismatch(
        f"{names[0]}{more}: the bytes are not those that were sealed",
        where=where,
        expected=expected[first].hex(),
        got=got[first].hex(),
        remedy=_REMEDY,
        names=names,
    )


def differing_tensors(one: Seal, other: Seal) -> tuple[int, ...] | None:
    """Compare two versions of one arena by their seals: manifest indices of the tensors that differ, in order. None
    means all of them."""
    found = differing(one.digests, other.digests)
    return None if len(found) * DIGEST_NBYTES == len(one.digests) else tuple(found)
