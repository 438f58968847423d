"""Finding the driver for an engine server at an address. Entries are strings, imported on use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from bridge.coordinator.health import Check
from bridge.entry_points import load
from bridge.errors import BridgeError, ConfigError, DeadlineExceeded, PeerLost
from bridge.protocol.deadline import Deadline
from engine_side.engines.common.http import HttpClient, HttpStatus
from engine_side.protocol import EngineDriver


class ServerDriver(EngineDriver, Protocol):
    """A driver over a server, which can also look at it."""

    def examine(self, deadline: Deadline) -> Iterable[Check]:
        """Check the server without claiming it. Writes nothing."""
        ...


SERVERS: tuple[str, ...] = (
    "engine_side.engines.vllm.server:recognise",
    "engine_side.engines.sglang.server:recognise",
)
"""Tried in order: each takes an HttpClient and a Deadline and returns a driver, or None for a server of another kind.
Raises ConfigError for a server of its kind that cannot be driven."""

ANSWER_S = 60.0
KNOWN = (
    'vllm serve PATH --weight-transfer-config \'{"backend":"bridge"}\', or '
    "python -m sglang.launch_server --model-path PATH --custom-weight-loader engine_side.engines.sglang.load"
)


def is_url(engine: object) -> bool:
    """True for an `http://` or `https://` address in place of an engine object."""
    return isinstance(engine, str) and engine.startswith(("http://", "https://"))


def attach_server(url: str) -> ServerDriver:
    """Make the driver for the server at `url`. Blocks for its answers, at most a minute.

    Raises:
        ConfigError: nobody answers there, or the server cannot be driven; the message says what to change.
    """
    client, deadline = HttpClient(url), Deadline.after(ANSWER_S)
    _require_answer(client, deadline)
    for target in SERVERS:
        driver: ServerDriver | None = load(target)(client, deadline)
        if driver is not None:
            return driver
    raise ConfigError(
        "the server at this address is not one that can be driven", where=client.url, expected=KNOWN,
        got="a server of another kind", remedy="give the address of the engine's own server, not of a router before it",
    )  # fmt: skip


def examine_server(url: str, deadline: Deadline) -> tuple[Check, ...]:
    """Check the server at `url`, whoever drives it. Blocks. Raises as `attach_server`."""
    return tuple(attach_server(url).examine(deadline))


def _require_answer(client: HttpClient, deadline: Deadline) -> None:
    try:
        client.get("/version", deadline)  # not /health: SGLang generates for it
    except HttpStatus as error:
        if error.status in (401, 403):
            raise ConfigError(
                "this server wants an API key", where=client.url, expected="a server without --api-key",
                got=str(error), remedy="start it without --api-key; a router before it may ask its users for one",
            ) from error  # fmt: skip
    except (PeerLost, DeadlineExceeded) as error:
        raise ConfigError(
            "no server answers at this address", where=client.url, expected=KNOWN, got=error.got or error.what,
            remedy="start it, wait until it has started, or give another address",
        ) from error  # fmt: skip
    except BridgeError:
        return  # an answer that is not JSON: a server is there
