"""Make, open, check and lock files in shared memory, and find room for them; their content is the arena's or mailbox's.

A file begins with one header page (magic, protocol, kind, digest of its content, geometry, journal, checksum). Every
process that has it open holds a shared flock on it, so a file whose exclusive lock can be had is open nowhere. The lock
belongs to the open descriptor: it survives in forked children and ends with the last of them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import xxhash

from bridge.errors import ArenaFull, Busy, Closed, ConfigError, NotFound, ProtocolError
from bridge.file_locks import take_lock
from bridge.protocol.codec import PROTOCOL

PAGE = mmap.PAGESIZE
HEADER_NBYTES = 4096
"""Room for the header at the start of every file, in bytes; a multiple of it keeps slots page aligned."""
DIRECTORY_ENV = "WEIGHBRIDGE_SHM_DIR"
LIMIT_ENV = "WEIGHBRIDGE_SHM_LIMIT"
"""Largest size of one new file in bytes, where there is more room than that."""
MEMORY_MARGIN = 64 << 20
"""Bytes of free memory that a new file must leave over: when memory runs out, the OOM killer comes, not an error."""
FILE_PATTERN = re.compile(r"weighbridge-.+-[0-9a-f]{16}\.(?:data|mailbox)")

_MAGIC = b"WEIGHBR1"
_FIELDS = struct.Struct("<8sII16sQQQQH")
_SUM = struct.Struct("<Q")
_LOCK_RETRY_S = 2.0
_NOT_OURS = "restart the daemon, which makes new files; look for another program that writes to this folder"
_DAEMON_GONE = "the daemon that made it is gone: start it again, or connect to one that runs"
_NO_FOLDER = f"make that folder on a tmpfs, or unset {DIRECTORY_ENV}"


@dataclass(frozen=True)
class Header:
    """The content of a file's first page. `count` units of `unit_nbytes` each follow it; `nbytes` is the whole file.

    `journal` is the journal of the daemon that made the file ("" for none): while a daemon has that open, the file is
    no orphan.
    """

    kind: int
    digest: bytes
    count: int
    unit_nbytes: int
    nbytes: int
    pid: int
    journal: str = ""


@dataclass(frozen=True)
class Room:
    """Bytes that may still be taken, and the bound that leaves them."""

    nbytes: int
    bound: str


class SharedFile:
    """One open file in shared memory with its shared lock: base of the arena and the mailbox.

    A forked child owns nothing: there `unlink` does nothing, and `close` drops the child's own descriptor and mapping.
    """

    def __init__(self, path: Path, fd: int) -> None:
        """Take over `fd`, which holds the file's shared lock."""
        self.path = path
        self._fd: int | None = fd
        self._pid = os.getpid()

    def close(self) -> None:
        """Let go of the file and its lock. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def unlink(self) -> None:
        """Remove the file's name; processes that have the file open keep it. Idempotent."""
        if os.getpid() == self._pid:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _descriptor(self) -> int:
        if self._fd is None:
            raise Closed(
                "this shared file was closed",
                where=str(self.path),
                expected="an open file",
                got="a closed one",
                remedy="open it again, or a new Bridge",
            )
        return self._fd


def directory(chosen: Path | None = None) -> Path:
    """The folder of shared files: the argument, else WEIGHBRIDGE_SHM_DIR, else /dev/shm."""
    return Path(chosen) if chosen is not None else Path(os.environ.get(DIRECTORY_ENV) or "/dev/shm")


def fresh_path(name: str, suffix: str, folder: Path) -> Path:
    """Make up an unguessable path `weighbridge-<name>-<16 hex>.<suffix>`. Raises ConfigError for a name without one
    letter or digit."""
    safe = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")[:48]
    if not safe:
        raise ConfigError(
            "a name needs at least one letter or digit",
            where="name",
            expected="a letter or digit in it",
            got=repr(name),
            remedy="choose another name for the bridge",
        )
    return folder / f"weighbridge-{safe}-{secrets.token_hex(8)}.{suffix}"


def encode_header(header: Header) -> bytes:
    """Encode a header as its page. Raises ConfigError for a journal path that does not fit in it."""
    journal = os.fsencode(header.journal)
    fields = _FIELDS.pack(
        _MAGIC, header.kind, PROTOCOL, header.digest, header.count, header.unit_nbytes, header.nbytes, header.pid,
        len(journal),
    )  # fmt: skip
    if len(fields) + len(journal) + _SUM.size > HEADER_NBYTES:
        raise ConfigError(
            "a journal path is too long",
            where=header.journal,
            expected=f"at most {HEADER_NBYTES - _SUM.size - len(fields)} bytes",
            got=f"{len(journal)} bytes",
            remedy="shorten XDG_STATE_HOME",
        )
    body = (fields + journal).ljust(HEADER_NBYTES - _SUM.size, b"\0")
    return body + _SUM.pack(xxhash.xxh3_64_intdigest(body))


def decode_header(page: bytes, where: str) -> Header:
    """Decode a header page. Raises ProtocolError for another magic or protocol, or a damaged page."""
    if len(page) != HEADER_NBYTES or page[:8] != _MAGIC:
        raise ProtocolError(
            "not a weighbridge file", where=where, expected=repr(_MAGIC), got=repr(page[:8]), remedy=_NOT_OURS
        )
    body = page[: -_SUM.size]
    if _SUM.unpack(page[-_SUM.size :])[0] != xxhash.xxh3_64_intdigest(body):
        raise ProtocolError(
            "a shared file's header is damaged",
            where=where,
            expected="a page that fits its checksum",
            got="another checksum",
            remedy=_NOT_OURS,
        )
    _, kind, protocol, digest, count, unit, nbytes, pid, length = _FIELDS.unpack_from(page)
    if protocol != PROTOCOL:
        raise ProtocolError(
            "a shared file of another protocol", where=where, expected=f"version {PROTOCOL}", got=str(protocol),
            remedy="run one version of weighbridge on both sides",
        )  # fmt: skip
    journal = os.fsdecode(page[_FIELDS.size : _FIELDS.size + length])
    return Header(kind, digest, count, unit, nbytes, pid, journal)


