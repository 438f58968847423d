"""A server at an address: asked who it is, by everybody who drives one. Entries are strings, imported on use."""

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
    """What an adapter over a server adds."""

    def examine(self, deadline: Deadline) -> Iterable[Check]:
        """What can be said of the server without driving it. Writes nothing."""
        ...


SERVERS: tuple[str, ...] = (
    "engine_side.engines.vllm.server:recognise",
    "engine_side.engines.sglang.server:recognise",
)
"""Tried in order: each takes an HttpClient and a Deadline, and answers an adapter, or None for a server that is not of
its kind. Raises ConfigError for one that is and cannot be driven."""

ANSWER_S = 60.0
KNOWN = (
    'vllm serve PATH --weight-transfer-config \'{"backend":"bridge"}\', or '
    "python -m sglang.launch_server --model-path PATH --custom-weight-loader engine_side.engines.sglang.load"
)


def is_url(engine: object) -> bool:
    return isinstance(engine, str) and engine.startswith(("http://", "https://"))


def attach_server(url: str) -> ServerDriver:
    """The adapter for the server at `url`. Blocks for its answers. Raises ConfigError for an address where nobody
    answers, or somebody that cannot be driven, with what to do about it."""
    client, deadline = HttpClient(url), Deadline.after(ANSWER_S)
    _require_answer(client, deadline)
    for target in SERVERS:
        adapter: ServerDriver | None = load(target)(client, deadline)
        if adapter is not None:
            return adapter
    raise ConfigError(
        "what answers at this address is no server that can be driven", where=client.url, expected=KNOWN,
        got="a server of another kind", remedy="give the address of the engine's own server, not of a router before it",
    )  # fmt: skip


def examine_server(url: str, deadline: Deadline) -> tuple[Check, ...]:
    """Look at the server at `url`, whoever drives it. Raises as `attach_server`."""
    return tuple(attach_server(url).examine(deadline))


def _require_answer(client: HttpClient, deadline: Deadline) -> None:
    try:
        client.get("/version", deadline)  # not /health: SGLang generates for it
    except HttpStatus as error:
        if error.status in (401, 403):
            raise ConfigError(
                "this server wants a key from whoever calls it", where=client.url, got=str(error),
                remedy="start it without --api-key; a key between a router and its users does no harm",
            ) from error  # fmt: skip
        return
    except (PeerLost, DeadlineExceeded) as error:
        raise ConfigError(
            "no server answers at this address", where=client.url, expected=KNOWN, got=error.got or error.what,
            remedy="start it, wait until it has started, or give another address",
        ) from error  # fmt: skip
    except BridgeError:
        return  # it said something that is no JSON: somebody is there
