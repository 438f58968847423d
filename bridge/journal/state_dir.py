"""The state folder of a daemon, `$XDG_STATE_HOME/weighbridge/NAME`: it survives the daemon, and only its owner may
read it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bridge.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def checked_name(name: str) -> str:
    """Check a daemon's name, which is also a folder's. Raises ConfigError for any but 1-64 of [A-Za-z0-9_.-]."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "not a name for a bridge",
            where="name",
            expected="1 to 64 letters, digits, '_', '-' or '.', not beginning with '.' or '-'",
            got=repr(name),
            remedy="choose another name",
        )
    return name


def state_dir(name: str, directory: Path | None = None) -> Path:
    """Find the state folder of daemon `name`, made 0700 if need be; absolute.

    Raises ConfigError for a bad name, a folder of another user or one that cannot be made.
    """
    if directory is None:
        root = os.environ.get("XDG_STATE_HOME") or ""
        base = Path(root) if Path(root).is_absolute() else Path.home() / ".local" / "state"
        directory = base / "weighbridge" / checked_name(name)
    folder = Path(os.path.abspath(directory))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.stat()
        if info.st_uid != os.geteuid():
            raise ConfigError(
                "the state folder belongs to another user", where=str(folder), expected=f"uid {os.geteuid()}",
                got=f"uid {info.st_uid}", remedy="set XDG_STATE_HOME to a folder of your own",
            )  # fmt: skip
        folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(
            "the state folder cannot be used",
            where=str(folder),
            expected="a folder that this user may write to",
            got=str(error),
            remedy="set XDG_STATE_HOME to a folder that you may write to",
        ) from error
    return folder
