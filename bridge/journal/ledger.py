"""Versions and engine states: what was issued, sealed, committed; who may generate; and the journal that remembers it.

The journal is one JSON object per line, each with its checksum, only ever appended to. Commits reach the disk before
`record` returns; a torn last line (the machine died while writing it) is dropped when the journal is opened again.
"""

from __future__ import annotations

import enum
import fcntl
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
import xxhash

from bridge.errors import Busy, Closed, NotFound, ProtocolError, StaleVersion, TransportError
from bridge.journal.lease import Holder, Lease, lease_holder
from bridge.journal.state_dir import state_dir

__all__ = ["EngineState", "Holder", "Lease", "Ledger", "Standing", "lease_holder", "transition"]

JOURNAL = "journal.jsonl"
_LOCK_RETRY_S = 1.0


class EngineState(enum.Enum):
    """Where one engine stands. Only SERVING generates."""

    STAGING = "STAGING"
    """Paused; a version is being written into it (or its adapter)."""
    LOADED = "LOADED"
    """Everything is written, nothing was checked yet."""
    VERIFIED = "VERIFIED"
    """All levels asked for have passed; waiting for the others' votes."""
    SERVING = "SERVING"
    """Generates with its serving version."""
    STALE = "STALE"
    """Lost, restarted or late: must take part in a verified sync before it serves."""
    QUARANTINED = "QUARANTINED"
    """Holds weights that nobody verified; refuses to generate until a full version was loaded and verified."""


_LOST = (EngineState.STALE, EngineState.QUARANTINED)
TRANSITIONS: Mapping[EngineState, tuple[EngineState, ...]] = MappingProxyType(
    {
        # Back to SERVING: nothing had been written yet.
        EngineState.STAGING: (EngineState.LOADED, EngineState.SERVING, *_LOST),
        # Back to STAGING: the previous version is being put back.
        EngineState.LOADED: (EngineState.VERIFIED, EngineState.STAGING, *_LOST),
        EngineState.VERIFIED: (EngineState.SERVING, EngineState.STAGING, *_LOST),
        EngineState.SERVING: (EngineState.STAGING, *_LOST),
        EngineState.STALE: (EngineState.STAGING, *_LOST),
        EngineState.QUARANTINED: (EngineState.STAGING, *_LOST),
    }
)


def transition(engine: str, now: EngineState, to: EngineState) -> EngineState:
    """The new state. Raises ProtocolError for a step that is not in the table."""
    if to not in TRANSITIONS[now]:
        raise ProtocolError(
            "an engine cannot go from this state to that one", where=engine,
            expected=f"{now.name} -> {', '.join(state.name for state in TRANSITIONS[now])}", got=to.name,
        )  # fmt: skip
    return to


class Standing:
    """Where one engine stands and what it serves; moves only along TRANSITIONS. Kept by its engine service."""

    def __init__(self, engine: str, state: EngineState = EngineState.STALE, serving: int | None = None) -> None:
        self.engine = engine
        self.state = state
        self.serving = serving
        """The version it serves; None: nothing that was verified."""

    @property
    def may_generate(self) -> bool:
        return self.state is EngineState.SERVING

    def move(self, to: EngineState, serving: int | None = None) -> None:
        """Take a step; `serving` is the version it serves from now on (kept when None). A quarantine serves nothing.

        Raises ProtocolError for an illegal step or a SERVING without a version; then nothing has changed.
        """
        transition(self.engine, self.state, to)
        version = self.serving if serving is None else serving
        if to is EngineState.SERVING and version is None:
            raise ProtocolError("an engine cannot serve without a version", where=self.engine)
        self.state = to
        self.serving = None if to is EngineState.QUARANTINED else version


Version = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", kw_only=True):
    """One line of the journal; `at` is the wall clock, in seconds."""

    at: float = 0.0


class Issued(Entry, frozen=True, tag="issued"):
    version: Version


class Sealed(Entry, frozen=True, tag="sealed"):
    """The snapshot is complete in the arena; `root` in hex."""

    version: Version
    root: str = ""
    slot: int | None = None
    arena: str | None = None


