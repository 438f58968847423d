"""Push settings: what `Bridge.push` was asked for, checked once, carried as one value from the client to every rank."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict, get_args

import msgspec

from bridge.errors import ConfigError
from bridge.model.levels import LEVELS, LEVELS_OF

MAX_VERSION = 1 << 53
MODES = ("auto", "full", "merged", "base", "adapter")
Inflight = Literal["drain", "abort", "keep"]
Kv = Literal["reset", "keep"]


class PushArguments(TypedDict, total=False):
    """The keyword arguments of `Bridge.push` besides `wait`, for type checkers."""

    version: int | None
    mode: str
    verify: str | Iterable[str] | None
    partial: bool
    inflight: str
    kv: str
    allow_nonfinite: bool
    timeout_s: float | None
    canary_limit: float | Literal["auto"]


class PushSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one push, as `Bridge.push` documents them.

    Attributes:
        verify: the name that receipts show for what is verified ("weights", or level names joined by "+").
        levels: the levels to run, of `bridge.model.levels.LEVELS`.
        mode, reason: how the tensors travel, and why that mode was chosen.
        timeout_s: bounds the snapshot with the canary's reference, and again everything after them.
        version: the version number that was asked for; None takes the next one.
        canary: whether the trainer computes a canary reference; None: only if the bound model can give one.
        canary_limit: the user's limit of the canary's mean |difference|, in nats; None: the engine's own.
    """

    verify: str = "weights"
    levels: tuple[str, ...] = ()
    inflight: Inflight = "abort"
    kv: Kv = "reset"
    partial: bool = False
    mode: str = "full"
    reason: str = ""
    timeout_s: float = 300.0
    version: int | None = None
    allow_nonfinite: bool = False
    canary: bool | None = False
    canary_limit: float | None = None


def check_settings(given: PushArguments, *, bound: bool, timeout_s: float) -> PushSettings:
    """Check the arguments of one push and fill in the defaults.

    Args:
        bound: a model is bound, so names and a canary reference can come from it.
        timeout_s: the deadline when none was given, in seconds.

    Raises ConfigError, naming the argument, what it may be and what came.
    """
    partial = given.get("partial", False)
    verify, levels, canary = _levels(given.get("verify"), bound and not partial)
    if canary and not bound:
        raise ConfigError(
            "the canary needs the live model",
            where="verify",
            expected="a bound model",
            got=verify,
            remedy="b.bind(model), or verify='weights'",
        )
    wanted = given.get("timeout_s")
    seconds = timeout_s if wanted is None else wanted
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ConfigError(
            "a deadline must be positive", where="timeout_s", expected="seconds above 0", got=repr(wanted),
            remedy=f"leave it out for {timeout_s:g} seconds",
        )  # fmt: skip
    version = given.get("version")
    limit = _canary_limit(given.get("canary_limit", "auto"))
    if limit is not None and canary is False:
        raise ConfigError(
            "a limit for a canary that does not run", where="canary_limit", expected="a push with a canary",
            got=f"verify={verify!r}" + ("" if bound else ", no bound model") + (", partial=True" if partial else ""),
            remedy="bind the model and pass verify='outputs', or leave canary_limit out",
        )  # fmt: skip
    return PushSettings(
        verify=verify,
        levels=levels,
        inflight=_one_of("inflight", given.get("inflight", "abort"), get_args(Inflight)),
        kv=_one_of("kv", given.get("kv", "reset"), get_args(Kv)),
        partial=partial,
        mode=_one_of("mode", given.get("mode", "auto"), MODES),
        reason="asked for",
        timeout_s=seconds,
        version=None if version is None else _version(version),
        allow_nonfinite=given.get("allow_nonfinite", False),
        canary=canary,
        canary_limit=limit,
    )


def _canary_limit(value: Any) -> float | None:
    if isinstance(value, str) and value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(
            "not a limit for the canary", where="canary_limit", expected="'auto', or nats above 0", got=repr(value),
            remedy="leave it out for 'auto', the limit of the engine's dtypes and measured noise",
        )  # fmt: skip
    return float(value)


def _levels(verify: str | Iterable[str] | None, whole: bool) -> tuple[str, tuple[str, ...], bool | None]:
    """Resolve `verify=` into its name, its levels, and whether a canary reference is wanted.

    Args:
        whole: a model is bound and all of it is sent. What is left out may have moved on in the trainer: then the two
            models differ, and rightly so.
    """
    if verify is None:
        name = "outputs" if whole else "weights"
        return name, LEVELS_OF[name], None if whole else False
    if isinstance(verify, str):
        name = _one_of("verify", verify, tuple(LEVELS_OF))
        return name, LEVELS_OF[name], "canary" in LEVELS_OF[name]
    if not isinstance(verify, Iterable):
        raise _no_choice("verify", (*LEVELS_OF, "an iterable of level names"), verify)
    levels = tuple(_one_of("verify", level, LEVELS) for level in verify)
    return "+".join(levels) or "off", levels, bool({"canary", "cache"} & set(levels))


def _version(value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or not 0 <= number <= MAX_VERSION:
        raise ConfigError(
            "not a version", where="version", expected=f"a whole number from 0 to {MAX_VERSION}", got=repr(value),
            remedy="leave it out for the next one",
        )  # fmt: skip
    return number


def _one_of(what: str, value: Any, allowed: Sequence[str]) -> Any:
    if value not in allowed:
        raise _no_choice(what, allowed, value)
    return value


def _no_choice(what: str, allowed: Sequence[str], value: object) -> ConfigError:
    return ConfigError(
        "no such choice", where=what, expected=" | ".join(allowed), got=repr(value),
        remedy=f"pass {what}={allowed[0]!r} or another of them",
    )  # fmt: skip
