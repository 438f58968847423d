"""`vllm serve` at an address on this node: recognised, examined, driven through its own endpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator

from bridge.coordinator.health import Check
from bridge.daemon.processes import started_at
from bridge.errors import BridgeError, ConfigError
from bridge.protocol.codec import unpack
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common import server_checks
from engine_side.engines.common.http import HttpClient, HttpStatus
from engine_side.engines.vllm.channels import VllmHttpChannel
from engine_side.engines.vllm.facts import VllmFacts, check_facts
from engine_side.engines.vllm.remote import AsyncDriver
from engine_side.engines.vllm.versions import check_version

FLAG = '--weight-transfer-config \'{"backend":"bridge"}\''
START = f"VLLM_SERVER_DEV_MODE=1 vllm serve PATH {FLAG}"


class VllmServerDriver(AsyncDriver):
    """Over a server that stays its owner's."""

    def examine(self, deadline: Deadline) -> Iterator[Check]:
        """What the server says of itself, and what its workers find in their weights."""
        label, asleep = str(self._call("get_weight_version")), bool(self._call("is_sleeping"))
        yield from server_checks.service("vLLM", self.ranks, self.state(), label, asleep, "/resume")
        yield from server_checks.weights(self, deadline)


def recognise(client: HttpClient, deadline: Deadline) -> VllmServerDriver | None:
    """The adapter of a vLLM server; None for anything else. Raises ConfigError, with the remedy, for one that was
    started without its development endpoints, without the backend, or on another node."""
    version = _version(client, deadline)
    if version is None:
        return None
    check_version(version)
    ranks = _require_endpoints(client, deadline)
    if ranks > 1:
        _require_backend(client, deadline)
    line = VllmHttpChannel(client)
    front = _hello(line, client, deadline)
    facts = unpack(front.facts, VllmFacts)
    check_facts(facts, where=client.url, expected=FLAG, remedy=f"start it with {START}")
    if front.clients != 1:
        raise ConfigError(
            "this server has several API server processes, of which a bridge would reach one",
            where=client.url, expected="--api-server-count 1", got=str(front.clients), remedy=f"start it with {START}",
        )  # fmt: skip
    server_checks.require_sight(front, client.url)
    own = (os.getpid(), started_at(os.getpid()) or "")
    return VllmServerDriver(line, facts, client.url, own, remedy=f"POST {client.url}/wake_up or /resume")


def _version(client: HttpClient, deadline: Deadline) -> str | None:
    """vLLM's version; None for a server that does not answer as vLLM's does."""
    try:
        said, load = client.get("/version", deadline), client.get("/load", deadline)
    except (HttpStatus, BridgeError):
        return None
    known = isinstance(said, dict) and isinstance(load, dict) and "server_load" in load
    return str(said["version"]) if known and "version" in said else None


def _require_endpoints(client: HttpClient, deadline: Deadline) -> int:
    """How many workers there are."""
    try:
        return int(client.get("/get_world_size", deadline)["world_size"])
    except HttpStatus as error:
        raise ConfigError(
            "this vLLM server was started without its development endpoints, through which a bridge pauses and updates",
            where=client.url,
            expected="VLLM_SERVER_DEV_MODE=1 in its environment",
            got=str(error),
            remedy=f"start it with {START}; these endpoints are not for an open network",
        ) from error


def _require_backend(client: HttpClient, deadline: Deadline) -> None:
    """Before the workers are asked for what they may not know: of several, one that raises leaves vLLM out of step."""
    config = client.get("/server_info?config_format=json", deadline).get("vllm_config", {})
    backend = (config.get("weight_transfer_config") or {}).get("backend")
    if backend != "bridge":
        raise _without(client, "none" if backend is None else f"backend {backend!r}")


def _without(client: HttpClient, got: str) -> ConfigError:
    return ConfigError(
        "this vLLM server was started without the bridge's weight-transfer backend",
        where=client.url, expected=FLAG, got=got, remedy=f"start it with {START}",
    )  # fmt: skip


def _hello(line: VllmHttpChannel, client: HttpClient, deadline: Deadline) -> msg.FrontendIdentity:
    try:
        answer = server_checks.hello(lambda request: line.ask(request, deadline))
    except HttpStatus as error:
        raise _without(client, str(error)) from error
    except BridgeError as error:
        if isinstance(error, ConfigError):
            raise
        raise _without(client, error.got or error.what) from error
    if not isinstance(answer, msg.FrontendIdentity):
        raise _without(client, type(answer).__name__)
    return answer