def create_file(path: Path, nbytes: int) -> int:
    """Create a new 0600 file of `nbytes` (sparse, zero) and lock it shared; returns its descriptor. Raises ConfigError
    for a folder that does not exist."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise ConfigError(
            "the shared memory folder does not exist",
            where=str(path.parent),
            expected="a folder",
            got="none",
            remedy=_NO_FOLDER,
        ) from None
    try:
        # The umask may have taken bits away; `open_file` accepts exactly these.
        os.fchmod(fd, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        os.ftruncate(fd, nbytes)
    except OSError:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return fd


def open_file(path: Path, *, writable: bool) -> tuple[int, Header]:
    """Open and lock (shared) a file that another process created; returns its descriptor and checked header.

    Raises NotFound (no such file, or unlinked meanwhile), ConfigError (a foreign owner, other permissions than 0600,
    not a plain file), ProtocolError (another program's, damaged, another size than its header says), Busy (the orphan
    cleaner holds it).
    """
    try:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(
            "no such shared file",
            where=str(path),
            expected="the file that the daemon announced",
            got="none",
            remedy=_DAEMON_GONE,
        ) from None
    except OSError as error:
        raise ConfigError(
            "a shared file cannot be opened",
            where=str(path),
            expected="a file of this user",
            got=str(error),
            remedy="run trainer, daemon and engines as one user",
        ) from error
    try:
        _check_owner(os.fstat(fd), path)
        # The orphan cleaner holds the exclusive lock for a moment while it looks at a file; no process does for long.
        if not take_lock(fd, fcntl.LOCK_SH, _LOCK_RETRY_S):
            raise Busy(
                "another process holds a shared file's exclusive lock",
                where=str(path),
                expected="a shared lock",
                got="an exclusive one, held elsewhere",
                remedy="try again; if it stays so, see which process it is: lslocks",
            )
        info = os.fstat(fd)
        if info.st_nlink == 0:
            raise NotFound(
                "the shared file was removed",
                where=str(path),
                expected="a file that has a name",
                got="one that was unlinked",
                remedy=_DAEMON_GONE,
            )
        header = decode_header(os.pread(fd, HEADER_NBYTES, 0), str(path))
        if header.nbytes != info.st_size:
            raise ProtocolError(
                "a shared file has the wrong size", where=str(path), expected=f"{header.nbytes} bytes",
                got=f"{info.st_size} bytes", remedy=_NOT_OURS,
            )  # fmt: skip
    except BaseException:
        os.close(fd)
        raise
    return fd, header


def _check_owner(info: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError(
            "a shared file must be a plain file",
            where=str(path),
            expected="a plain file",
            got=stat.filemode(info.st_mode),
            remedy=_NOT_OURS,
        )
    if info.st_uid != os.geteuid():
        raise ConfigError(
            "a shared file belongs to another user", where=str(path), expected=f"uid {os.geteuid()}",
            got=f"uid {info.st_uid}", remedy="run trainer, daemon and engines as one user",
        )  # fmt: skip
    if stat.S_IMODE(info.st_mode) != 0o600:
        raise ConfigError(
            "a shared file is open to others", where=str(path), expected="mode 0600",
            got=f"mode {stat.S_IMODE(info.st_mode):04o}", remedy="restart the daemon, which makes a new file",
        )  # fmt: skip


def require_room(nbytes: int, folder: Path) -> None:
    """Refuse a new file of `nbytes` that would not fit, before it is created. Raises ArenaFull with both sizes,
    ConfigError for a folder that does not exist."""
    if not folder.is_dir():
        raise ConfigError(
            "the shared memory folder does not exist",
            where=str(folder),
            expected="a folder",
            got="none",
            remedy=_NO_FOLDER,
        )
    room = min(_rooms(folder), key=lambda room: room.nbytes)
    if nbytes > room.nbytes:
        raise ArenaFull(
            "not enough shared memory for the arena",
            where=str(folder),
            expected=f"{nbytes} bytes ({nbytes / 2**30:.2f} GiB)",
            got=f"{max(room.nbytes, 0)} bytes ({max(room.nbytes, 0) / 2**30:.2f} GiB) left by {room.bound}",
            remedy="free memory or raise the limit named here (orphaned arenas are removed when a bridge starts)",
        )


def _rooms(folder: Path) -> Iterator[Room]:
    space = os.statvfs(folder)
    yield Room(space.f_bavail * space.f_frsize, f"the file system of {folder}")
    yield Room(psutil.virtual_memory().available - MEMORY_MARGIN, "MemAvailable")
    yield from cgroup_rooms(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    from_env = os.environ.get(LIMIT_ENV)
    if from_env:
        if not from_env.isdecimal():
            raise ConfigError(
                "not a number of bytes", where=LIMIT_ENV, expected="digits, such as 8589934592", got=repr(from_env),
                remedy=f"correct {LIMIT_ENV}, or unset it",
            )  # fmt: skip
        yield Room(int(from_env), LIMIT_ENV)


def cgroup_rooms(mount: Path, membership: Path) -> Iterator[Room]:
    """Yield the room that each memory cgroup above a process leaves, in both hierarchies; page cache counts as free.

    psutil knows nothing of cgroups. `mount` is /sys/fs/cgroup, `membership` /proc/self/cgroup.
    """
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
