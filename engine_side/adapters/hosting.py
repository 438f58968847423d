"""What engines that are hosted by us have in common: arguments by name, and nothing left when they end."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bridge.errors import ConfigError

DTYPES: Mapping[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Our words for dtypes, as the command line takes them, in the engines'."""
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


def not_accepted(scheme: str, path: str, arguments: Mapping[str, Any], error: BaseException) -> ConfigError:
    """For an engine that says no to its arguments; those that it names are named."""
    blamed = [name for name in arguments if name in str(error)]
    return ConfigError(
        "the engine does not accept an argument",
        where=", ".join(blamed) or f"{scheme}:{path}",
        got=f"{type(error).__name__}: " + "; ".join(str(error).splitlines())[:2000],
        remedy="see the engine's own arguments, and its log",
    )


def shm_of_children() -> set[str]:
    """Files in shared memory that our descendants map and we do not: an engine's own."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, IndexError, ValueError):
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found: set[str] = set()
    todo = [os.getpid()]
    while todo:
        for child in children.get(todo.pop(), ()):
            todo.append(child)
            found |= shm_of(child)
    return found - shm_of(os.getpid())


def shm_of(pid: int) -> set[str]:
    """Files in shared memory that a process maps."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line[line.index(_SHM) :] for line in lines if _SHM in line and not line.endswith("(deleted)")}


def remove(files: set[str]) -> None:
    """What is still there although the processes that mapped it have ended; arenas are their bridge's."""
    for name in files:
        if not Path(name).name.startswith("weighbridge") and Path(name).parent == Path(_SHM):
            Path(name).unlink(missing_ok=True)
