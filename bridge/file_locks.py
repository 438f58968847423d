"""Lock files with flock, which the kernel drops when the last descriptor of the lock is closed, by whatever end."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path


def lock_of(journal: Path) -> Path:
    """Name the file beside a daemon's journal that the daemon holds locked while it has the journal open."""
    return journal.with_name(f"{journal.name}.lock")


def take_lock(fd: int, mode: int, wait_s: float = 0.0) -> bool:
    """Lock a file shared (LOCK_SH) or exclusively (LOCK_EX), trying again for `wait_s`; False when another has it."""
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, mode | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.01)