class Committed(Entry, frozen=True, tag="committed"):
    version: Version
    engines: tuple[str, ...] = ()


class Aborted(Entry, frozen=True, tag="aborted"):
    version: Version
    reason: str = ""


class RolledBack(Entry, frozen=True, tag="rolled_back"):
    """`version` is the one returned to."""

    version: Version
    engines: tuple[str, ...] = ()


class Quarantined(Entry, frozen=True, tag="quarantined"):
    engine: str
    reason: str = ""
    version: Version | None = None


class ReceiptEntry(Entry, frozen=True, tag="receipt"):
    version: Version
    receipt: dict[str, Any]


AnyEntry = Issued | Sealed | Committed | Aborted | RolledBack | Quarantined | ReceiptEntry
_DURABLE = (Committed, RolledBack, Quarantined)


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sum: str
    entry: msgspec.Raw


class Ledger:
    """The one owner of a daemon's versions and of its journal. Thread safe; `open` makes one."""

    def __init__(self, path: Path, fd: int, *, readonly: bool) -> None:
        """Use `open`. Takes over `fd` of the journal and replays it."""
        self.path = path
        self.name = path.parent.name
        self.highest = 0
        """Highest version ever issued; 0 is the engine's own checkpoint. Never falls, not even by a rollback."""
        self.committed: int | None = None
        self.previous: int | None = None
        """The version before the committed one, while it can be returned to."""
        self._fd: int | None = fd
        self._readonly = readonly
        self._lock = threading.RLock()
        self._slots: dict[int, int] = {}
        self._receipts: list[tuple[int, int]] = []
        self._end = 0
        self._replay()

    @classmethod
    def open(cls, name: str, *, directory: Path | None = None, readonly: bool = False) -> Ledger:
        """Open (or begin) the journal of daemon `name` and replay it.

        `directory` replaces `$XDG_STATE_HOME/weighbridge/NAME`. The journal is locked until `close`, unless `readonly`,
        which changes nothing on disk. Raises Busy (another daemon has it open), NotFound (readonly, no journal),
        ProtocolError (damaged before its last line), ConfigError (bad name or folder).
        """
        path = state_dir(name, directory) / JOURNAL
        flags = os.O_RDONLY if readonly else os.O_RDWR | os.O_APPEND | os.O_CREAT
        try:
            fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            raise NotFound("no journal of that name", where=str(path)) from None
        try:
            if not readonly:
                _lock_journal(fd, path)
                os.fchmod(fd, 0o600)
            return cls(path, fd, readonly=readonly)
        except BaseException:
            os.close(fd)
            raise

    # ---- versions ---------------------------------------------------------------------------------------------------

    def issue(self, version: int | None = None) -> int:
        """Give out a version: the one asked for, or the highest ever issued + 1.

        Raises StaleVersion for one that is not above every version issued before.
        """
        with self._lock:
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
        """Append one entry and take it over: issued, sealed, committed, aborted, rolled_back, quarantined, receipt.

        Commits, rollbacks and quarantines are on disk when this returns. Raises ProtocolError for an unknown kind,
        wrong fields or a commit of a version that was never issued; TransportError when the journal cannot be written
        (then nothing was taken over).
        """
        try:
            entry = msgspec.convert({"at": time.time(), **fields, "kind": kind}, AnyEntry)
        except msgspec.ValidationError as error:
            raise ProtocolError("not an entry of the journal", where=kind, got=str(error)) from error
        with self._lock:
            if isinstance(entry, Committed | RolledBack | Sealed) and entry.version > self.highest:
                raise ProtocolError(
                    "a version that was never issued", where=kind, expected=f"at most {self.highest}",
                    got=str(entry.version),
                )  # fmt: skip
            start, length = self._append(entry)
            self._take(entry, start, length)

    def receipts(self, last: int | None = None) -> list[dict[str, Any]]:
        """The last receipts, oldest first, as plain data; all of them without `last`."""
        with self._lock:
            wanted = self._receipts if last is None else self._receipts[max(0, len(self._receipts) - last) :]
            fd = self._descriptor()
            entries = [_decode_line(os.pread(fd, length, start)) for start, length in wanted]
        return [entry.receipt for entry in entries if isinstance(entry, ReceiptEntry)]

    # ---- slots, lease ---------------------------------------------------------------------------------------------

    @property
    def slots(self) -> Mapping[int, int]:
        """Arena slot -> version that was last sealed there, as far as the journal names slots; a copy."""
        with self._lock:
            return dict(self._slots)

    @property
    def holder(self) -> Holder | None:
        """Who holds the lease now."""
        return lease_holder(self.name, directory=self.path.parent)

    def close(self) -> None:
        """Let go of the journal. Idempotent."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    # ---- the journal ------------------------------------------------------------------------------------------------

    def _descriptor(self) -> int:
        if self._fd is None:
            raise Closed("the ledger was closed", where=str(self.path))
        return self._fd

    def _append(self, entry: AnyEntry) -> tuple[int, int]:
        fd, start = self._descriptor(), self._end
        if self._readonly:
            raise ProtocolError("this ledger is open read-only", where=str(self.path))
        line = _encode_line(entry)
        try:
            if os.write(fd, line) != len(line):
                raise OSError("the disk is full")
            if isinstance(entry, _DURABLE):
                os.fsync(fd)
        except OSError as error:
            # Half a line in the middle would make the whole journal unreadable.
            os.ftruncate(fd, start)
            raise TransportError("the journal cannot be written", where=str(self.path), got=str(error)) from error
        self._end = start + len(line)
        return start, len(line)

    def _take(self, entry: AnyEntry, start: int, length: int) -> None:
        match entry:
            case Issued():
                self.highest = max(self.highest, entry.version)
            case Sealed():
                if entry.slot is not None:
                    self._slots[entry.slot] = entry.version
            case Committed():
                self.previous, self.committed = self.committed, entry.version
            case RolledBack():
                self.previous, self.committed = None, entry.version
            case Quarantined():
                pass  # for people who read the journal: the engine itself refuses, and a new one begins STALE
            case ReceiptEntry():
                self._receipts.append((start, length))
            case Aborted():
                self._slots = {slot: held for slot, held in self._slots.items() if held != entry.version}

    def _replay(self) -> None:
        start = 0
        for line, last in _lines(self._descriptor()):
            try:
                entry = _decode_line(line)
            except ProtocolError as error:
                if not last:
                    raise ProtocolError(
                        "the journal is damaged", where=f"{self.path}, byte {start}", got=error.got,
                        remedy="move it away to begin a new history, or restore it",
                    ) from error  # fmt: skip
                if not self._readonly:
                    os.ftruncate(self._descriptor(), start)
                break
            self._take(entry, start, len(line))
            start += len(line)
        self._end = start


def _encode_line(entry: AnyEntry) -> bytes:
    body = msgspec.json.encode(entry)
    return msgspec.json.encode(_Line(xxhash.xxh3_64_hexdigest(body), msgspec.Raw(body))) + b"\n"


def _decode_line(line: bytes) -> AnyEntry:
    try:
        if not line.endswith(b"\n"):
            raise ProtocolError("a journal line is cut short", got=repr(line[-40:]))
        wrapped = msgspec.json.decode(line, type=_Line)
        if xxhash.xxh3_64_hexdigest(bytes(wrapped.entry)) != wrapped.sum:
            raise ProtocolError("a journal line does not fit its checksum", got=repr(line[:80]))
        entry: AnyEntry = msgspec.json.decode(wrapped.entry, type=AnyEntry)
        return entry
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError("not a line of the journal", got=str(error)) from error


def _lines(fd: int) -> Iterator[tuple[bytes, bool]]:
    """Every line with its newline, and whether it is the last one."""
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        line = file.readline()
        while line:
            following = file.readline()
            yield line, not following
            line = following


def _lock_journal(fd: int, path: Path) -> None:
    # The orphan cleaner asks for this lock for a moment to learn whether somebody has the journal open.
    end = time.monotonic() + _LOCK_RETRY_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise Busy(
                    "another daemon has this journal open", where=str(path), remedy="stop it, or choose another name"
                ) from None
            time.sleep(0.02)
