"""The driver of a `vllm serve` on this node: how it is recognised, checked and driven through its own endpoints."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.coordinator.health import Check
from bridge.errors import BridgeError, ConfigError
from bridge.protocol.codec import unpack
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common import server_checks
from engine_side.engines.common.http import HttpClient, HttpStatus
from engine_side.engines.vllm.channels import VllmHttpChannel
from engine_side.engines.vllm.facts import VllmFacts, backend_error, check_facts
from engine_side.engines.vllm.plugin import BACKEND
from engine_side.engines.vllm.remote import AsyncDriver
from engine_side.engines.vllm.versions import check_version

FLAG = '--weight-transfer-config \'{"backend":"bridge"}\''
START = f"start it with VLLM_SERVER_DEV_MODE=1 vllm serve PATH {FLAG}"


class VllmServerDriver(AsyncDriver):
    """The driver of a server that stays its owner's."""

    def examine(self, deadline: Deadline) -> Iterator[Check]:
        """Check what the server says of itself and what its workers find in their weights. Writes nothing."""
        label, asleep = str(self._call("get_weight_version")), bool(self._call("is_sleeping"))
        yield from server_checks.check_service("vLLM", self.ranks, self.state(), label, asleep, "/resume")
        yield from server_checks.check_weights(self, deadline)


def recognise(client: HttpClient, deadline: Deadline) -> VllmServerDriver | None:
    """Make the driver of a vLLM server; None for another kind of server. Blocks.

    Raises:
        ConfigError: the server was started without its development endpoints or the backend, runs on another node, or
            has several API server processes.
    """
    version = _server_version(client, deadline)
    if version is None:
        return None
    check_version(version)
    ranks = _require_endpoints(client, deadline)
    if ranks > 1:
        _require_backend(client, deadline)
    channel = VllmHttpChannel(client)
    front = _identify(channel, client, deadline)
    facts = unpack(front.facts, VllmFacts)
    check_facts(facts, where=client.url, expected=FLAG, remedy=START)
    if front.clients != 1:
        raise ConfigError(
            "this server has several API server processes, of which a bridge would reach one",
            where=client.url, expected="--api-server-count 1", got=str(front.clients), remedy=START,
        )  # fmt: skip
    server_checks.require_sight(front, client.url)
    return VllmServerDriver(channel, facts, client.url, remedy=f"POST {client.url}/wake_up or /resume")


def _server_version(client: HttpClient, deadline: Deadline) -> str | None:
    """vLLM's version; None for a server that does not answer as vLLM's does."""
    try:
        said, load = client.get("/version", deadline), client.get("/load", deadline)
    except (HttpStatus, BridgeError):
        return None
    known = isinstance(said, dict) and isinstance(load, dict) and "server_load" in load
    return str(said["version"]) if known and "version" in said else None


def _require_endpoints(client: HttpClient, deadline: Deadline) -> int:
    """Check for the development endpoints. Returns the number of workers."""
    try:
        return int(client.get("/get_world_size", deadline)["world_size"])
    except HttpStatus as error:
        raise ConfigError(
            "this vLLM server was started without its development endpoints, through which a bridge pauses and updates",
            where=client.url,
            expected="VLLM_SERVER_DEV_MODE=1 in its environment",
            got=str(error),
            remedy=f"{START}; these endpoints are not for an open network",
        ) from error


def _require_backend(client: HttpClient, deadline: Deadline) -> None:
    """Check for the backend before the first call of the workers: of several, one that raises for an unknown method
    leaves vLLM's multiprocess executor with replies that it pairs with later calls."""
    config = client.get("/server_info?config_format=json", deadline).get("vllm_config", {})
    backend = (config.get("weight_transfer_config") or {}).get("backend")
    if backend != BACKEND:
        raise backend_error(client.url, FLAG, "none" if backend is None else f"backend {backend!r}", START)


def _identify(channel: VllmHttpChannel, client: HttpClient, deadline: Deadline) -> msg.FrontendIdentity:
    try:
        return server_checks.identify(lambda request: channel.ask(request, deadline), client.url)
    except ConfigError:
        raise
    except BridgeError as error:  # one worker that does not know the method
        raise backend_error(client.url, FLAG, error.got or error.what, START) from error
