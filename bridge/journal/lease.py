"""The lease: the right to push to one daemon, held by one trainer process.

It is a POSIX lock on a file of its own: it ends with the process, however that ends, and forked children do not inherit
it (data loader workers would keep a flock alive). The price: the kernel drops it as soon as the process closes *any*
descriptor of that file. So a process opens the file once, and looks into its own registry before it touches the file
again. The file's content names the holder.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from pathlib import Path

import msgspec

from bridge.errors import ConfigError, LeaseHeld
from bridge.journal.state_dir import state_dir

_LOCK_FILE = "lease"
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid


class Holder(msgspec.Struct, frozen=True):
    """The process that holds a lease."""

    pid: int
    host: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


_registry: dict[Path, Lease] = {}
"""Leases of this process by lock file: POSIX locks belong to the whole process, so the registry does, too."""
_registry_lock = threading.Lock()


class Lease:
    """A lease that this process holds until `release` or its end."""

    def __init__(self, path: Path, fd: int) -> None:
        """Use `acquire`. Takes over `fd`, whose file this process has locked."""
        self._path = path
        self._fd = fd
        self._pid = os.getpid()

    @classmethod
    def acquire(cls, name: str, *, directory: Path | None = None) -> Lease:
        """Take the lease of daemon `name`; does not wait.

        `directory` replaces `$XDG_STATE_HOME/weighbridge/NAME`. Raises LeaseHeld naming the holder (another process, or
        this one), ConfigError for a bad name or a folder that cannot be used.
        """
        path = state_dir(name, directory) / _LOCK_FILE
        with _registry_lock:
            if path in _registry and _registry[path].held:
                raise _refusal(name, Holder(os.getpid(), socket.gethostname()))
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                blocker = _blocker(fd)
                os.close(fd)
                raise _refusal(name, blocker) from None
            except OSError as error:
                os.close(fd)
                raise ConfigError(
                    "this folder cannot hold locks",
                    where=str(path),
                    expected="a file system with POSIX locks",
                    got=str(error),
                    remedy="set XDG_STATE_HOME to a folder on a local disk",
                ) from error
            lease = _registry[path] = cls(path, fd)
        name_of_holder = msgspec.json.encode(Holder(os.getpid(), socket.gethostname()))
        os.ftruncate(fd, os.pwrite(fd, name_of_holder, 0))
        return lease

    @property
    def held(self) -> bool:
        """True while this process holds it; False after `release` and in a forked child."""
        return self._pid == os.getpid() and _registry.get(self._path) is self

    def release(self) -> None:
        """Give the lease up. Idempotent; does nothing in a forked child, whose parent keeps it."""
        if self._pid != os.getpid():  # before the lock: a thread that held it at the fork is not in the child
            return
        with _registry_lock:
            if self.held:
                del _registry[self._path]
                os.close(self._fd)


def lease_holder(name: str, *, directory: Path | None = None) -> Holder | None:
    """Look up the process that holds the lease of `name` now, or None. Takes no lock; does not block."""
    path = state_dir(name, directory) / _LOCK_FILE
    with _registry_lock:
        if path in _registry and _registry[path].held:  # not in a forked child, which has the registry without the lock
            return Holder(os.getpid(), socket.gethostname())
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return _blocker(fd)
        finally:
            os.close(fd)


def _blocker(fd: int) -> Holder | None:
    query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, query))
    if kind == fcntl.F_UNLCK:
        return None
    try:
        written = msgspec.json.decode(os.pread(fd, 4096, 0), type=Holder)
    except (OSError, msgspec.DecodeError):  # just taken, and not named yet
        return Holder(pid, socket.gethostname())
    # The kernel's number is the truth on this host; from another host (a shared home) it means nothing.
    return Holder(pid, written.host) if written.host == socket.gethostname() and pid > 0 else written


def _refusal(name: str, holder: Holder | None) -> LeaseHeld:
    return LeaseHeld(
        "another trainer holds the right to push",
        where=name,
        expected="a lease that is free",
        got=str(holder) if holder is not None else "a process that is just releasing it",
        remedy="end that trainer (or close its bridge), or push to a daemon of your own",
    )
