"""The mailbox: one file in shared memory with a page per engine rank, for answers that engines cannot return.

A rank posts one payload under a nonce; the driver polls for that nonce. Pages are written and read by pwrite and pread,
never mapped: a full tmpfs is then an error in the rank that posts, not a SIGBUS that kills an engine.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash

from bridge.errors import REPORT, ArenaFull, ConfigError, DeadlineExceeded, ProtocolError
from bridge.model.manifest import aligned
from bridge.protocol.deadline import Deadline
from bridge.shm import files

KIND = 2
PAGE_NBYTES = 8 << 20
"""Default bytes per rank; the file is sparse, a page takes what was posted."""

_READY = 0x4D41494C44000001
_STATE = struct.Struct("<Q")
_META = struct.Struct("<QQ")
_SUM_AT = _STATE.size
_META_AT = _SUM_AT + 16
_PAYLOAD_AT = _META_AT + _META.size
_POLL_MIN_S = 50e-6
_POLL_MAX_S = 2e-3


class Mailbox(files.SharedFile):
    """One open mailbox. A rank posts to its own page only; every process may read every page.

    Attributes:
        capacity: largest payload in bytes.
    """

    def __init__(self, path: Path, fd: int, ranks: int, page_nbytes: int) -> None:
        """Use `create` or `open`. Takes over `fd`, which holds the file's shared lock."""
        super().__init__(path, fd)
        self.ranks = ranks
        self.page_nbytes = page_nbytes
        self.capacity = page_nbytes - _PAYLOAD_AT

    @classmethod
    def create(
        cls,
        name: str,
        ranks: int,
        *,
        page_nbytes: int = PAGE_NBYTES,
        directory: Path | None = None,
        journal: Path | None = None,
    ) -> Mailbox:
        """Make a new, sparse mailbox file for ranks 0 .. ranks-1. Raises ConfigError for a bad name, folder or size."""
        if ranks < 1 or page_nbytes <= _PAYLOAD_AT:
            raise ConfigError(
                "a mailbox needs ranks and room",
                where="a mailbox",
                expected=f"ranks of more than {_PAYLOAD_AT} bytes each",
                got=f"{ranks} ranks of {page_nbytes} bytes",
                remedy=REPORT,
            )
        unit = aligned(page_nbytes, files.PAGE)
        path = files.fresh_path(name, "mailbox", files.directory(directory))
        nbytes = files.HEADER_NBYTES + ranks * unit
        page = files.encode_header(files.Header(KIND, bytes(16), ranks, unit, nbytes, os.getpid(), str(journal or "")))
        fd = files.create_file(path, nbytes)
        mailbox = cls(path, fd, ranks, unit)
        try:
            mailbox._write(0, [(0, page)])
        except BaseException:
            mailbox.close()
            mailbox.unlink()
            raise
        return mailbox

    @classmethod
    def open(cls, path: Path) -> Mailbox:
        """Open a mailbox that another process made. Raises NotFound, ConfigError, ProtocolError as `shm.open_file`."""
        path = Path(path)
        fd, header = files.open_file(path, writable=True)
        if header.kind != KIND or header.nbytes != files.HEADER_NBYTES + header.count * header.unit_nbytes:
            os.close(fd)
            raise ProtocolError(
                "not a mailbox", where=str(path), expected=f"kind {KIND}", got=f"kind {header.kind}",
                remedy="run one version of weighbridge on both sides",
            )  # fmt: skip
        return cls(path, fd, header.count, header.unit_nbytes)

    def post(self, rank: int, nonce: int, payload: bytes) -> None:
        """Replace the content of a rank's page. Called by that rank only; does not block.

        Raises ProtocolError for a payload above `capacity`, ArenaFull when shared memory runs out.
        """
        at = self._start(rank)
        if len(payload) > self.capacity:
            raise ProtocolError(
                "an answer is too large for its mailbox page", where=f"rank {rank} of {self.path.name}",
                expected=f"at most {self.capacity} bytes", got=f"{len(payload)} bytes",
                remedy="raise bridge.shm.mailbox.PAGE_NBYTES and restart the daemon",
            )  # fmt: skip
        if not 0 <= nonce < 2**64:
            raise ProtocolError(
                "a nonce is 64 bits", where="a mailbox", expected="0 to 2**64 - 1", got=str(nonce), remedy=REPORT
            )
        meta = _META.pack(len(payload), nonce)
        # The state word goes to empty first and to ready last, so that no reader takes half a message for damage.
        head = _STATE.pack(0)
        parts = ((0, head), (_PAYLOAD_AT, payload), (_META_AT, meta), (_SUM_AT, _sum(meta, payload)))
        self._write(at, (*parts, (0, _STATE.pack(_READY))))

    def read(self, rank: int, nonce: int) -> bytes | None:
        """Return the payload that a rank posted under `nonce`, or None while another (or none) is there.

        Raises ProtocolError when its length or digest is wrong.
        """
        at = self._start(rank)
        fd = self._fd if self._fd is not None else self._descriptor()
        head = self._read(fd, at, _PAYLOAD_AT)
        if _STATE.unpack_from(head)[0] != _READY:
            return None
        length, posted = _META.unpack_from(head, _META_AT)
        if posted != nonce:
            return None
        where = f"rank {rank} of {self.path.name}"
        if length > self.capacity:
            raise ProtocolError(
                "a mailbox page claims too much",
                where=where,
                expected=f"at most {self.capacity}",
                got=str(length),
                remedy="look for a second writer",
            )
        payload = self._read(fd, at + _PAYLOAD_AT, length)
        if _sum(head[_META_AT:], payload) == head[_SUM_AT:_META_AT]:
            return payload
        if self._read(fd, at, _PAYLOAD_AT) != head:
            return None  # the rank posted again while this was read
        raise ProtocolError(
            "an answer in the mailbox is damaged",
            where=where,
            expected="bytes that fit their checksum",
            got="another checksum",
            remedy="look for a second writer",
        )

    def wait(self, ranks: Sequence[int], nonce: int, deadline: Deadline) -> list[bytes]:
        """Wait for the payloads of these ranks under `nonce`; returns them in the order of `ranks`.

        Raises DeadlineExceeded naming the ranks that did not answer, ProtocolError as `read`.
        """
        answers: dict[int, bytes] = {}
        pause = _POLL_MIN_S
        while True:
            late = time.monotonic() >= deadline.at
            for rank in ranks:
                if rank not in answers and (payload := self.read(rank, nonce)) is not None:
                    answers[rank] = payload
                    pause = _POLL_MIN_S
            missing = [rank for rank in ranks if rank not in answers]
            if not missing:
                return [answers[rank] for rank in ranks]
            if late:
                raise DeadlineExceeded(
                    "ranks did not answer in time", where=f"ranks {', '.join(map(str, missing))} of {self.path.name}",
                    expected=f"{len(ranks)} answers to {nonce}", got=f"{len(answers)}",
                    remedy="look at the engine's log for these ranks, or raise timeout_s",
                )  # fmt: skip
            time.sleep(min(pause, deadline.remaining_s))
            pause = min(pause * 1.5, _POLL_MAX_S)

    def _start(self, rank: int) -> int:
        if not 0 <= rank < self.ranks:
            raise ProtocolError(
                "no such rank in this mailbox",
                where=str(self.path),
                expected=f"0 .. {self.ranks - 1}",
                got=str(rank),
                remedy=REPORT,
            )
        return files.HEADER_NBYTES + rank * self.page_nbytes

    def _write(self, start: int, parts: Iterable[tuple[int, bytes]]) -> None:
        """Write each (offset from `start`, data), in order."""
        fd = self._fd if self._fd is not None else self._descriptor()
        for offset, data in parts:
            at, rest = start + offset, memoryview(data)
            while rest:
                try:
                    done = os.pwrite(fd, rest, at)
                except OSError as error:
                    raise ArenaFull(
                        "a mailbox page cannot be written",
                        where=str(self.path),
                        expected="room for its pages",
                        got=str(error),
                        remedy="free shared memory (orphaned arenas are removed when a bridge starts)",
                    ) from error
                at, rest = at + done, rest[done:]

    def _read(self, fd: int, at: int, nbytes: int) -> bytes:
        data = os.pread(fd, nbytes, at)
        if len(data) != nbytes:
            raise ProtocolError(
                "a mailbox was cut short",
                where=str(self.path),
                expected="whole pages",
                got=f"{len(data)} of {nbytes} bytes",
                remedy="restart the daemon; look for another program that writes to this folder",
            )
        return data


def _sum(meta: bytes, payload: bytes) -> bytes:
    digest = xxhash.xxh3_128(meta)
    digest.update(payload)
    return digest.digest()
