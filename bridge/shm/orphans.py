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
from dataclasses import dataclass
from pathlib import Path

import psutil

from bridge.errors import ProtocolError
from bridge.file_locks import lock_of, take_lock
from bridge.shm import files

MIN_AGE_S = 60.0


@dataclass(frozen=True)
class Orphan:
    """A file that no process has: its size in bytes on the file system and its age in seconds."""

    path: Path
    nbytes: int
    age_s: float


def find_orphans(directory: Path | None = None, *, min_age_s: float = MIN_AGE_S) -> list[Orphan]:
    """List the orphaned arenas and mailboxes of this user, by path. Changes nothing; does not block.

    `directory`: default WEIGHBRIDGE_SHM_DIR, then /dev/shm; a folder that does not exist holds none.
    """
    return _sweep(files.directory(directory), min_age_s, remove=False)


def clean_orphans(directory: Path | None = None, *, min_age_s: float = MIN_AGE_S) -> list[Orphan]:
    """Unlink the orphans, each under its exclusive lock; returns them. Called whenever a bridge starts."""
    return _sweep(files.directory(directory), min_age_s, remove=True)


def _sweep(folder: Path, min_age_s: float, *, remove: bool) -> list[Orphan]:
    candidates = list(_candidates(folder, min_age_s))
    if not candidates:
        return []
    mapped = _mapped_files()
    found = []
    for path in candidates:
        with _exclusively(path) as fd:
            if fd is None:
                continue
            info = os.fstat(fd)
            age = _age_s(info)
            if (info.st_dev, info.st_ino) in mapped or age < min_age_s or _journal_open(fd):
                continue
            if remove:
                path.unlink(missing_ok=True)
            found.append(Orphan(path, info.st_blocks * 512, age))
    return found


def _candidates(folder: Path, min_age_s: float) -> Iterator[Path]:
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        path = folder / name
        if not files.FILE_PATTERN.fullmatch(name):
            continue
        with contextlib.suppress(FileNotFoundError):
            info = path.lstat()
            if stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid() and _age_s(info) >= min_age_s:
                yield path


def _age_s(info: os.stat_result) -> float:
    # Writes through a mapping do not touch mtime: a file may look older than it is, and then the lock decides.
    return time.time() - max(info.st_mtime, info.st_ctime)


@contextlib.contextmanager
def _exclusively(path: Path) -> Iterator[int | None]:
    """Yield the descriptor of a file whose exclusive lock could be had and that still has its name, else None."""
    with contextlib.ExitStack() as stack:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, fd)
            ours = take_lock(fd, fcntl.LOCK_EX) and os.path.samestat(os.fstat(fd), path.lstat())
        except OSError:
            ours = False
        yield fd if ours else None


def _journal_open(fd: int) -> bool:
    try:
        journal = files.decode_header(os.pread(fd, files.HEADER_NBYTES, 0), "").journal
    except ProtocolError:
        return False  # never finished, or of another version: lock, maps and age decide
    if not journal:
        return False
    try:
        lock = os.open(lock_of(Path(journal)), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not take_lock(lock, fcntl.LOCK_SH)
    finally:
        os.close(lock)


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
