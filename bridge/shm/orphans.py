"""Find shared files that a crash left behind, and remove them when no process can miss them.

A file is an orphan when all of this holds: its exclusive lock can be had, no process maps it, no daemon has the journal
open that it names, and it did not change for a minute. Each alone can mislead: an actor's restart leaves the lock free
for up to a second, a forked child keeps it, a file being created has no header yet.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from bridge.errors import ProtocolError
from bridge.file_locks import lock_of, take_lock
from bridge.shm import files

MIN_AGE_S = 60.0


def find_orphans(directory: Path | None = None, *, remove: bool = False) -> list[Path]:
    """List the orphaned arenas and mailboxes of this user. Changes nothing without `remove`; does not block.

    Args:
        directory: default WEIGHBRIDGE_SHM_DIR, then /dev/shm; a folder that does not exist holds none.
        remove: unlink each orphan under its exclusive lock.
    """
    candidates = [path for path, info in own_files(directory) if _age_s(info) >= MIN_AGE_S]
    mapped = _mapped_files() if candidates else set()
    found = []
    for path in candidates:
        with contextlib.suppress(OSError), opened(path) as fd:  # removed meanwhile
            if not take_lock(fd, fcntl.LOCK_EX):
                continue
            info = os.fstat(fd)
            if not os.path.samestat(info, path.lstat()) or _age_s(info) < MIN_AGE_S:
                continue
            if (info.st_dev, info.st_ino) in mapped or _journal_open(fd):
                continue
            if remove:
                path.unlink(missing_ok=True)
            found.append(path)
    return found


def clean_orphans(directory: Path | None = None) -> list[Path]:
    """Unlink the orphans; returns them. Called whenever a bridge starts."""
    return find_orphans(directory, remove=True)


def own_files(directory: Path | None) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the arenas and mailboxes of this user, by path."""
    folder = files.directory(directory)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if files.FILE_PATTERN.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                info = path.lstat()
                if stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid():
                    yield path, info


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file to look at it; yields its descriptor. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def journal_of(fd: int) -> str:
    """Read the journal that a shared file's header names; "" for none, a file still in the making, another version."""
    try:
        return files.decode_header(os.pread(fd, files.HEADER_NBYTES, 0), "").journal
    except ProtocolError:
        return ""


def _age_s(info: os.stat_result) -> float:
    # Writes through a mapping do not touch mtime: a file may look older than it is, and then the lock decides.
    return time.time() - max(info.st_mtime, info.st_ctime)


def _journal_open(fd: int) -> bool:
    journal = journal_of(fd)
    if not journal:  # then lock, maps and age decide
        return False
    try:
        with opened(lock_of(Path(journal))) as lock:
            return not take_lock(lock, fcntl.LOCK_SH)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _mapped_files() -> set[tuple[int, int]]:
    """Collect (device, inode) of every file that a process we may look at has mapped; other users cannot open 0600
    files. (psutil's memory maps name paths, not files, and read smaps, for which the kernel walks every page.)"""
    mapped: set[tuple[int, int]] = set()
    for pid in psutil.pids():
        try:
            lines = Path("/proc", str(pid), "maps").read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                major, _, minor = fields[3].partition(":")
                mapped.add((os.makedev(int(major, 16), int(minor, 16)), int(fields[4])))
    return mapped
