from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import (
    Busy,
    Closed,
    ConfigError,
    LeaseHeld,
    NotFound,
    ProtocolError,
    StaleVersion,
    TransportError,
)
from bridge.journal.ledger import TRANSITIONS, EngineState, Lease, Ledger, Standing, lease_holder, transition
from bridge.journal.state_dir import state_dir

S = EngineState


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger.open("run", directory=tmp_path)
    yield made
    made.close()


def reopened(ledger: Ledger) -> Ledger:
    ledger.close()
    return Ledger.open("run", directory=ledger.path.parent)


# ---- versions --------------------------------------------------------------------------------------------------------


def test_versions_grow_by_one(ledger: Ledger) -> None:
    assert [ledger.issue() for _ in range(3)] == [1, 2, 3]
    assert ledger.issue(10) == 10
    assert ledger.issue() == 11
    assert ledger.highest == 11


@pytest.mark.parametrize("version", [7, 6, 0, -1])
def test_an_older_or_equal_version_is_stale_and_changes_nothing(ledger: Ledger, version: int) -> None:
    ledger.issue(7)
    before = ledger.path.read_bytes()
    with pytest.raises(StaleVersion) as caught:
        ledger.issue(version)
    assert "7" in (caught.value.expected or "")
    assert caught.value.got == str(version)
    assert ledger.path.read_bytes() == before
    assert ledger.issue() == 8


