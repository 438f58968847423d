"""The lease: one trainer process at a time may push to a daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.errors import LeaseHeld
from bridge.journal.lease import Lease, lease_holder
from bridge.journal.ledger import Ledger

HOLD = (
    "import sys\nfrom pathlib import Path\nfrom bridge.journal.lease import Lease\n"
    "lease = Lease.acquire('run', directory=Path(sys.argv[1]))\nprint('held', flush=True)\n"
    "for line in sys.stdin:\n"
    "    lease.release() if line.strip() == 'release' else None\n    print('done', flush=True)\n"
)


@pytest.fixture
def other_trainer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate(timeout=20)


def test_a_second_trainer_is_refused_by_name(tmp_path: Path, other_trainer: subprocess.Popen[str]) -> None:
    with pytest.raises(LeaseHeld, match=f"pid {other_trainer.pid} on "):
        Lease.acquire("run", directory=tmp_path)
    holder = lease_holder("run", directory=tmp_path)
    assert holder is not None
    assert holder.pid == other_trainer.pid


def test_the_lease_ends_with_its_process(tmp_path: Path, other_trainer: subprocess.Popen[str]) -> None:
    other_trainer.send_signal(signal.SIGKILL)
    other_trainer.wait(20)
    assert lease_holder("run", directory=tmp_path) is None
    Lease.acquire("run", directory=tmp_path).release()


def test_a_released_lease_can_be_taken(tmp_path: Path, other_trainer: subprocess.Popen[str]) -> None:
    assert other_trainer.stdin is not None
    assert other_trainer.stdout is not None
    other_trainer.stdin.write("release\n")
    other_trainer.stdin.flush()
    other_trainer.stdout.readline()
    lease = Lease.acquire("run", directory=tmp_path)
    assert lease.held
    lease.release()
    lease.release()
    assert not lease.held


def _held_elsewhere(folder: Path) -> str:
    code = (
        "import sys\nfrom pathlib import Path\nfrom bridge.journal.lease import lease_holder\n"
        "print(lease_holder('run', directory=Path(sys.argv[1])))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_asking_does_not_lose_the_lease(tmp_path: Path) -> None:
    """Closing any descriptor of the file would drop a POSIX lock of this process."""
    with_ledger = Ledger.open("run", directory=tmp_path)
    lease = Lease.acquire("run", directory=tmp_path)
    assert lease_holder("run", directory=tmp_path) is not None
    assert with_ledger.holder is not None
    with pytest.raises(LeaseHeld, match=f"pid {os.getpid()} on"):
        Lease.acquire("run", directory=tmp_path / ".." / tmp_path.name)
    assert _held_elsewhere(tmp_path).startswith(f"pid {os.getpid()} on")
    lease.release()
    assert _held_elsewhere(tmp_path) == "None"
    with_ledger.close()


def test_a_forked_child_does_not_have_the_lease(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom bridge.journal.lease import Lease, lease_holder\n"
        "folder = Path(sys.argv[1])\nlease = Lease.acquire('run', directory=folder)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    lease.release()\n"
        "    os._exit(0 if not lease.held and lease_holder('run', directory=folder).pid == os.getppid() else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "assert lease.held and lease_holder('run', directory=folder).pid == os.getpid()\n"
        "child = os.fork()\n"
        "if child == 0:\n    import time; time.sleep(60)\n"
        "print(child, flush=True)\nos._exit(0)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert process.wait(20) == 0
        # the child (a data loader worker, say) still lives, the trainer is gone
        Lease.acquire("run", directory=tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_leases_of_two_daemons_do_not_meet(tmp_path: Path) -> None:
    one, two = Lease.acquire("a", directory=tmp_path / "a"), Lease.acquire("b", directory=tmp_path / "b")
    assert one.held
    assert two.held
    one.release()
    two.release()
