"""What engines that are hosted by us have in common: arguments by name, and nothing left when they end."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bridge.errors import ConfigError

_DTYPES: Mapping[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_SHM = "/dev/shm/"


def check_names(scheme: str, engine: str, arguments: Mapping[str, Any], known: Collection[str], model: str) -> None:
    """Raises ConfigError for an argument that the engine does not have; `model` is the one that the PATH stands for,
    `engine` the class whose arguments they are."""
    for name in arguments:
        if name == model:
            raise ConfigError(f"the model is the PATH of {scheme}:PATH", where=name, got=f"{name}={arguments[name]!r}")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(set(known) - {model}), n=3)
            raise ConfigError(
                "the engine has no such argument",
                where=name,
                expected=f"an argument of {engine}{', such as ' if near else ''}{', '.join(near)}",
                got=f"{name}={arguments[name]!r}",
            )


def with_dtype(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Our words for dtypes, as the command line takes them, in the engines'."""
    dtype = arguments.get("dtype")
    return {**arguments, "dtype": _DTYPES.get(dtype, dtype)} if isinstance(dtype, str) else dict(arguments)


def not_accepted(scheme: str, path: str, arguments: Mapping[str, Any], error: BaseException) -> ConfigError:
    """For an engine that says no to its arguments; those that it names are named."""
    blamed = [name for name in arguments if name in str(error)]
    return ConfigError(
        "the engine does not accept an argument",
        where=", ".join(blamed) or f"{scheme}:{path}",
        got=f"{type(error).__name__}: " + "; ".join(str(error).splitlines())[:2000],
        remedy="see the engine's own arguments, and its log",
    )


class Leavings:
    """What an engine leaves in shared memory when its processes are killed. Made before it starts."""

    def __init__(self) -> None:
        self._before = _in_use()
        self._inodes: set[int] = set()

    def note(self) -> None:
        """While its processes run."""
        self._inodes = _in_use() - self._before

    def remove(self) -> None:
        """What is still there after they have ended; arenas are their bridge's."""
        for path in Path(_SHM).iterdir():
            with suppress(FileNotFoundError):
                ours = path.lstat().st_ino in self._inodes and not path.name.startswith("weighbridge")
                if ours and path.is_file():
                    path.unlink()


def _in_use() -> set[int]:
    """Inodes in shared memory that this process and its descendants map."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, IndexError, ValueError):
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found: set[int] = set()
    todo = [os.getpid()]
    while todo:
        pid = todo.pop()
        found |= _mapped(pid)
        todo += children.get(pid, ())
    return found


def _mapped(pid: int) -> set[int]:
    """By inode: a semaphore is mapped under a name that it had for a moment only."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {int(line.split(None, 5)[4]) for line in lines if _SHM in line}