def test_a_rollback_never_lowers_the_highest(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.record("committed", version=ledger.issue())
    assert (ledger.committed, ledger.previous) == (2, 1)
    ledger.record("rolled_back", version=1)
    assert (ledger.committed, ledger.previous) == (1, None)
    assert ledger.highest == 2
    again = reopened(ledger)
    assert (again.committed, again.previous, again.highest) == (1, None, 2)
    with pytest.raises(StaleVersion):
        again.issue(2)
    assert again.issue() == 3
    again.close()


def test_an_aborted_version_is_never_given_out_again(ledger: Ledger) -> None:
    ledger.record("aborted", version=ledger.issue(), reason="why")
    again = reopened(ledger)
    assert again.issue() == 2
    assert again.committed is None
    again.close()


@pytest.mark.parametrize("kind", ["committed", "sealed", "rolled_back"])
def test_a_version_that_was_never_issued_is_refused(ledger: Ledger, kind: str) -> None:
    ledger.issue(3)
    with pytest.raises(ProtocolError, match="never issued"):
        ledger.record(kind, version=4)
    assert ledger.committed is None


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("deleted", {"version": 1}),
        ("issued", {}),
        ("issued", {"version": "1"}),
        ("issued", {"version": -1}),
        ("issued", {"version": 2**62 + 1}),
        ("committed", {"version": 1, "unknown": 1}),
        ("receipt", {"version": 1, "receipt": [1]}),
    ],
)
def test_an_entry_of_no_known_form_is_refused(ledger: Ledger, kind: str, fields: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        ledger.record(kind, **fields)
    assert ledger.path.read_bytes() == b""


def test_receipts_come_back_in_order(ledger: Ledger) -> None:
    for version in range(1, 6):
        ledger.record("receipt", version=ledger.issue(), receipt={"version": version, "phases": {"load": 0.25}})
    for one in (ledger, Ledger.open("run", directory=ledger.path.parent, readonly=True)):
        assert [r["version"] for r in one.receipts()] == [1, 2, 3, 4, 5]
        assert one.receipts(2) == [{"version": 4, "phases": {"load": 0.25}}, {"version": 5, "phases": {"load": 0.25}}]
        assert one.receipts(0) == []
        assert len(one.receipts(99)) == 5
        one.close()


def test_slots_follow_seals_and_aborts(ledger: Ledger) -> None:
    ledger.record("sealed", version=ledger.issue(), root="ab", slot=0)
    ledger.record("sealed", version=ledger.issue(), root="cd", slot=1)
    assert ledger.slots == {0: 1, 1: 2}
    ledger.record("aborted", version=2)
    again = reopened(ledger)
    assert again.slots == {0: 1}
    again.close()


# ---- the journal -----------------------------------------------------------------------------------------------------


def test_the_journal_is_private(ledger: Ledger) -> None:
    assert ledger.path.stat().st_mode & 0o777 == 0o600
    assert ledger.path.parent.stat().st_mode & 0o777 == 0o700


def test_the_journal_lies_in_the_state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    ledger = Ledger.open("run1")
    assert ledger.path == tmp_path / "weighbridge" / "run1" / "journal.jsonl"
    ledger.close()
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_dir("x") == tmp_path / ".local" / "state" / "weighbridge" / "x"


@pytest.mark.parametrize("name", ["", "..", ".x", "a/b", "a b", "x" * 65, "a\n"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        Ledger.open(name)


def test_every_line_is_json_with_a_checksum(ledger: Ledger) -> None:
    ledger.issue()
    ledger.record("committed", version=1)
    lines = ledger.path.read_text().splitlines()
    assert [json.loads(line)["entry"]["kind"] for line in lines] == ["issued", "committed"]


def _history(ledger: Ledger) -> bytes:
    for _ in range(3):
        version = ledger.issue()
        ledger.record("sealed", version=version, root="00" * 16)
        ledger.record("committed", version=version)
        ledger.record("receipt", version=version, receipt={"v": version})
    ledger.close()
    return ledger.path.read_bytes()


def _replayed(data: bytes) -> tuple[int, int | None, int]:
    """The oracle: what the complete lines of a journal say."""
    highest, committed, receipts = 0, None, 0
    for line in data.splitlines():
        entry = json.loads(line)["entry"]
        highest = max(highest, entry["version"]) if entry["kind"] == "issued" else highest
        committed = entry["version"] if entry["kind"] == "committed" else committed
        receipts += entry["kind"] == "receipt"
    return highest, committed, receipts


def test_a_journal_torn_at_any_byte_is_replayed_up_to_its_last_whole_line(tmp_path: Path) -> None:
    data = _history(Ledger.open("run", directory=tmp_path))
    path = tmp_path / "journal.jsonl"
    for end in range(len(data) + 1):
        path.write_bytes(data[:end])
        whole = data[: data.rfind(b"\n", 0, end) + 1]
        readonly = Ledger.open("run", directory=tmp_path, readonly=True)
        assert path.read_bytes() == data[:end]
        ledger = Ledger.open("run", directory=tmp_path)
        for one in (ledger, readonly):
            assert (one.highest, one.committed, len(one.receipts())) == _replayed(whole)
        assert path.read_bytes() == whole
        # and goes on from there
        assert ledger.issue() == ledger.highest
        ledger.close()
        readonly.close()
        again = Ledger.open("run", directory=tmp_path, readonly=True)
        assert again.highest == ledger.highest
        again.close()


def test_damage_before_the_last_line_is_refused(tmp_path: Path) -> None:
    data = _history(Ledger.open("run", directory=tmp_path))
    path = tmp_path / "journal.jsonl"
    last = data.rfind(b"\n", 0, len(data) - 1)
    for at in range(0, last, 5):
        if data[at : at + 1] == b"\n":
            continue
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ProtocolError, match="journal is damaged"):
            Ledger.open("run", directory=tmp_path)
        assert len(path.read_bytes()) == len(data)


def test_a_disk_that_fills_up_leaves_whole_lines(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.issue()
    before = ledger.path.read_bytes()
    write = os.write
    monkeypatch.setattr("bridge.journal.ledger.os.write", lambda fd, data: write(fd, data[:10]))
    with pytest.raises(TransportError, match="disk is full"):
        ledger.record("committed", version=1)
    monkeypatch.undo()
    assert ledger.path.read_bytes() == before
    assert ledger.committed is None
    ledger.record("committed", version=1)
    again = reopened(ledger)
    assert again.committed == 1
    again.close()


def test_commits_are_on_disk_before_record_returns(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("bridge.journal.ledger.os.fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    ledger.issue()
    assert synced == []
    for kind in ("committed", "rolled_back"):
        ledger.record(kind, version=1)
        assert synced[-1] == ledger.path.stat().st_size
    ledger.record("quarantined", engine="e")
    assert len(synced) == 3


def test_one_daemon_per_journal(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.journal.ledger._LOCK_RETRY_S", 0.05)
    with pytest.raises(Busy):
        Ledger.open("run", directory=ledger.path.parent)
    reader = Ledger.open("run", directory=ledger.path.parent, readonly=True)
    with pytest.raises(ProtocolError, match="read-only"):
        reader.issue()
    reader.close()
    reopened(ledger).close()


def test_reading_a_journal_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        Ledger.open("run", directory=tmp_path, readonly=True)


def test_a_closed_ledger_refuses(ledger: Ledger) -> None:
    ledger.close()
    ledger.close()
    with pytest.raises(Closed):
        ledger.issue()


# ---- engines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("now", "to"), itertools.product(S, S))
def test_only_the_steps_of_the_table_are_taken(now: EngineState, to: EngineState) -> None:
    standing = Standing("e", now, serving=4)
    if to in TRANSITIONS[now]:
        standing.move(to)
        assert standing.state is to
        assert transition("e", now, to) is to
    else:
        with pytest.raises(ProtocolError, match=f"got: {to.name}"):
            standing.move(to)
        assert standing.state is now


def test_serving_is_reached_only_through_verified_or_untouched() -> None:
    assert {now for now in S if S.SERVING in TRANSITIONS[now]} == {S.VERIFIED, S.STAGING}
    assert {now for now in S if S.VERIFIED in TRANSITIONS[now]} == {S.LOADED}
    assert {now for now in S if S.LOADED in TRANSITIONS[now]} == {S.STAGING}


@given(st.lists(st.tuples(st.sampled_from(S), st.none() | st.integers(1, 9)), max_size=30))
@settings(deadline=None)
def test_no_walk_generates_outside_serving(walk: list[tuple[EngineState, int | None]]) -> None:
    standing = Standing("e")
    assert not standing.may_generate
    for to, serving in walk:
        before = standing.state, standing.serving
        try:
            standing.move(to, serving)
        except ProtocolError:
            assert (standing.state, standing.serving) == before
        assert standing.may_generate == (standing.state is S.SERVING)
        assert standing.state is not S.SERVING or standing.serving is not None
        assert standing.state is not S.QUARANTINED or standing.serving is None


# ---- the lease -------------------------------------------------------------------------------------------------------

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
