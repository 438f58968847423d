"""Check of the version of an engine's package: a driver takes only versions that it was tried with."""

from __future__ import annotations

import re

from bridge.errors import ConfigError


def require_version(package: str, version: str, oldest: tuple[int, ...], first_unknown: tuple[int, ...]) -> None:
    """Check the version of an engine's package, when a bridge attaches to it or starts it.

    Args:
        oldest: numbers of the oldest version that was tried.
        first_unknown: numbers of the next version, which was not.

    Raises:
        ConfigError: the version is outside this range. Engines change their inner calls from one release to the next.
    """
    found = re.match(r"\d+(?:\.\d+)*", version)
    numbers = tuple(map(int, found.group().split("."))) if found else ()
    if not oldest <= numbers[: len(oldest)] < first_unknown:
        low, high = (".".join(map(str, each)) for each in (oldest, first_unknown))
        raise ConfigError(
            f"this version of {package} has not been tried",
            where=package.lower(),
            expected=f">={low},<{high}",
            got=version,
            remedy="install a version in this range, or a newer weighbridge",
        )
