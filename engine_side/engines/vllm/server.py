"""The driver of a `vllm serve` on this node: how it is recognised, checked and driven through its own endpoints."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from bridge.coordinator.health import Check
from bridge.errors import BridgeError, ConfigError
from bridge.protocol.codec import pack, unpack
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common import server_checks
from engine_side.engines.common.http import HttpClient, HttpStatus, read_field
from engine_side.engines.common.refusals import require_version
from engine_side.engines.vllm.facts import VllmFacts, backend_error, check_facts
from engine_side.engines.vllm.plugin import BACKEND, FRONT
from engine_side.engines.vllm.remote import AsyncDriver

FLAG = '--weight-transfer-config \'{"backend":"bridge"}\''
START = f"start it with VLLM_SERVER_DEV_MODE=1 vllm serve PATH {FLAG}"


@dataclass(frozen=True)
class Route:
    """The endpoint of a method of AsyncLLM.

    Attributes:
        answer, kind: key and type of its result in the answer; None for a method without one.
        get: a GET; else a POST, with the arguments in the query or, if `body`, in the body.
    """

    path: str
    answer: str | None = None
    kind: type = object
    get: bool = False
    body: bool = False


ROUTES: Mapping[str, Route] = {
    "pause_generation": Route("/pause"),
    "resume_generation": Route("/resume"),
    "is_sleeping": Route("/is_sleeping", "is_sleeping", bool, get=True),
    "reset_prefix_cache": Route("/reset_prefix_cache", "success", bool),
    "reset_mm_cache": Route("/reset_mm_cache"),
    "reset_encoder_cache": Route("/reset_encoder_cache"),
    "update_weight_version": Route("/update_weight_version", body=True),
    "get_weight_version": Route("/weight_info", "weight_version", str, get=True),
    "collective_rpc": Route("/collective_rpc", "results", list, body=True),
}


class VllmHttpChannel:
    """The endpoints that `vllm serve` opens with VLLM_SERVER_DEV_MODE=1."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def ask(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        """Send a request through the server's `/collective_rpc`. Raises ConfigError where no frontend answers."""
        (text,) = self.call("collective_rpc", deadline, method=FRONT, args=(pack(request),))[:1] or ("",)
        if not text:
            raise ConfigError(
                "the server was started without weighbridge's plugin in its frontend",
                where=self._client.url,
                expected="one API server process, with weighbridge installed beside vLLM",
                got="an answer from a worker",
                remedy="install weighbridge in the server's environment and start it with --api-server-count 1",
            )
        return msg.read_reply(base64.b64decode(text), self._client.url)

    def call(self, name: str, deadline: Deadline, **arguments: Any) -> Any:
        """Call the endpoint of a method of AsyncLLM. Raises ProtocolError for an answer of another form."""
        route = ROUTES[name]
        try:
            if route.get:
                answer = self._client.get(route.path, deadline)
            elif route.body:
                answer = self._client.post(route.path, deadline, body=msgspec.to_builtins(arguments))
            else:
                answer = self._client.post(route.path, deadline, query=arguments)
        except HttpStatus as error:
            raise error.as_error() from error
        if route.answer is None:
            return None
        return read_field(answer, route.answer, route.kind, f"{self._client.url}{route.path}")


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
    require_version("vLLM", version)
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
