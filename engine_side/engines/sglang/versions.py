"""Check that SGLang has a version that the driver was tried with."""

from __future__ import annotations

from bridge.errors import ConfigError

OLDEST, FIRST_UNKNOWN = (0, 5, 23), (0, 5, 24)
"""The scheduler's inner calls change from one release to the next; what was not tried is refused."""


def check_version(version: str) -> None:
    """Check SGLang's version before it is started or attached. Raises ConfigError for one outside the range."""
    numbers = []
    for part in version.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        numbers.append(int(digits) if digits else 0)
    if not OLDEST <= tuple(numbers) < FIRST_UNKNOWN:
        raise ConfigError(
            "this version of SGLang has not been tried",
            where="sglang",
            expected=f">={_text(OLDEST)},<{_text(FIRST_UNKNOWN)}",
            got=version,
            remedy="install a version in this range, or a newer weighbridge",
        )


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
