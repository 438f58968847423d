"""Shared files that a crashed daemon left behind, removed by whoever has its journal open now."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from bridge.errors import ProtocolError
from bridge.shm import files

log = logging.getLogger(__name__)


def remove_remains(journal: Path, directory: Path | None = None) -> list[Path]:
    """Unlink the arenas and mailboxes whose header names this journal; returns their paths. Call it with the journal
    open and locked, before making any file: one daemon at a time can have it open, so all of them are from one that has
    ended, however young they are. A trainer that still maps one keeps its mapping. Does not block.

    Args:
        journal: the path as the ledger gives it.
        directory: default WEIGHBRIDGE_SHM_DIR, then /dev/shm.
    """
    folder = files.directory(directory)
    removed: list[Path] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not files.FILE_PATTERN.fullmatch(path.name):
            continue
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue  # somebody else's, or just removed
        try:
            named = files.decode_header(os.pread(fd, files.HEADER_NBYTES, 0), str(path)).journal
        except ProtocolError:
            continue  # of another version, or still being made by somebody else
        finally:
            os.close(fd)
        if named == str(journal):
            path.unlink(missing_ok=True)
            removed.append(path)
    if removed:
        log.warning("removed shared memory of a daemon that crashed: %s", ", ".join(map(str, removed)))
    return removed
