"""Start a `sglang.Engine` from arguments, drive it, and end it without leftovers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec

from bridge.errors import BridgeError, ConfigError, DeadlineExceeded
from engine_side.engines.common import hosting
from engine_side.engines.sglang import LOADER
from engine_side.engines.sglang.arguments import SglangArguments
from engine_side.engines.sglang.driver import SglangEngineDriver
from engine_side.engines.sglang.versions import check_version


class EngineShutdown:
    """Ends an engine of ours and removes what its processes leave in shared memory. Idempotent.

    Blocks until SGLang's processes have ended: SGLang kills them and waits for at most 60 s, after which this raises
    DeadlineExceeded.
    """

    def __init__(self, engine: Any, leavings: hosting.Leavings) -> None:
        self._engine, self._leavings = engine, leavings

    def __call__(self) -> None:
        engine, self._engine = self._engine, None
        if engine is None:
            return
        self._leavings.note()
        try:
            engine.shutdown()
        except RuntimeError as error:
            raise DeadlineExceeded(
                "SGLang's processes did not end after SIGKILL",
                where="sglang.Engine.shutdown",
                got=str(error),
                remedy="see with `ps` what state they are in (D: they wait for a device or a file system)",
            ) from error
        finally:
            self._leavings.remove()


def host(path: str, arguments: Mapping[str, Any]) -> SglangEngineDriver:
    """Start SGLang on a checkpoint folder, for `weighbridge up` and `bridge.launch`. Blocks until it can serve.

    Args:
        path: the folder.
        arguments: SGLang's own engine arguments.

    Raises ConfigError, naming the argument, for one that SGLang does not have or does not accept.
    """
    try:
        import sglang
    except ModuleNotFoundError as error:
        raise hosting.not_installed("SGLang", error) from error
    check_version(str(sglang.__version__))
    arguments = hosting.with_dtype(arguments)
    server_args = _server_args(path, arguments)
    leavings, shutdown = hosting.Leavings(), None
    try:
        engine = sglang.Engine(server_args=server_args)
        shutdown = EngineShutdown(engine, leavings)
        return SglangEngineDriver(engine, on_close=shutdown)
    except BaseException as error:
        if shutdown is not None:
            shutdown()
        if isinstance(error, BridgeError) or not isinstance(error, Exception):
            raise
        raise hosting.not_accepted("sglang", path, arguments, error) from error


def _server_args(path: str, arguments: Mapping[str, Any]) -> Any:
    from sglang.srt.server_args import ServerArgs

    fields = {field.name: field.type for field in msgspec.structs.fields(ServerArgs)}
    hosting.check_names("sglang", "sglang.ServerArgs", arguments, fields, "model_path")
    for name, value in arguments.items():
        _check_value(name, value, fields[name])
    defaults = {"skip_tokenizer_init": True, "log_level": "error", "custom_weight_loader": [LOADER]}
    try:
        server_args = ServerArgs(
            **{**defaults, **arguments, "model_path": path, "custom_sigquit_handler": ignore_sigquit}
        )
        start = "this argument left out: a hosted engine has it"
        SglangArguments.read(partial(getattr, server_args), f"sglang:{path}", start)
    except (ValueError, TypeError, AssertionError, NotImplementedError, OSError, msgspec.ValidationError) as error:
        raise hosting.not_accepted("sglang", path, arguments, error) from error
    return server_args


def _check_value(name: str, value: object, kind: Any) -> None:
    """SGLang checks some arguments only in its schedulers, which then end without naming the argument."""
    choices = {word for extra in getattr(kind, "__metadata__", ()) for word in getattr(extra, "choices", None) or ()}
    expected = " | ".join(sorted(map(str, choices)))
    given = value if isinstance(value, list | tuple | set) else [value]
    wrong = choices and any(each is not None and each not in choices for each in given)
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        wrong, expected = True, str(error)
    except TypeError:
        pass  # msgspec does not know this type
    if wrong:
        raise ConfigError(
            "the engine does not accept an argument", where=name, expected=expected, got=f"{name}={value!r}",
            remedy="see SGLang's server arguments",
        )  # fmt: skip


def ignore_sigquit(signum: int, frame: object) -> None:
    """Keep this process alive when a scheduler does not start: SGLang's own handler kills the process that hosts the
    engine, which has to report why."""
