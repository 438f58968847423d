"""Which process is meant: a pid is used again, a pid with the kernel's start time names one process for good."""

from __future__ import annotations

from pathlib import Path


def started_at(pid: int) -> str | None:
    """The kernel's start time of a process; None when there is none of this number (here: another PID namespace has
    numbers of its own)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return None
