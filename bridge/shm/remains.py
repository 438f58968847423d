"""Shared files that a crashed daemon left behind, removed by whoever has its journal open now."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from bridge.shm.orphans import journal_of, opened, own_files

log = logging.getLogger(__name__)


def remove_remains(journal: Path, directory: Path | None = None) -> list[Path]:
    """Unlink the arenas and mailboxes whose header names this journal; returns their paths. Call it with the journal
    open and locked, before making any file: one daemon at a time can have it open, so all of them are from one that has
    ended, however young they are. A trainer that still maps one keeps its mapping. Does not block.

    Args:
        journal: the path as the ledger gives it.
        directory: default WEIGHBRIDGE_SHM_DIR, then /dev/shm.
    """
    removed: list[Path] = []
    for path, _ in own_files(directory):
        with contextlib.suppress(OSError), opened(path) as fd:  # just removed
            if journal_of(fd) == str(journal):
                path.unlink(missing_ok=True)
                removed.append(path)
    if removed:
        log.warning("removed shared memory of a daemon that crashed: %s", ", ".join(map(str, removed)))
    return removed
