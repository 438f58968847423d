"""Tell processes apart that had the same pid: a pid with its start time names one process for good."""

from __future__ import annotations

import os

import psutil


def started_at(pid: int) -> str | None:
    """The start time of a process in clock ticks since boot, to be kept with its pid and compared later.

    None when no process of this node, seen from our PID namespace, has this pid, and for one that has ended and that
    its parent has not waited for.
    """
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        # psutil adds the boot time, which moves when the clock is set.
        return str(round((process.create_time() - psutil.boot_time()) * os.sysconf("SC_CLK_TCK")))
    except psutil.NoSuchProcess:
        return None
