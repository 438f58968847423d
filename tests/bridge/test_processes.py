"""What tells a process from a later one of the same pid."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from bridge.daemon.processes import started_at


def test_a_running_process_has_a_start_time() -> None:
    mine = started_at(os.getpid())
    assert mine is not None
    assert mine.isdecimal()
    assert started_at(os.getpid()) == mine


def test_a_process_that_was_never_there_has_none() -> None:
    assert started_at(2**22 + 1) is None


def test_a_killed_child_that_nobody_waits_for_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert started_at(child.pid) is not None
        child.kill()
        until = time.monotonic() + 10
        while started_at(child.pid) is not None and time.monotonic() < until:
            time.sleep(0.01)
        assert Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z", "it still has its line"
        assert started_at(child.pid) is None
    finally:
        child.kill()
        child.wait()
