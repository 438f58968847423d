"""Which process is meant: a pid is used again, a pid with the kernel's start time names one process for good."""

from __future__ import annotations

from pathlib import Path

_ENDED = ("Z", "X", "x")
"""States of a process that is a line in the kernel's table and nothing else."""


def started_at(pid: int) -> str | None:
    """The kernel's start time of a process; None when there is none of this number (here: another PID namespace has
    numbers of its own), and for one that has ended and that its parent has not asked after yet."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in _ENDED else fields[18]
    except (FileNotFoundError, ProcessLookupError, IndexError, ValueError):
        return None
