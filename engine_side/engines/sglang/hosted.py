"""Hosting: an Engine of our own, started from arguments, its event loop on a thread of its own, and ended without
leftovers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec

from bridge.errors import BridgeError, ConfigError
from engine_side.engines.common import hosting
from engine_side.engines.sglang import LOADER
from engine_side.engines.sglang.common import Arguments
from engine_side.engines.sglang.driver import SglangEngineDriver
from engine_side.engines.sglang.versions import check_version


class Stop:
    """Ends an engine of ours, and takes away what its processes leave in shared memory. Idempotent."""

    def __init__(self, engine: Any, leavings: hosting.Leavings) -> None:
        self._engine, self._leavings = engine, leavings

    def __call__(self) -> None:
        engine, self._engine = self._engine, None
        if engine is None:
            return
        self._leavings.note()
        try:
            engine.shutdown()
        finally:
            self._leavings.remove()


def host(path: str, arguments: Mapping[str, Any]) -> SglangEngineDriver:
    """Start SGLang on a checkpoint folder; `arguments` are SGLang's own engine arguments. Blocks until it can serve.
    Raises ConfigError, naming the argument, for one that SGLang does not have or does not accept."""
    try:
        import sglang
    except ModuleNotFoundError as error:
        raise ConfigError(
            "SGLang is not installed", where="engine", got=f"no module named {error.name}", remedy="pip install sglang"
        ) from error
    check_version(str(sglang.__version__))
    arguments = hosting.with_dtype(arguments)
    stated = _stated(path, arguments)
    leavings, stop = hosting.Leavings(), None
    try:
        engine = sglang.Engine(server_args=stated)
        stop = Stop(engine, leavings)
        return SglangEngineDriver(engine, on_close=stop)
    except BaseException as error:
        if stop is not None:
            stop()
        if isinstance(error, BridgeError) or not isinstance(error, Exception):
            raise
        raise hosting.not_accepted("sglang", path, arguments, error) from error


def _stated(path: str, arguments: Mapping[str, Any]) -> Any:
    from sglang.srt.server_args import ServerArgs

    fields = {field.name: field.type for field in msgspec.structs.fields(ServerArgs)}
    hosting.check_names("sglang", "sglang.ServerArgs", arguments, fields, "model_path")
    for name, value in arguments.items():
        _check_value(name, value, fields[name])
    given = {"skip_tokenizer_init": True, "log_level": "error", "custom_weight_loader": [LOADER], **arguments}
    given["custom_sigquit_handler"] = leave_alone
    try:
        stated = ServerArgs(model_path=path, **given)
        Arguments.read(partial(getattr, stated), f"sglang:{path}", "leave this argument out: a hosted engine has it")
    except (ValueError, TypeError, AssertionError, NotImplementedError, OSError, msgspec.ValidationError) as error:
        raise hosting.not_accepted("sglang", path, arguments, error) from error
    return stated


def _check_value(name: str, value: object, kind: Any) -> None:
    """SGLang looks at its arguments when it starts, and at some of them only in its schedulers, which then just end."""
    choices = {word for extra in getattr(kind, "__metadata__", ()) for word in getattr(extra, "choices", None) or ()}
    expected = " | ".join(sorted(map(str, choices)))
    given = value if isinstance(value, list | tuple | set) else [value]
    wrong = choices and any(each is not None and each not in choices for each in given)
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        wrong, expected = True, str(error)
    except TypeError:
        pass  # a type that can be checked by nobody but SGLang
    if wrong:
        raise ConfigError(
            "the engine does not accept an argument", where=name, expected=expected, got=f"{name}={value!r}",
            remedy="see SGLang's server arguments",
        )  # fmt: skip


def leave_alone(signum: int, frame: object) -> None:
    """In place of SGLang's own way with a scheduler that does not start: it would end the process that hosts it, which
    has to say why."""
