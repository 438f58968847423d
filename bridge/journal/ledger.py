"""The ledger: versions issued, sealed and committed, and the receipts of pushes, in a journal that survives its daemon.

The journal is one SQLite file. A torn write, a killed process and a full disk are SQLite's to survive; a lock file
beside it keeps a second daemon out.

It is in WAL mode: an entry is then one append to the write-ahead log, synced only where this module says so, and a
power cut costs at most the newest unsynced entries, never the file. A rollback journal would sync three times for
each entry, or, unsynced, could leave a damaged file. Source: https://www.sqlite.org/wal.html
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import xxhash

from bridge.errors import REPORT, BridgeError, Busy, Closed, ConfigError, ProtocolError, StaleVersion, TransportError
from bridge.file_locks import lock_of, take_lock
from bridge.journal.lease import Holder, lease_holder
from bridge.journal.state_dir import state_dir

JOURNAL = "journal.sqlite"
KEPT_ENTRIES = 1000
"""Newest entries of each kind (receipts among them) that the journal keeps. The newest of all issued versions and the
newest commit are thereby never pruned."""

_APPLICATION_ID = 0x57424A31
"""Marks a SQLite file as a journal of this format: "WBJ1"."""
_CHECKPOINT_PAGES = 1000
_LOCK_RETRY_S = 1.0
_SCHEMA = [
    "CREATE TABLE entries (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, body BLOB NOT NULL, sum BLOB NOT NULL)",
    "CREATE INDEX entries_by_kind ON entries (kind)",
]
_PRUNE = (
    "DELETE FROM entries WHERE kind = ?1 AND id <= "
    "(SELECT id FROM entries WHERE kind = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)"
)

Version = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", kw_only=True):
    """Base of the journal's entries; `at` is the wall clock, in seconds."""

    at: float = 0.0


class VersionEntry(Entry, frozen=True):
    """Base of the entries about one version."""

    version: Version


class Issued(VersionEntry, frozen=True, tag="issued"):
    """A version was given to a push."""


class Sealed(VersionEntry, frozen=True, tag="sealed"):
    """The snapshot is complete in the arena; `root` in hex."""

    root: str = ""
    slot: int | None = None
    arena: str | None = None


class Committed(VersionEntry, frozen=True, tag="committed"):
    """The version is served from now on."""

    engines: tuple[str, ...] = ()


class Aborted(VersionEntry, frozen=True, tag="aborted"):
    """The push of this version failed or was dropped."""

    reason: str = ""


class RolledBack(VersionEntry, frozen=True, tag="rolled_back"):
    """`version` is served again."""

    engines: tuple[str, ...] = ()


class Quarantined(Entry, frozen=True, tag="quarantined"):
    """An engine holds unverified weights. For people who read the journal: the engine itself refuses to generate."""

    engine: str
    reason: str = ""
    version: Version | None = None


class ReceiptEntry(VersionEntry, frozen=True, tag="receipt"):
    """The receipt of one push."""

    receipt: dict[str, Any]


AnyEntry = Issued | Sealed | Committed | Aborted | RolledBack | Quarantined | ReceiptEntry
_DURABLE = ("committed", "rolled_back", "quarantined")


