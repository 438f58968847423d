"""Drive a `sglang.Engine` of this process, attached or started here; its schedulers are processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec

from bridge.entry_points import load
from bridge.errors import BridgeError, ConfigError, DeadlineExceeded
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import claim, hosting
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.refusals import require_version
from engine_side.engines.sglang import LOADER
from engine_side.engines.sglang.arguments import require_supported
from engine_side.engines.sglang.in_process_channel import InProcessChannel
from engine_side.engines.sglang.remote import SglangDriver
from engine_side.engines.sglang.scheduler_messages import call_manager, check_weights

START = f'sglang.Engine(..., custom_weight_loader=["{LOADER}"])'


class SglangEngineDriver(SglangDriver):
    """The driver of one Engine object, which stays its owner's unless `on_close` ends it."""

    def __init__(self, engine: Any, *, on_close: Callable[[], None] | None = None) -> None:
        """Open the channel and ask the schedulers for their facts. Blocks. Raises ConfigError for an engine that was
        started without the loader or the plugin, or that cannot be driven."""
        super().__init__(partial(getattr, engine.server_args), "sglang.Engine", START, on_close=on_close)
        self.engine, self._manager = engine, engine.tokenizer_manager
        self._channel = InProcessChannel.open(engine, self)
        self._closed = False
        try:
            self.facts()
        except BaseException:
            self._channel.close(self)
            raise

    def ask_frontend(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        from engine_side.engines.sglang.frontend import SglangFrontend

        async def ask() -> msg.FrontendReply:
            return await SglangFrontend.of(self._manager).handle(request)

        late = not isinstance(request, msg.Refuse)  # a refusal has to take effect, however late
        return self._channel.run(ask(), deadline, type(request).__name__, cancel_late=late)

    def call_engine(self, method: str, deadline: Deadline, **arguments: Any) -> Any:
        return self._channel.run(call_manager(self._manager, method, **arguments), deadline, method)

    def check_weights(self, words: list[str], deadline: Deadline) -> tuple[bool, str]:
        what = f"the request {words[0]!r} to its schedulers"
        return self._channel.run(check_weights(self._manager, words), deadline, what)

    def refuse_caller(self) -> None:
        """Raises ConfigError when this thread runs the engine's event loop. After `close` every thread may call."""
        if not self._closed:
            self._channel.refuse_caller()

    def claim(self, owner: str) -> None:
        """Mark the engine object as driven by this bridge. The mark also knows when a driver was collected unclosed.
        Raises Busy while another bridge drives the engine, ConfigError for one that somebody else has paused."""
        try:
            claim.take(self.engine, self, owner)
            self._require_ready()
        except BaseException:
            self._channel.close(self)
            raise

    def close(self) -> None:
        """Give up the claim and the channel; the engine runs on, or goes on refusing, unless it is ours. Idempotent.
        Raises as `InProcessChannel.close`."""
        self._closed = True
        claim.give_up(self.engine, self)
        try:
            self._channel.close(self)
        finally:
            super().close()


def attach(engine: object) -> SglangEngineDriver | None:
    """Return the driver of a `sglang.Engine` of this process; None for any other object. Does not import SGLang. Blocks
    and raises as `SglangEngineDriver`."""
    module = sys.modules.get("sglang.srt.entrypoints.engine")
    if module is None or not isinstance(engine, module.Engine):
        return None
    require_version("SGLang", str(module.__version__))
    return SglangEngineDriver(engine)


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
                expected="no process left",
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
    require_version("SGLang", load("sglang:__version__"))
    import sglang

    arguments = hosting.with_dtype(arguments)
    leavings, shutdown = hosting.Leavings(), None
    try:
        engine = sglang.Engine(server_args=_server_args(path, arguments))
        shutdown = EngineShutdown(engine, leavings)
        return SglangEngineDriver(engine, on_close=shutdown)
    except BaseException as error:
        if shutdown is not None:
            shutdown()
        if isinstance(error, Exception) and not isinstance(error, BridgeError):
            raise hosting.not_accepted("sglang", path, arguments, error) from error
        raise


def _server_args(path: str, arguments: Mapping[str, Any]) -> Any:
    from sglang.srt.server_args import ServerArgs

    fields = {field.name: field.type for field in msgspec.structs.fields(ServerArgs)}
    hosting.check_names("sglang", "sglang.ServerArgs", arguments, fields, "model_path")
    for name, value in arguments.items():
        _check_value(name, value, fields[name])
    defaults = {"skip_tokenizer_init": True, "log_level": "error", "custom_weight_loader": [LOADER]}
    server_args = ServerArgs(**{**defaults, **arguments, "model_path": path, "custom_sigquit_handler": ignore_sigquit})
    start = "this argument left out: a hosted engine has it"
    require_supported(partial(getattr, server_args), f"sglang:{path}", start)
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
