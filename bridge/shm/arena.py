"""The arena: one file in shared memory that holds whole versions of a model in manifest order.

    header page | slot 0: tensor bytes (page multiple), seal | slot 1: ... | ...

The writer calls `begin`, fills the tensors, then `seal`; a reader uses a slot only while it is sealed. Readers map the
file read-only: code that writes through their tensors is killed (SIGSEGV) before it corrupts weights. The coordinator
decides which slot may be overwritten.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import xxhash

from bridge.errors import REPORT, ArenaFull, Closed, ConfigError, ProtocolError
from bridge.model.manifest import Manifest, TensorSpec, aligned
from bridge.model.torch_dtypes import dtype_of
from bridge.shm import files

KIND = 1
"""Kind of file in the header; a mailbox has another."""
DIGEST_NBYTES = 8
"""Bytes per tensor in a seal."""

_MADV_POPULATE_WRITE = 23  # not named by `mmap`; Linux 5.14 and later
_MAP_NORESERVE = 0x4000  # <linux/mman.h>; Python names it from 3.13 on
_POPULATE_STEP = 256 << 20
_SEALED = 0x5345414C45440001
_STATE = struct.Struct("<Q")
_SEAL = struct.Struct("<q16sQ")
_SUM_AT = _STATE.size
_BODY_AT = _SUM_AT + 16
_DIGESTS_AT = _BODY_AT + _SEAL.size


class Seal(msgspec.Struct, frozen=True):
    """Closes a written version: `root` is 16 bytes, `digests` 8 little-endian bytes per tensor, in manifest order."""

    version: int
    root: bytes
    digests: bytes


class _Window:
    """Shows mapped memory to numpy as writable, whatever its protection, and keeps the mapping alive.

    torch warns about read-only buffers; the weights are protected by the pages themselves.
    """

    def __init__(self, view: npt.NDArray[np.uint8]) -> None:
        self._view = view

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "shape": self._view.shape, "typestr": "|u1", "data": (self._view.ctypes.data, False)}


class Arena(files.SharedFile):
    """One mapped arena file. Not thread safe while slots are begun or sealed; views may be used from any thread."""

    def __init__(self, path: Path, fd: int, manifest: Manifest, slots: int, *, writable: bool) -> None:
        """Use `create` or `open`. Takes over `fd`, which holds the file's shared lock."""
        super().__init__(path, fd)
        self.manifest = manifest
        self.slots = slots
        self.nbytes = file_nbytes(manifest, slots)
        self.writable = writable
        self._slot_nbytes = _slot_nbytes(manifest)
        self._seal_at = aligned(manifest.nbytes, files.PAGE)
        access = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        self._map: mmap.mmap | None = mmap.mmap(fd, self.nbytes, flags=mmap.MAP_SHARED, prot=access)
        self._flat: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        self._tensor: torch.Tensor = torch.from_numpy(np.asarray(_Window(self._flat)))
        self._tensors: dict[int, list[torch.Tensor]] = {}
        self._views: dict[int, list[memoryview]] = {}

    @classmethod
    def create(
        cls,
        manifest: Manifest,
        *,
        name: str,
        directory: Path | None = None,
        slots: int = 2,
        journal: Path | None = None,
    ) -> Arena:
        """Make, lock and pre-fault a new arena; blocks for about a second per GiB.

        Args:
            name: readable part of the file name, sanitised.
            directory: a tmpfs folder; default WEIGHBRIDGE_SHM_DIR, then /dev/shm.
            journal: the daemon's journal; while a daemon has that open, the arena is no orphan.

        Raises ArenaFull, with the sizes, before anything is created; ConfigError for a bad name, folder or slot count.
        """
        if slots < 1:
            raise ConfigError(
                "an arena needs at least one slot",
                where="slots",
                expected="1 or more",
                got=str(slots),
                remedy="take 2 slots",
            )
        folder = files.directory(directory)
        path = files.fresh_path(name, "data", folder)
        nbytes = file_nbytes(manifest, slots)
        header = files.Header(
            KIND, manifest.digest, slots, _slot_nbytes(manifest), nbytes, os.getpid(), str(journal or "")
        )
        page = files.encode_header(header)
        files.require_room(nbytes, folder)
        fd = files.create_file(path, nbytes)
        arena: Arena | None = None
        try:
            _reserve(fd, nbytes, folder)
            arena = cls(path, fd, manifest, slots, writable=True)
            arena._populate()
            os.pwrite(fd, page, 0)
        except BaseException:
            if arena is None:
                os.close(fd)
            else:
                arena.close()  # the mapping too, which the exception's traceback would keep
            path.unlink(missing_ok=True)
            raise
        return arena

    @classmethod
    def open(cls, path: Path, manifest: Manifest, *, writable: bool = False) -> Arena:
        """Map an arena that another process made; readers get read-only pages. Does not block.

        Raises NotFound, ConfigError (foreign owner, permissions), ProtocolError (not an arena, of another manifest,
        damaged, wrong size).
        """
        path = Path(path)
        fd, header = files.open_file(path, writable=writable)
        try:
            _check_header(header, manifest, path)
            return cls(path, fd, manifest, header.count, writable=writable)
        except BaseException:
            os.close(fd)
            raise

    @property
    def address(self) -> int:
        """Address at which the mapping begins."""
        self._mapping()
        return int(self._flat.ctypes.data)

    def private(self) -> mmap.mmap:
        """Map the whole file once more, writable and private: a page that is written there is this process's own, all
        others show the arena's bytes (on Linux; POSIX leaves it open).

        The caller closes the mapping; until then it holds the file's lock.
        """
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
        return mmap.mmap(self._descriptor(), self.nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def bytes(self, slot: int) -> memoryview:
        """Return the tensor bytes of a slot, `manifest.nbytes` long, padding included; read-only unless `writable`."""
        return memoryview(self._mapping())[self._start(slot) : self._start(slot) + self.manifest.nbytes]

    def flat(self, slot: int) -> npt.NDArray[np.uint8]:
        """View the bytes of a slot in numpy, shape [manifest.nbytes]."""
        self._mapping()
        return self._flat[self._start(slot) : self._start(slot) + self.manifest.nbytes]

    def flat_tensor(self, slot: int) -> torch.Tensor:
        """View the bytes of a slot in torch, uint8 [manifest.nbytes]; writing to a reader's view kills the process."""
        self._mapping()
        return self._tensor[self._start(slot) : self._start(slot) + self.manifest.nbytes]

    def tensor(self, slot: int, spec: TensorSpec) -> torch.Tensor:
        """View one tensor with its dtype and shape, without a copy. Writing to a reader's view kills the process.
        Raises ProtocolError for a tensor that reaches outside a version."""
        if spec.offset < 0 or spec.offset + spec.nbytes > self.manifest.nbytes:
            raise ProtocolError(
                "a tensor reaches outside the arena's version", where=spec.name,
                expected=f"inside {self.manifest.nbytes} bytes", got=f"offset {spec.offset}, {spec.nbytes} bytes",
                remedy=REPORT,
            )  # fmt: skip
        piece = self.flat_tensor(slot)[spec.offset : spec.offset + spec.nbytes]
        return piece.view(dtype_of(spec.dtype)).view(spec.shape)

    def tensors(self, slot: int) -> list[torch.Tensor]:
        """View all tensors of a slot, in manifest order; made once, the same list each time."""
        self._start(slot)
        if slot not in self._tensors:
            self._tensors[slot] = [self.tensor(slot, spec) for spec in self.manifest.tensors]
        return self._tensors[slot]

    def views(self, slot: int) -> list[memoryview]:
        """Return the bytes of each tensor of a slot, in manifest order; made once, the same list each time."""
        self._start(slot)
        if slot not in self._views:
            base, sized = self.bytes(slot), zip(self.manifest.tensors, self.sizes.tolist(), strict=True)
            self._views[slot] = [base[spec.offset : spec.offset + nbytes] for spec, nbytes in sized]
        return self._views[slot]

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of each tensor, in manifest order."""
        return np.array([spec.nbytes for spec in self.manifest.tensors], dtype=np.int64)

    def begin(self, slot: int) -> None:
        """Open a slot for writing: removes its seal, before the first byte changes."""
        self._put_state(slot, 0)

    def seal(self, slot: int, seal: Seal) -> None:
        """Close a written slot with its seal. Raises ProtocolError for a seal of another shape or a read-only arena."""
        count = len(self.manifest.tensors)
        if len(seal.digests) != DIGEST_NBYTES * count or len(seal.root) != 16 or not 0 <= seal.version < 2**63:
            raise ProtocolError(
                "a seal does not fit its arena", where=str(self.path), expected=f"{count} digests, a root of 16 bytes",
                got=f"{len(seal.digests)} bytes of digests, {len(seal.root)} of root, version {seal.version}",
                remedy=REPORT,
            )  # fmt: skip
        self._put_state(slot, 0)
        at = self._start(slot) + self._seal_at
        body = _SEAL.pack(seal.version, seal.root, count) + seal.digests
        # Body first, its checksum next, the state word last: a reader that sees the word sees the rest, or a torn
        # checksum.
        target = self._mapping()
        target[at + _BODY_AT : at + _BODY_AT + len(body)] = body
        target[at + _SUM_AT : at + _BODY_AT] = xxhash.xxh3_128_digest(body)
        self._put_state(slot, _SEALED)

    def seal_of(self, slot: int) -> Seal | None:
        """Read the seal of a slot; None while the slot is open or its seal is torn."""
        at = self._start(slot) + self._seal_at
        source = self._mapping()
        if _STATE.unpack_from(source, at)[0] != _SEALED:
            return None
        size = _SEAL.size + DIGEST_NBYTES * len(self.manifest.tensors)
        body = source[at + _BODY_AT : at + _BODY_AT + size]
        if source[at + _SUM_AT : at + _BODY_AT] != xxhash.xxh3_128_digest(body):
            return None
        version, root, count = _SEAL.unpack_from(body)
        return Seal(version, root, body[_SEAL.size :]) if count == len(self.manifest.tensors) else None

    def close(self) -> None:
        """Let go of the file and its lock. Views that are still held stay valid until they are dropped. Idempotent."""
        if self._map is None:
            return
        mapping, self._map = self._map, None
        super().close()
        self._tensors.clear()
        self._views.clear()
        self._tensor = torch.empty(0, dtype=torch.uint8)
        self._flat = np.empty(0, dtype=np.uint8)
        # While a view is still held, the mapping (and with it the lock) lives until that is dropped.
        with contextlib.suppress(BufferError):
            mapping.close()

    def _mapping(self) -> mmap.mmap:
        if self._map is None:
            raise Closed(
                "the arena was closed",
                where=str(self.path),
                expected="an open arena",
                got="a closed one",
                remedy="open a Bridge again",
            )
        return self._map

    def _start(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise ProtocolError(
                "no such slot", where=str(self.path), expected=f"0 .. {self.slots - 1}", got=str(slot), remedy=REPORT
            )
        return files.HEADER_NBYTES + slot * self._slot_nbytes

    def _put_state(self, slot: int, state: int) -> None:
        if not self.writable:
            raise ProtocolError(
                "this arena is open read-only",
                where=str(self.path),
                expected="a writable arena",
                got="a read-only one",
                remedy="open it with writable=True",
            )
        _STATE.pack_into(self._mapping(), self._start(slot) + self._seal_at, state)

    def _populate(self) -> None:
        mapping = self._mapping()
        try:
            for start in range(0, self.nbytes, _POPULATE_STEP):
                mapping.madvise(_MADV_POPULATE_WRITE, start, min(_POPULATE_STEP, self.nbytes - start))
        except OSError:
            # An older kernel or another file system: touching does the same, only slower. The pages are reserved.
            self._flat[:: files.PAGE] = 0


def file_nbytes(manifest: Manifest, slots: int) -> int:
    """Count the bytes of shared memory that an arena of so many slots takes."""
    return files.HEADER_NBYTES + slots * _slot_nbytes(manifest)


def _slot_nbytes(manifest: Manifest) -> int:
    seal = _DIGESTS_AT + DIGEST_NBYTES * len(manifest.tensors)
    return aligned(manifest.nbytes, files.PAGE) + aligned(seal, files.PAGE)


def _reserve(fd: int, nbytes: int, folder: Path) -> None:
    # Two arenas may pass the room check together: reserving turns what would be a SIGBUS while filling into an error.
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        raise ArenaFull(
            "shared memory ran out while the arena was made", where=str(folder), expected=f"{nbytes} bytes",
            got=str(error), remedy="free shared memory (orphaned arenas are removed when a bridge starts)",
        ) from error  # fmt: skip


def _check_header(header: files.Header, manifest: Manifest, path: Path) -> None:
    if header.kind != KIND:
        raise ProtocolError(
            "not an arena", where=str(path), expected=f"kind {KIND}", got=f"kind {header.kind}",
            remedy="run one version of weighbridge on both sides",
        )  # fmt: skip
    if header.digest != manifest.digest:
        raise ProtocolError(
            "an arena of another manifest", where=str(path), expected=manifest.digest.hex(), got=header.digest.hex(),
            remedy="open a new Bridge, which asks the daemon for the present manifest",
        )  # fmt: skip
    if header.count < 1 or header.nbytes != file_nbytes(manifest, header.count):
        raise ProtocolError(
            "an arena's geometry does not fit its manifest", where=str(path),
            expected=f"{file_nbytes(manifest, max(header.count, 1))} bytes", got=f"{header.nbytes} bytes",
            remedy="run one version of weighbridge on both sides",
        )  # fmt: skip