class Ledger:
    """The one owner of a daemon's versions and of its journal. Thread safe; `open` makes one.

    It belongs to the process that opened it: in a forked child every call raises Closed, and `close` leaves the journal
    alone (SQLite allows no connection across a fork).
    """

    def __init__(self, path: Path, lock: int) -> None:
        """Use `open`. Takes over `lock`, a descriptor of the locked lock file, unless it raises."""
        self.path = path
        self.name = path.parent.name
        self.highest = 0
        """Highest version ever issued; 0 is the engine's own checkpoint. Never falls, not even by a rollback."""
        self.committed: int | None = None
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._database = _connect(path)
        self._lock_fd: int | None = lock
        try:
            for row in self._rows("SELECT body, sum FROM entries ORDER BY id"):
                self._apply(self._decoded(*row))
        except BaseException:
            self._database.close()
            raise

    @classmethod
    def open(cls, name: str, *, directory: Path | None = None) -> Ledger:
        """Open (or begin) the journal of daemon `name` and keep other daemons out until `close`.

        `directory` replaces `$XDG_STATE_HOME/weighbridge/NAME`. Blocks for up to a second.

        Raises Busy (another daemon has it open), ProtocolError (damaged, or not a journal), ConfigError (a bad name, or
        a folder that cannot be used).
        """
        path = state_dir(name, directory) / JOURNAL
        # A file of its own: closing any descriptor of the journal itself would drop the locks that SQLite has on it.
        try:
            lock = os.open(lock_of(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            where = str(lock_of(path))
            remedy = "set XDG_STATE_HOME"
            raise ConfigError(
                "the journal cannot be locked",
                where=where,
                expected="a lock file that can be opened and locked",
                got=str(error),
                remedy=remedy,
            ) from error
        try:
            # The orphan cleaner takes this lock for a moment to learn whether the journal is open.
            if not take_lock(lock, fcntl.LOCK_EX, _LOCK_RETRY_S):
                remedy = "stop it, or choose another name"
                raise Busy(
                    "another daemon has this journal open",
                    where=str(path),
                    expected="one daemon per name",
                    got="its lock is held",
                    remedy=remedy,
                )
            return cls(path, lock)
        except BaseException:
            os.close(lock)
            raise

    def issue(self, version: int | None = None) -> int:
        """Give out a version for a push: the one asked for, or the highest ever issued + 1.

        Raises StaleVersion for one that is not above every version issued before.
        """
        with self._owned():
            chosen = self.highest + 1 if version is None else version
            if chosen <= self.highest:
                raise StaleVersion(
                    "this version is not newer than what was issued before", where=self.name,
                    expected=f"above {self.highest}", got=str(chosen),
                    remedy="leave version=None to get the next one",
                )  # fmt: skip
            self.record("issued", version=chosen)
            return chosen

    def record(self, kind: str, **fields: Any) -> None:
        """Append one entry: issued, sealed, committed, aborted, rolled_back, quarantined or receipt.

        Commits, rollbacks and quarantines, and all entries before them, are on disk when this returns; other entries
        survive the process, not a power cut. Called by the coordinator, for a commit while the engines are paused.

        Raises ProtocolError for an unknown kind, wrong fields or a version that was never issued; TransportError when
        the journal cannot be written. Then nothing was recorded.
        """
        try:
            entry = msgspec.convert({"at": time.time(), **fields, "kind": kind}, AnyEntry)
        except msgspec.ValidationError as error:
            raise ProtocolError(
                "not an entry of the journal",
                where=kind,
                expected="a record of that kind",
                got=str(error),
                remedy=REPORT,
            ) from error
        with self._owned():
            if isinstance(entry, Committed | RolledBack | Sealed) and entry.version > self.highest:
                raise ProtocolError(
                    "a version that was never issued", where=kind, expected=f"at most {self.highest}",
                    got=str(entry.version), remedy=REPORT
                )  # fmt: skip
            body = msgspec.json.encode(entry)
            durable = kind in _DURABLE
            try:
                # FULL syncs the log at COMMIT, and with it every entry before; NORMAL leaves that to the kernel. A
                # checkpoint syncs twice more: it waits for an entry that is not recorded while engines are paused.
                self._database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._database.execute(f"PRAGMA wal_autocheckpoint = {0 if durable else _CHECKPOINT_PAGES}")
                with self._database:  # COMMIT, or ROLLBACK when anything raises
                    self._database.execute("BEGIN IMMEDIATE")
                    row = (kind, body, xxhash.xxh3_64_digest(body))
                    self._database.execute("INSERT INTO entries (kind, body, sum) VALUES (?, ?, ?)", row)
                    self._database.execute(_PRUNE, (kind, KEPT_ENTRIES))
            except sqlite3.Error as error:
                raise _failure(self.path, error) from error
            self._apply(entry)

    def receipts(self, last: int | None = None) -> list[dict[str, Any]]:
        """The newest receipts, oldest first, as plain data; every kept one without `last`. Raises ProtocolError for a
        journal that was damaged meanwhile."""
        query = "SELECT body, sum FROM entries WHERE kind = 'receipt' ORDER BY id DESC LIMIT ?"
        with self._owned():
            rows = self._rows(query, -1 if last is None else last)
        entries = [self._decoded(*row) for row in reversed(rows)]
        return [entry.receipt for entry in entries if isinstance(entry, ReceiptEntry)]

    @property
    def holder(self) -> Holder | None:
        """The process that holds the trainer's lease now."""
        return lease_holder(self.name, directory=self.path.parent)

    def close(self) -> None:
        """Let go of the journal and of its lock. Idempotent; in a forked child it drops the inherited lock only."""
        lock, self._lock_fd = self._lock_fd, None
        if lock is None:
            return
        if os.getpid() == self._pid:
            with self._lock:
                self._database.close()
        os.close(lock)

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """Hold the lock inside. Raises Closed in a forked child, before the lock: a thread that held it at the fork
        does not exist there."""
        if os.getpid() != self._pid:
            raise Closed(
                "this journal belongs to the process that opened it", where=str(self.path), expected=f"pid {self._pid}",
                got=f"pid {os.getpid()}, a forked child", remedy="push from the parent process",
            )  # fmt: skip
        with self._lock:
            yield

    def _rows(self, query: str, *values: int) -> list[tuple[object, object]]:
        try:
            return self._database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise _failure(self.path, error) from error

    def _apply(self, entry: AnyEntry) -> None:
        if isinstance(entry, Issued):
            self.highest = max(self.highest, entry.version)
        elif isinstance(entry, Committed | RolledBack):
            self.committed = entry.version

    def _decoded(self, body: object, checksum: object) -> AnyEntry:
        # SQLite checks its own structure, not the content of a row.
        if not isinstance(body, bytes) or xxhash.xxh3_64_digest(body) != checksum:
            raise _damaged(self.path, f"an entry does not fit its checksum: {str(body)[:80]}")
        try:
            entry: AnyEntry = msgspec.json.decode(body, type=AnyEntry)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _damaged(self.path, str(error)) from error
        return entry


def _create(path: Path) -> None:
    """Make an empty journal, under another name first: a kill leaves none or a whole one."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)  # SQLite's log gets the same mode
    try:
        os.fchmod(fd, 0o600)
        database = sqlite3.connect(fresh, isolation_level=None)
        try:
            # Where a file system offers no WAL, SQLite stays with a rollback journal: slower, and as safe.
            mark = f"PRAGMA application_id = {_APPLICATION_ID}"
            for statement in ("PRAGMA synchronous = OFF", "PRAGMA journal_mode = WAL", *_SCHEMA, mark):
                database.execute(statement)
        finally:
            database.close()
        os.fsync(fd)
    finally:
        os.close(fd)
    fresh.rename(path)


def _connect(path: Path) -> sqlite3.Connection:
    """Connect to a journal, made if need be, and check it. Blocks for one read of the file."""
    try:
        if not os.path.lexists(path):
            _create(path)
        elif not stat.S_ISREG(path.lstat().st_mode):
            raise _foreign(path, "not a plain file")
        database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_LOCK_RETRY_S)
    except sqlite3.Error as error:
        raise _failure(path, error) from error
    except OSError as error:
        raise ConfigError(
            "the journal cannot be made",
            where=str(path),
            expected="a folder with room that can be written to",
            got=str(error),
            remedy="make room on that disk, or set XDG_STATE_HOME to another",
        ) from error
    try:
        _check(database, path)
    except BaseException as error:
        database.close()
        if isinstance(error, sqlite3.Error):
            raise _failure(path, error) from error
        raise
    return database


def _check(database: sqlite3.Connection, path: Path) -> None:
    application = database.execute("PRAGMA application_id").fetchone()[0]
    if application != _APPLICATION_ID:
        raise _foreign(path, f"a SQLite file of application {application:#x}")
    schema = [row[0] for row in database.execute("SELECT sql FROM sqlite_master ORDER BY rowid")]
    if schema != _SCHEMA:
        raise _damaged(path, f"other tables than a journal's: {schema}")
    found = database.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise _damaged(path, found)


def _failure(path: Path, error: sqlite3.Error) -> BridgeError:
    if isinstance(error, sqlite3.ProgrammingError):
        return Closed(
            "the ledger was closed",
            where=str(path),
            expected="an open ledger",
            got="a closed one",
            remedy="open a Bridge again",
        )
    # Python gives no code to text that is no UTF-8; the bits above the lowest eight say more of the same.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    if code == sqlite3.SQLITE_NOTADB:
        return _foreign(path, str(error))
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR):  # ERROR: its tables are not those of a journal
        return _damaged(path, str(error))
    return TransportError(
        "the journal cannot be read or written",
        where=str(path),
        expected="a file that can be read and written",
        got=str(error),
        remedy="make room on that disk, see that the folder can be written and that no other program has the file open",
    )


def _foreign(path: Path, got: str) -> ProtocolError:
    return ProtocolError(
        "not a journal of this release of weighbridge",
        where=str(path),
        expected=f"a SQLite file of application {_APPLICATION_ID:#x}",
        got=got,
        remedy="move it away, use the release that wrote it, or choose another name",
    )


def _damaged(path: Path, got: str) -> ProtocolError:
    return ProtocolError(
        "the journal is damaged",
        where=str(path),
        expected="a sound SQLite file",
        got=got,
        remedy=f"restore {path.parent}, or move it away to begin a new history: versions then begin at 1 again, so give"
        " the first push a version= above the last one that you know of",
    )
