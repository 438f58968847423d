"""What `Bridge.push` was asked to do, checked: words to `Options`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from bridge.errors import ConfigError
from bridge.model.levels import LEVELS, LEVELS_OF
from bridge.protocol.coordinator_messages import Options

MAX_VERSION = 1 << 53
MODES = ("auto", "full", "merged", "base", "adapter")
INFLIGHT = ("drain", "abort", "keep")
KV = ("reset", "keep")


class PushOptions(TypedDict, total=False):
    """The options of `Bridge.push` besides `wait`, for type checkers."""

    version: int | None
    mode: str
    verify: str | Iterable[str] | None
    partial: bool
    inflight: str
    kv: str
    allow_nonfinite: bool
    timeout_s: float | None


@dataclass(frozen=True)
class Wish:
    """Checked options; `reference` says whether a canary reference is wanted (None: if the model can give one)."""

    options: Options
    reference: bool | None
    version: int | None
    allow_nonfinite: bool


def wish(asked: PushOptions, *, bound: bool, timeout_s: float) -> Wish:
    """Check what `push` was given. Raises ConfigError, naming the option, what it may be and what came."""
    mode = one_of("mode", asked.get("mode", "auto"), MODES)
    inflight = one_of("inflight", asked.get("inflight", "abort"), INFLIGHT)
    kv = one_of("kv", asked.get("kv", "reset"), KV)
    name, levels, reference = _levels(asked.get("verify"), bound)
    if reference and not bound:
        raise ConfigError(
            "the canary needs the live model", where="verify", got=name, remedy="b.bind(model), or verify='weights'"
        )
    given = asked.get("timeout_s")
    timeout = timeout_s if given is None else given
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ConfigError("a deadline must be positive", where="timeout_s", got=repr(given))
    version = asked.get("version")
    return Wish(
        Options(name, levels, inflight, kv, asked.get("partial", False), mode, "asked for", timeout),
        reference,
        None if version is None else _whole("version", version),
        asked.get("allow_nonfinite", False),
    )


def _levels(verify: str | Iterable[str] | None, bound: bool) -> tuple[str, tuple[str, ...], bool | None]:
    """The name of what is verified, its levels, and whether a canary reference is wanted."""
    if verify is None:
        name = "outputs" if bound else "weights"
        return name, LEVELS_OF[name], None if bound else False
    if isinstance(verify, str):
        name = one_of("verify", verify, tuple(LEVELS_OF))
        return name, LEVELS_OF[name], "canary" in LEVELS_OF[name]
    if not isinstance(verify, Iterable):
        raise ConfigError(
            "no such choice", where="verify", expected=" | ".join((*LEVELS_OF, "level names")), got=repr(verify)
        )
    levels = tuple(one_of("verify", level, LEVELS) for level in verify)
    return "+".join(levels) or "off", levels, bool({"canary", "cache"} & set(levels))


def _whole(what: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or not 0 <= number <= MAX_VERSION:
        raise ConfigError(
            "not a version", where=what, expected=f"a whole number from 0 to {MAX_VERSION}", got=repr(value)
        )
    return number


def one_of(what: str, value: str, allowed: Sequence[str]) -> str:
    """The value itself. Raises ConfigError unless it is one of the allowed ones."""
    if value not in allowed:
        raise ConfigError("no such choice", where=what, expected=" | ".join(allowed), got=repr(value))
    return value
