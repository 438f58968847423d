"""Starting engines of our own: their arguments by name, and no shared memory left behind when they end."""

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
    """Check the names of engine arguments before an engine is started.

    Args:
        engine: the class whose arguments they are.
        known: the names that it has.
        model: the one that the PATH of an engine spec stands for.

    Raises:
        ConfigError: the engine has no such argument, or it is `model`.
    """
    for name in arguments:
        got = f"{name}={arguments[name]!r}"
        if name == model:
            raise ConfigError(
                f"the model is the PATH of {scheme}:PATH",
                where=name,
                expected="the model in the PATH alone",
                got=got,
                remedy="leave this argument out",
            )
        if name not in known:
            near = difflib.get_close_matches(name, sorted(set(known) - {model}), n=3)
            raise ConfigError(
                "the engine has no such argument",
                where=name,
                expected=f"an argument of {engine}{', such as ' if near else ''}{', '.join(near)}",
                got=got,
                remedy="correct its name, or leave it out",
            )


def with_dtype(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the short dtype names of our command line (bf16, fp16, fp32) in the engines' words."""
    dtype = arguments.get("dtype")
    return {**arguments, "dtype": _DTYPES.get(dtype, dtype)} if isinstance(dtype, str) else dict(arguments)


def not_accepted(scheme: str, path: str, arguments: Mapping[str, Any], error: BaseException) -> ConfigError:
    """The error for an engine that rejects its arguments or does not start with them; those that its own message names
    stand in `where`."""
    blamed = [name for name in arguments if name in str(error)]
    return ConfigError(
        "the engine does not start with these arguments",
        where=", ".join(blamed) or f"{scheme}:{path}",
        expected="arguments that the engine takes",
        got=f"{type(error).__name__}: " + "; ".join(str(error).splitlines())[:2000],
        remedy="see the engine's own arguments, and its log",
    )


class Leavings:
    """Files that an engine's processes leave in shared memory when they are killed. Made before the engine starts."""

    def __init__(self) -> None:
        self._before = _mapped_inodes()
        self._inodes: set[int] = set()

    def note(self) -> None:
        """Note the engine's files, while its processes run."""
        self._inodes = _mapped_inodes() - self._before

    def remove(self) -> None:
        """Delete the noted files, after the processes have ended. Arenas belong to their bridge and stay."""
        for path in Path(_SHM).iterdir():
            with suppress(FileNotFoundError):
                ours = path.lstat().st_ino in self._inodes and not path.name.startswith("weighbridge")
                if ours and path.is_file():
                    path.unlink()


def _mapped_inodes() -> set[int]:
    """Inodes in shared memory that this process and its descendants map.

    By inode and not by path: a semaphore is mapped under a name that it had for a moment only.
    """
    import psutil  # vLLM and SGLang both bring it

    found: set[int] = set()
    for pid in (os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))):
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found |= {int(line.split(None, 5)[4]) for line in lines if _SHM in line}
    return found
