"""Which vLLM this adapter was written for."""

from __future__ import annotations

from bridge.errors import ConfigError

OLDEST, FIRST_UNKNOWN = (0, 32), (0, 33)
"""Hooks change from one minor version to the next; what was not tried is refused."""


def check_version(version: str) -> None:
    """Raises ConfigError, naming the range, for a vLLM outside of it."""
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        major, minor = 0, 0
    if not OLDEST <= (major, minor) < FIRST_UNKNOWN:
        raise ConfigError(
            "this version of vLLM has not been tried",
            where="vllm",
            expected=f">={_text(OLDEST)},<{_text(FIRST_UNKNOWN)}",
            got=version,
            remedy="install a version in this range, or a newer weighbridge",
        )


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
