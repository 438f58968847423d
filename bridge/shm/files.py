"""The files in shared memory: names, creation, checks on opening, locks, room. What lies in them is not known here.

A file begins with one header page (magic, protocol, kind, digest of its content, geometry, journal, checksum). Every
process that has it open holds a shared flock on it, so a file whose exclusive lock can be had is in nobody's hands. The
lock lives on the open descriptor: it survives in forked children and ends with the last of them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from bridge.errors import ArenaFull, Busy, ConfigError, NotFound, ProtocolError
from bridge.protocol.codec import PROTOCOL

PAGE = mmap.PAGESIZE
HEADER_NBYTES = 4096
"""Room for the header at the start of every file, in bytes; a multiple of it keeps slots page aligned."""
DIRECTORY_ENV = "WEIGHBRIDGE_SHM_DIR"
LIMIT_ENV = "WEIGHBRIDGE_SHM_LIMIT"
"""A cap in bytes on what one new file may take; below the real room it wins."""
MEMORY_MARGIN = 64 << 20
"""Bytes of free memory that a new file must leave over: past the last page comes the OOM killer, not an error."""
FILE_PATTERN = re.compile(r"weighbridge-.+-[0-9a-f]{16}\.(?:data|mailbox)")

_MAGIC = b"WEIGHBR1"
_FIELDS = struct.Struct("<8sII16sQQQQH")
_SUM = struct.Struct("<Q")
_LOCK_RETRY_S = 2.0


@dataclass(frozen=True)
class Header:
    """What the first page says. `count` pieces of `unit_nbytes` each follow it; `nbytes` is the whole file."""

    kind: int
    digest: bytes
    count: int
    unit_nbytes: int
    nbytes: int
    pid: int
    journal: str = ""


@dataclass(frozen=True)
class Room:
    """Bytes that may still be taken, and what sets that bound."""

    nbytes: int
    bound: str


def directory(chosen: Path | None = None) -> Path:
    """Where shared files live: the argument, else WEIGHBRIDGE_SHM_DIR, else /dev/shm."""
    return Path(chosen) if chosen is not None else Path(os.environ.get(DIRECTORY_ENV) or "/dev/shm")


def fresh_path(name: str, suffix: str, folder: Path) -> Path:
    """An unguessable path `weighbridge-<name>-<16 hex>.<suffix>`. Raises ConfigError for a name without one letter."""
    safe = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")[:48]
    if not safe:
        raise ConfigError("a name needs at least one letter or digit", got=repr(name))
    return folder / f"weighbridge-{safe}-{secrets.token_hex(8)}.{suffix}"


def encode_header(header: Header) -> bytes:
    """The header page. Raises ConfigError for a journal path that does not fit in it."""
    journal = os.fsencode(header.journal)
    fields = _FIELDS.pack(
        _MAGIC, header.kind, PROTOCOL, header.digest, header.count, header.unit_nbytes, header.nbytes, header.pid,
        len(journal),
    )  # fmt: skip
    if len(fields) + len(journal) + _SUM.size > HEADER_NBYTES:
        raise ConfigError("a journal path is too long", got=f"{len(journal)} bytes", remedy="shorten XDG_STATE_HOME")
    body = (fields + journal).ljust(HEADER_NBYTES - _SUM.size, b"\0")
    return body + _SUM.pack(xxhash.xxh3_64_intdigest(body))


def decode_header(page: bytes, where: str) -> Header:
    """Read a header page. Raises ProtocolError for another magic, protocol or a damaged page."""
    if len(page) != HEADER_NBYTES or page[:8] != _MAGIC:
        raise ProtocolError("not a weighbridge file", where=where, expected=repr(_MAGIC), got=repr(page[:8]))
    body = page[: -_SUM.size]
    if _SUM.unpack(page[-_SUM.size :])[0] != xxhash.xxh3_64_intdigest(body):
        raise ProtocolError("a shared file's header is damaged", where=where)
    _, kind, protocol, digest, count, unit, nbytes, pid, length = _FIELDS.unpack_from(page)
    if protocol != PROTOCOL:
        raise ProtocolError(
            "a shared file of another protocol", where=where, expected=f"version {PROTOCOL}", got=str(protocol),
            remedy="run one version of weighbridge on both sides",
        )  # fmt: skip
    journal = os.fsdecode(page[_FIELDS.size : _FIELDS.size + length])
    return Header(kind, digest, count, unit, nbytes, pid, journal)


def create_file(path: Path, nbytes: int) -> int:
    """Create a 0600 file of `nbytes` (sparse, zero) that did not exist, locked shared; returns its descriptor."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise ConfigError("the shared memory folder does not exist", where=str(path.parent)) from None
    try:
        # The umask may have taken bits away; readers of the same user need exactly these.
        os.fchmod(fd, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        os.ftruncate(fd, nbytes)
    except OSError:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return fd


def open_file(path: Path, *, writable: bool) -> tuple[int, Header]:
    """Open and lock (shared) a file that somebody else created; returns its descriptor and checked header.

    Raises NotFound (no such file, or unlinked meanwhile), ConfigError (a foreign owner, other permissions than 0600,
    not a plain file), ProtocolError (not ours, damaged, another size than it says), Busy (the orphan cleaner holds it).
    """
    try:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound("no such shared file", where=str(path), remedy="the daemon that made it is gone") from None
    except OSError as error:
        raise ConfigError("a shared file cannot be opened", where=str(path), got=str(error)) from error
    try:
        _check_owner(os.fstat(fd), path)
        _lock_shared(fd, path)
        info = os.fstat(fd)
        if info.st_nlink == 0:
            raise NotFound("the shared file was removed", where=str(path), remedy="the daemon that made it is gone")
        header = decode_header(os.pread(fd, HEADER_NBYTES, 0), str(path))
        if header.nbytes != info.st_size:
            raise ProtocolError(
                "a shared file has the wrong size", where=str(path), expected=str(header.nbytes), got=str(info.st_size)
            )
    except BaseException:
        os.close(fd)
        raise
    return fd, header


def _check_owner(info: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError("a shared file must be a plain file", where=str(path), got=stat.filemode(info.st_mode))
    if info.st_uid != os.geteuid():
        raise ConfigError(
            "a shared file belongs to another user", where=str(path), expected=f"uid {os.geteuid()}",
            got=f"uid {info.st_uid}", remedy="run trainer, daemon and engines as one user",
        )  # fmt: skip
    if stat.S_IMODE(info.st_mode) != 0o600:
        raise ConfigError(
            "a shared file is open to others", where=str(path), expected="mode 0600",
            got=f"mode {stat.S_IMODE(info.st_mode):04o}",
        )  # fmt: skip


def _lock_shared(fd: int, path: Path) -> None:
    # The cleaner holds the exclusive lock for a moment while it looks at a file; nobody holds it for long.
    end = time.monotonic() + _LOCK_RETRY_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise Busy("a shared file is locked by somebody else", where=str(path)) from None
            time.sleep(0.01)


def require_room(nbytes: int, folder: Path, limit: int | None = None) -> None:
    """Raises ArenaFull, with both sizes, when a new file of `nbytes` would not fit. Nothing is created."""
    if not folder.is_dir():
        raise ConfigError("the shared memory folder does not exist", where=str(folder))
    room = min(_rooms(folder, limit), key=lambda r: r.nbytes)
    if nbytes > room.nbytes:
        raise ArenaFull(
            "not enough shared memory for the arena",
            where=str(folder),
            expected=f"{nbytes} bytes ({nbytes / 2**30:.2f} GiB)",
            got=f"{max(room.nbytes, 0)} bytes ({max(room.nbytes, 0) / 2**30:.2f} GiB) left by {room.bound}",
            remedy="free memory or raise the limit named here (orphaned arenas are removed when a bridge starts)",
        )


def _rooms(folder: Path, limit: int | None) -> Iterator[Room]:
    space = os.statvfs(folder)
    yield Room(space.f_bavail * space.f_frsize, f"the file system of {folder}")
    available = _meminfo_available()
    if available is not None:
        yield Room(available - MEMORY_MARGIN, "MemAvailable")
    yield from cgroup_rooms(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    if limit is not None:
        yield Room(limit, "the caller's limit")
    from_env = os.environ.get(LIMIT_ENV)
    if from_env:
        if not from_env.isdecimal():
            raise ConfigError("not a number of bytes", where=LIMIT_ENV, got=repr(from_env))
        yield Room(int(from_env), LIMIT_ENV)


def _meminfo_available() -> int | None:
    for line in _read(Path("/proc/meminfo")).splitlines():
        label, _, rest = line.partition(":")
        if label == "MemAvailable":
            return int(rest.split()[0]) << 10
    return None


def cgroup_rooms(mount: Path, membership: Path) -> Iterator[Room]:
    """What this process's memory cgroup and its ancestors leave, both hierarchies; page cache counts as free."""
    for line in _read(membership).splitlines():
        _, controllers, group = line.split(":", 2)
        names = ("memory.max", "memory.current", "inactive_file")
        roots = [mount, mount / "unified"]
        if controllers:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            roots = [mount / controllers]
        for root in roots if controllers == "" or "memory" in controllers.split(",") else []:
            here = root / group.strip("/")
            # Inside a container the path can be the host's: then only the mount's root is ours to see.
            for folder in (here, *here.parents):
                yield from _cgroup_room(folder, *names)
                if folder == root:
                    break


def _cgroup_room(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> Iterator[Room]:
    limit, usage = _read(folder / limit_name).strip(), _read(folder / usage_name).strip()
    if not (limit.isdecimal() and usage.isdecimal()):
        return
    cache = 0
    for line in _read(folder / "memory.stat").splitlines():
        label, _, value = line.partition(" ")
        if label == cache_name:
            cache = int(value)
    yield Room(int(limit) - max(int(usage) - cache, 0) - MEMORY_MARGIN, f"cgroup {folder}")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
