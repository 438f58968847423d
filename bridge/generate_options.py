"""Check the options of `EngineHandle.generate` before a request is sent: bad input could crash an engine."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Set
from numbers import Real
from typing import Any

import msgspec

from bridge.errors import ConfigError
from bridge.protocol.codec import Sampling
from bridge.protocol.engine_messages import EngineGenerate

MAX_TOKEN = 2**31 - 1
"""Largest token id of any vocabulary; an engine checks against its own."""
_LONGEST_S = 20 * 24 * 3600.0
"""Sockets take a little longer waits, and no more."""
_FORM = "[[1, 2, 3], [4, 5]]: per prompt a sequence of token ids"
_SAMPLING = "bridge.Sampling(max_tokens=16, temperature=1.0, top_p=1.0)"


def check_generate_options(prompts: object, sampling: object, adapter: object, timeout_s: object) -> EngineGenerate:
    """Check the options of one `generate` call and return its request.

    Raises ConfigError, naming the prompt or the option, for anything of another type or range.
    """
    if not isinstance(adapter, str):
        raise ConfigError(
            "an adapter is chosen by name", where="adapter", expected="'current', 'base' or its name",
            got=repr(adapter), remedy="leave it out for the one that was pushed last",
        )  # fmt: skip
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, Real) or not float(timeout_s) > 0:
        raise ConfigError(
            "a deadline must be positive", where="timeout_s", expected="seconds", got=repr(timeout_s),
            remedy="leave it out for 600 seconds",
        )  # fmt: skip
    rows = enumerate(_iterate(prompts, "prompts"))
    ids = tuple(_token_ids(prompt, f"prompt {index}") for index, prompt in rows)
    return EngineGenerate(ids, _checked_sampling(sampling), adapter, min(float(timeout_s), _LONGEST_S))


def _token_ids(prompt: object, where: str) -> tuple[int, ...]:
    ids: list[int] = []
    for token in _iterate(prompt, where):
        try:
            ids.append(operator.index(token))
        except TypeError as error:
            raise _not_a_prompt(where, repr(token)) from error
    if not ids:
        raise ConfigError(
            "an empty prompt", where=where, expected="at least 1 token", got="0",
            remedy="leave it out, or begin it with the model's first token",
        )  # fmt: skip
    for token in (min(ids), max(ids)):
        if not 0 <= token <= MAX_TOKEN:
            raise ConfigError(
                "not a token id", where=where, expected=f"0 to {MAX_TOKEN}", got=str(token),
                remedy="tokenise with the tokenizer of the served model",
            )  # fmt: skip
    return tuple(ids)


def _iterate(value: object, where: str) -> Iterable[Any]:
    # Text, mappings and sets can be iterated as well, but are no prompts.
    if isinstance(value, str | bytes | Mapping | Set):
        raise _not_a_prompt(where, repr(value)[:80])
    try:
        return iter(value)  # type: ignore[call-overload, no-any-return]
    except TypeError as error:
        raise _not_a_prompt(where, repr(value)[:80]) from error


def _not_a_prompt(where: str, got: str) -> ConfigError:
    remedy = "tokenise text first, and put a single prompt into a list of its own"
    return ConfigError("not a prompt of token ids", where=where, expected=_FORM, got=got, remedy=remedy)


def _checked_sampling(sampling: object) -> Sampling:
    """Check a sampling against the constraints of its fields, which otherwise only decoding checks."""
    if sampling is None:
        return Sampling()
    if not isinstance(sampling, Sampling):
        raise ConfigError(
            "not a sampling", where="sampling", expected="a bridge.Sampling", got=repr(sampling)[:200], remedy=_SAMPLING
        )
    try:
        checked = msgspec.convert(msgspec.to_builtins(sampling, enc_hook=_plain_number), Sampling)
    except (msgspec.ValidationError, TypeError, ValueError, OverflowError) as error:
        expected, _, path = str(error).partition(" - at `$")
        raise ConfigError(
            "a sampling that no engine can take", where=f"sampling{path.rstrip('`')}",
            expected=expected.removeprefix("Expected "), got=repr(sampling), remedy=_SAMPLING,
        ) from error  # fmt: skip
    if not math.isfinite(checked.temperature):
        raise ConfigError(
            "a sampling that no engine can take", where="sampling.temperature", expected="a finite number",
            got=str(checked.temperature), remedy="0 is greedy",
        )  # fmt: skip
    return checked


def _plain_number(value: Any) -> int | float:
    """Convert a number of another library, such as numpy's."""
    try:
        return operator.index(value)
    except TypeError:
        return float(value)
