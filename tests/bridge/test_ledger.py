"""The ledger: which versions it gives out, and what its journal still says after a kill, a full disk or damage."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.errors import Busy, Closed, ConfigError, ProtocolError, StaleVersion, TransportError
from bridge.journal import ledger as ledger_module
from bridge.journal.ledger import JOURNAL, Ledger
from bridge.journal.state_dir import state_dir


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger.open("run", directory=tmp_path)
    yield made
    made.close()


def reopened(ledger: Ledger) -> Ledger:
    ledger.close()
    return Ledger.open("run", directory=ledger.path.parent)


def facts(ledger: Ledger) -> tuple[int, int | None, list[dict[str, object]]]:
    return ledger.highest, ledger.committed, ledger.receipts()


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process, whose standard output is read line by line."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


OPEN = (
    "import os, signal, sys\nfrom pathlib import Path\nfrom bridge.journal.ledger import Ledger\n"
    "ledger = Ledger.open('run', directory=Path(sys.argv[1]))\n"
)


# ---- versions --------------------------------------------------------------------------------------------------------


def test_versions_grow_by_one(ledger: Ledger) -> None:
    assert [ledger.issue() for _ in range(3)] == [1, 2, 3]
    assert ledger.issue(10) == 10
    assert ledger.issue() == 11
    assert ledger.highest == 11


@pytest.mark.parametrize("version", [7, 6, 0, -1])
def test_an_older_or_equal_version_is_stale_and_changes_nothing(ledger: Ledger, version: int) -> None:
    ledger.issue(7)
    with pytest.raises(StaleVersion) as caught:
        ledger.issue(version)
    assert "7" in (caught.value.expected or "")
    assert caught.value.got == str(version)
    again = reopened(ledger)
    assert facts(again) == (7, None, [])
    assert again.issue() == 8
    again.close()


def test_a_rollback_never_lowers_the_highest(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.record("committed", version=ledger.issue())
    assert ledger.committed == 2
    ledger.record("rolled_back", version=1)
    assert (ledger.committed, ledger.highest) == (1, 2)
    again = reopened(ledger)
    assert (again.committed, again.highest) == (1, 2)
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
    again = reopened(ledger)
    assert facts(again) == (0, None, [])
    again.close()


def test_receipts_come_back_in_order(ledger: Ledger) -> None:
    for version in range(1, 6):
        ledger.record("receipt", version=ledger.issue(), receipt={"version": version, "phases": {"load": 0.25}})
    for _ in range(2):
        assert [r["version"] for r in ledger.receipts()] == [1, 2, 3, 4, 5]
        assert ledger.receipts(2) == [{"version": v, "phases": {"load": 0.25}} for v in (4, 5)]
        assert ledger.receipts(0) == []
        assert len(ledger.receipts(99)) == 5
        ledger = reopened(ledger)
    ledger.close()


def test_threads_share_a_ledger(ledger: Ledger) -> None:
    given: list[int] = []
    threads = [threading.Thread(target=lambda: given.extend(ledger.issue() for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given) == list(range(1, 81))


# ---- the journal -----------------------------------------------------------------------------------------------------


def test_the_journal_and_its_log_are_private(ledger: Ledger) -> None:
    before = os.umask(0)
    try:
        ledger.issue()
    finally:
        os.umask(before)
    assert JOURNAL in os.listdir(ledger.path.parent)
    assert {path.stat().st_mode & 0o777 for path in ledger.path.parent.iterdir()} == {0o600}
    assert ledger.path.parent.stat().st_mode & 0o777 == 0o700


def test_the_journal_lies_in_the_state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    ledger = Ledger.open("run1")
    assert ledger.path == tmp_path / "weighbridge" / "run1" / JOURNAL
    ledger.close()
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_dir("x") == tmp_path / ".local" / "state" / "weighbridge" / "x"


@pytest.mark.parametrize("name", ["", "..", ".x", "a/b", "a b", "x" * 65, "a\n"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        Ledger.open(name)


def test_old_entries_go_and_the_highest_version_and_the_commit_stay(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "KEPT_ENTRIES", 5)
    ledger.record("committed", version=ledger.issue(100))
    for version in range(101, 160):
        ledger.record("sealed", version=ledger.issue())
        ledger.record("receipt", version=version, receipt={"version": version})
    for _ in range(20):
        ledger.record("aborted", version=159)
    kept = [{"version": version} for version in range(155, 160)]
    assert facts(ledger) == (159, 100, kept)
    ledger = reopened(ledger)
    assert facts(ledger) == (159, 100, kept)
    with sqlite3.connect(ledger.path) as database:
        counts = dict(database.execute("SELECT kind, count(*) FROM entries GROUP BY kind"))
    database.close()
    assert counts == {"issued": 5, "committed": 1, "sealed": 5, "receipt": 5, "aborted": 5}
    ledger.close()


def test_the_journal_does_not_grow_for_ever(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "KEPT_ENTRIES", 3)
    ledger.issue()
    for _ in range(3000):
        ledger.record("receipt", version=1, receipt={"text": "x" * 1000})
    nbytes = sum(path.stat().st_size for path in ledger.path.parent.iterdir())
    assert nbytes < 8 << 20, "SQLite's log is folded in every thousand pages"


def test_commits_are_synced_and_nothing_else_happens_in_the_pause(ledger: Ledger) -> None:
    ran: list[str] = []
    ledger._database.set_trace_callback(ran.append)
    for kind, fields, mode, pages in (
        ("issued", {"version": 1}, "NORMAL", 1000),
        ("sealed", {"version": 1}, "NORMAL", 1000),
        ("committed", {"version": 1}, "FULL", 0),
        ("receipt", {"version": 1, "receipt": {}}, "NORMAL", 1000),
        ("rolled_back", {"version": 1}, "FULL", 0),
        ("quarantined", {"engine": "e"}, "FULL", 0),
    ):
        ran.clear()
        ledger.record(kind, **fields)
        assert ran[:3] == [f"PRAGMA synchronous = {mode}", f"PRAGMA wal_autocheckpoint = {pages}", "BEGIN IMMEDIATE"]
        assert ran[-1] == "COMMIT"
    other = sqlite3.connect(ledger.path)
    assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()


def test_a_closed_ledger_refuses(ledger: Ledger) -> None:
    ledger.close()
    ledger.close()
    with pytest.raises(Closed):
        ledger.issue()
    with pytest.raises(Closed):
        ledger.receipts()


# ---- a second process ------------------------------------------------------------------------------------------------


def test_one_daemon_per_journal_and_the_next_one_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_LOCK_RETRY_S", 0.05)
    other = python(OPEN + "ledger.record('committed', version=ledger.issue(41))\nprint('open', flush=True)\ninput()\n",
                   tmp_path)  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    with pytest.raises(Busy, match="another name"):
        Ledger.open("run", directory=tmp_path)
    other.kill()
    other.communicate(timeout=20)
    ledger = Ledger.open("run", directory=tmp_path)
    assert facts(ledger) == (41, 41, [])
    with pytest.raises(Busy):
        Ledger.open("run", directory=tmp_path)
    ledger.close()


STEPS = ("BEGIN", "INSERT", "DELETE", "COMMIT")


@pytest.mark.parametrize("kind", ["issued", "committed", "receipt"])
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_before_the_end_of_an_entry_leaves_what_was_there_before(tmp_path: Path, step: str, kind: str) -> None:
    """The kill is injected into SQLite: before the named statement of the entry is run."""
    code = OPEN + (
        "ledger.record('committed', version=ledger.issue(5))\n"
        "ledger.record('receipt', version=5, receipt={'version': 5})\nledger.issue(6)\n"
        "kill = lambda sql: os.kill(os.getpid(), signal.SIGKILL) if sql.startswith(sys.argv[2]) else None\n"
        "ledger._database.set_trace_callback(kill)\n"
        "fields = {'issued': {'version': 7}, 'committed': {'version': 6},"
        " 'receipt': {'version': 6, 'receipt': {'version': 6}}}[sys.argv[3]]\n"
        "ledger.record(sys.argv[3], **fields)\n"
    )
    child = python(code, tmp_path, step, kind)
    child.communicate(timeout=30)
    assert child.returncode == -signal.SIGKILL
    ledger = Ledger.open("run", directory=tmp_path)
    assert facts(ledger) == (6, 5, [{"version": 5}])
    assert ledger.issue() == 7
    ledger.close()


@pytest.mark.parametrize("entries", [1, 40, 300])
def test_a_kill_at_any_moment_loses_nothing_that_was_recorded(tmp_path: Path, entries: int) -> None:
    code = OPEN + (
        "while True:\n"
        "    version = ledger.issue()\n    print('issued', version, flush=True)\n"
        "    ledger.record('committed', version=version)\n    print('committed', version, flush=True)\n"
        "    ledger.record('receipt', version=version, receipt={'version': version, 'text': 'x' * 5000})\n"
        "    print('receipt', version, flush=True)\n"
    )
    child = python(code, tmp_path)
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(entries)]
    child.kill()
    lines += child.stdout.read().splitlines()
    child.communicate(timeout=20)
    said = [line.split() for line in lines]
    last = {kind: max((int(v) for k, v in said if k == kind), default=0) for kind in ("issued", "committed", "receipt")}
    ledger = Ledger.open("run", directory=tmp_path)
    # the one entry that was under way may or may not be there
    assert ledger.highest - last["issued"] in (0, 1)
    assert (ledger.committed or 0) - last["committed"] in (0, 1)
    assert [r["version"] for r in ledger.receipts()][: last["receipt"]] == list(range(1, last["receipt"] + 1))
    assert ledger.issue() == ledger.highest
    ledger.close()


def test_a_forked_child_owns_nothing_and_leaves_the_journal_whole(tmp_path: Path) -> None:
    code = (
        "from bridge.errors import Closed\n" + OPEN + "ledger.record('committed', version=ledger.issue(5))\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    for call in (ledger.issue, ledger.receipts, lambda: ledger.record('committed', version=5)):\n"
        "        try:\n            call()\n"
        "        except Closed as error:\n            assert 'forked child' in str(error)\n"
        "        else:\n            os._exit(3)\n"
        "    ledger.close()\n    ledger.close()\n"
        "    sys.exit(0)\n"  # the interpreter ends as usual and collects its copy of the connection
        "assert os.waitpid(child, 0)[1] == 0\n"
        "ledger.record('committed', version=ledger.issue(6))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = python(code, tmp_path)
    child.communicate(timeout=30)
    assert child.returncode == -signal.SIGKILL
    ledger = Ledger.open("run", directory=tmp_path)
    assert facts(ledger) == (6, 6, [])
    ledger.close()


def test_a_child_that_was_forked_inside_an_entry_does_not_wait_for_its_lock(ledger: Ledger) -> None:
    child = os.fork()
    if child == 0:
        try:
            ledger._lock = threading.Lock()  # type: ignore[assignment]
            ledger._lock.acquire()  # by a thread of the parent, as the child sees it
            ledger.close()
            ledger.issue()
        except Closed:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ledger.issue() == 1


# ---- full disk, damage -----------------------------------------------------------------------------------------------


def test_a_full_disk_changes_nothing_and_is_survived(tmp_path: Path) -> None:
    """The full disk is injected as RLIMIT_FSIZE: the kernel refuses to make any file longer."""
    code = (
        "import resource\nfrom bridge.errors import TransportError\n" + OPEN + "ledger.issue(5)\n"
        "nbytes = max(path.stat().st_size for path in Path(sys.argv[1]).iterdir())\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes + 5000, hard))\n"
        "refused = 0\n"
        "for _ in range(3):\n"
        "    try:\n        ledger.record('receipt', version=5, receipt={'text': 'x' * 100_000})\n"
        "    except TransportError as error:\n        assert 'make room' in error.remedy; refused += 1\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "ledger.record('committed', version=5)\n"
        "print(refused, ledger.highest, ledger.committed, len(ledger.receipts()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = python(code, tmp_path)
    assert child.communicate(timeout=30)[0] == "3 5 5 0\n"
    ledger = Ledger.open("run", directory=tmp_path)
    assert facts(ledger) == (5, 5, [])
    ledger.close()


def _written(folder: Path) -> tuple[Path, tuple[int, int | None, list[dict[str, object]]]]:
    """A closed journal with a little of everything, and what it says."""
    ledger = Ledger.open("run", directory=folder)
    for _ in range(3):
        version = ledger.issue()
        ledger.record("sealed", version=version, root="00" * 16)
        ledger.record("committed", version=version)
        ledger.record("receipt", version=version, receipt={"version": version, "text": "x" * 300})
    found = facts(ledger)
    ledger.close()
    return ledger.path, found


def test_a_bit_that_flipped_anywhere_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    path, expected = _written(tmp_path)
    data = path.read_bytes()
    refused = 0
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            ledger = Ledger.open("run", directory=tmp_path)
        except (ProtocolError, TransportError) as error:
            refused += error.remedy is not None
        else:
            assert facts(ledger) == expected, at
            ledger.close()
        for beside in tmp_path.glob(f"{JOURNAL}-*"):
            beside.unlink()
    used = len(data) - data.count(0)
    assert refused > used / 7 / 2, "most of what is used is checked"


@pytest.mark.parametrize("nbytes", [0, 1, 100, 4095, 4096, 8000])
def test_a_journal_that_was_cut_short_is_refused_and_the_remedy_ends_right(tmp_path: Path, nbytes: int) -> None:
    path, _ = _written(tmp_path)
    os.truncate(path, nbytes)
    with pytest.raises(ProtocolError) as caught:
        Ledger.open("run", directory=tmp_path)
    assert caught.value.remedy
    assert "move" in caught.value.remedy
    tmp_path.rename(moved := tmp_path.with_name(f"{tmp_path.name}-moved"))
    ledger = Ledger.open("run", directory=tmp_path)
    assert facts(ledger) == (0, None, [])
    assert ledger.issue(4) == 4, "above the last version of the old history"
    ledger.close()
    assert (moved / JOURNAL).exists()


def test_damage_that_comes_later_is_an_error_of_ours(ledger: Ledger) -> None:
    ledger.record("receipt", version=ledger.issue(), receipt={"version": 1})
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("UPDATE entries SET body = CAST(replace(body, '1', '2') AS BLOB) WHERE kind = 'receipt'")
    other.close()
    with pytest.raises(ProtocolError, match="damaged"):
        ledger.receipts()
    with pytest.raises(ProtocolError, match="damaged"):
        reopened(ledger)


def test_a_file_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    for content in (b'{"sum":"0","entry":{"kind":"issued","version":7}}\n', b"SQLite format 3\0" + bytes(5000)):
        path.write_bytes(content)
        with pytest.raises(ProtocolError, match=r"not a journal|damaged"):
            Ledger.open("run", directory=tmp_path)
        assert path.read_bytes() == content
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE entries (id INTEGER PRIMARY KEY, body TEXT)")
    database.close()
    content = path.read_bytes()
    with pytest.raises(ProtocolError, match="not a journal of this release"):
        Ledger.open("run", directory=tmp_path)
    assert path.read_bytes() == content


def test_a_journal_of_another_format_is_refused(tmp_path: Path) -> None:
    path, _ = _written(tmp_path)
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA application_id = 1")
    database.close()
    with pytest.raises(ProtocolError, match="the release that wrote it"):
        Ledger.open("run", directory=tmp_path)


def test_a_journal_that_is_a_link_or_a_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ProtocolError, match="not a plain file"):
        Ledger.open("run", directory=tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ProtocolError, match="not a plain file"):
        Ledger.open("run", directory=tmp_path)


def test_a_kill_while_the_journal_is_made_leaves_none(tmp_path: Path) -> None:
    """The kill is injected before the new file gets its name."""
    code = "import os, pathlib\npathlib.Path.rename = lambda *names: os.kill(os.getpid(), 9)\n" + OPEN
    child = python(code, tmp_path)
    child.communicate(timeout=30)
    assert child.returncode == -signal.SIGKILL
    assert JOURNAL not in os.listdir(tmp_path)
    ledger = Ledger.open("run", directory=tmp_path)
    assert ledger.issue() == 1
    ledger.close()
    assert sorted(os.listdir(tmp_path)) == [JOURNAL, f"{JOURNAL}.lock"]


def test_a_failed_open_leaves_the_journal_free(tmp_path: Path) -> None:
    path, expected = _written(tmp_path)
    data = path.read_bytes()
    os.truncate(path, 4096)
    with pytest.raises(ProtocolError):
        Ledger.open("run", directory=tmp_path)
    path.write_bytes(data)
    ledger = Ledger.open("run", directory=tmp_path)
    assert facts(ledger) == expected
    ledger.close()
