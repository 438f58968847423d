from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridge.journal.ledger import Ledger
from bridge.model.manifest import TensorInfo, lay_out
from bridge.shm.arena import Arena
from bridge.shm.mailbox import Mailbox
from bridge.shm.orphans import clean_orphans, find_orphans

MANIFEST = lay_out([TensorInfo("w", "fp32", (64,))])


@pytest.fixture
def left_behind(tmp_path: Path) -> list[Path]:
    """An arena and a mailbox whose makers are gone."""
    folder = tmp_path / "shm"
    folder.mkdir()
    paths = []
    for made in (
        Arena.create(MANIFEST, name="a", directory=folder),
        Mailbox.create("a", 2, directory=folder),
    ):
        made.close()
        paths.append(made.path)
    return paths


@pytest.fixture(autouse=True)
def _two_minutes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    # ctime cannot be set, so the clock moves
    now = time.time
    monkeypatch.setattr("bridge.shm.orphans.time.time", lambda: now() + 120)


def test_what_nobody_has_is_found_and_removed(left_behind: list[Path]) -> None:
    folder = left_behind[0].parent
    assert find_orphans(folder) == sorted(left_behind)
    assert clean_orphans(folder) == sorted(left_behind)
    assert list(folder.iterdir()) == []
    assert clean_orphans(folder) == []


def test_finding_changes_nothing(left_behind: list[Path]) -> None:
    find_orphans(left_behind[0].parent)
    assert all(path.exists() for path in left_behind)


def test_a_young_file_is_left(left_behind: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert clean_orphans(left_behind[0].parent) == []
    assert all(path.exists() for path in left_behind)


def test_a_file_that_somebody_locks_is_left(left_behind: list[Path]) -> None:
    arena, mailbox = left_behind
    with arena.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert find_orphans(arena.parent) == [mailbox]
    assert find_orphans(arena.parent) == sorted(left_behind)


def test_a_lock_in_a_child_whose_parent_died_counts(left_behind: list[Path]) -> None:
    # the parent opens and locks, the child inherits the descriptor, the parent is killed
    code = (
        "import fcntl, os, subprocess, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\nfcntl.flock(fd, fcntl.LOCK_SH)\nos.set_inheritable(fd, True)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], pass_fds=[fd])\n"
        "print(child.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(left_behind[0])], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.wait(20)
    try:
        assert find_orphans(left_behind[0].parent) == [left_behind[1]]
    finally:
        parent.stdin.close()
        deadline = time.monotonic() + 20
        while Path("/proc", str(child)).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    parent.stdout.close()
    assert find_orphans(left_behind[0].parent) == sorted(left_behind)


def test_a_file_that_a_process_maps_is_left(left_behind: list[Path]) -> None:
    code = (
        "import mmap, os, sys\nfd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "m = mmap.mmap(fd, 4096, prot=mmap.PROT_READ)\nprint('mapped', flush=True)\ninput()\n"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", code, str(left_behind[0])], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    reader.stdout.readline()
    try:
        assert clean_orphans(left_behind[0].parent) == [left_behind[1]]
        assert left_behind[0].exists()
    finally:
        reader.communicate(b"\n", timeout=20)
    assert find_orphans(left_behind[0].parent) == [left_behind[0]]


def test_a_file_whose_journal_is_open_is_left(tmp_path: Path) -> None:
    ledger = Ledger.open("run", directory=tmp_path / "state")
    arena = Arena.create(MANIFEST, name="a", directory=tmp_path, journal=ledger.path)
    arena.close()
    mailbox = Mailbox.create("a", 1, directory=tmp_path, journal=ledger.path)
    mailbox.close()
    assert clean_orphans(tmp_path) == []
    ledger.issue()  # looking at the journal's lock has not taken it away
    ledger.close()
    assert clean_orphans(tmp_path) == sorted([arena.path, mailbox.path])


def test_a_journal_that_is_gone_keeps_nothing(tmp_path: Path) -> None:
    arena = Arena.create(MANIFEST, name="a", directory=tmp_path, journal=tmp_path / "gone.sqlite")
    arena.close()
    assert clean_orphans(tmp_path) == [arena.path]


def test_a_living_arena_is_left(tmp_path: Path) -> None:
    with Arena.create(MANIFEST, name="a", directory=tmp_path), Mailbox.create("a", 1, directory=tmp_path):
        assert clean_orphans(tmp_path) == []


def test_half_made_files_are_removed_and_strangers_are_left(tmp_path: Path) -> None:
    half = tmp_path / "weighbridge-x-0123456789abcdef.data"
    half.touch(mode=0o600)
    strangers = [
        tmp_path / "weighbridge-x-0123456789abcdef.data.bak",
        tmp_path / "weighbridge-x.data",
        tmp_path / "other-weighbridge-x-0123456789abcdef.data",
        tmp_path / "psm_12345678",
    ]
    for path in strangers:
        path.touch()
    folder = tmp_path / "weighbridge-y-0123456789abcdef.data"
    folder.mkdir()
    link = tmp_path / "weighbridge-z-0123456789abcdef.data"
    link.symlink_to(strangers[0])
    assert clean_orphans(tmp_path) == [half]
    assert all(path.exists() for path in [*strangers, folder, link])


def test_other_users_files_are_left(left_behind: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.geteuid()
    monkeypatch.setattr("bridge.shm.orphans.os.geteuid", lambda: mine + 1)
    assert find_orphans(left_behind[0].parent) == []


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert clean_orphans(tmp_path / "gone") == []
