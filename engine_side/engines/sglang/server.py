"""A running SGLang server on this node, at an address: recognised, examined, driven through its own endpoints."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any

from bridge.coordinator.health import Check
from bridge.errors import BridgeError, ConfigError, ProtocolError
from bridge.protocol.codec import pack
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common import server_checks
from engine_side.engines.common.frontend_client import CALL_S
from engine_side.engines.common.http import HttpClient, HttpStatus
from engine_side.engines.sglang import LOADER
from engine_side.engines.sglang.common import Arguments
from engine_side.engines.sglang.remote import FrontendDriver
from engine_side.engines.sglang.scheduler import ACTION, FRONT
from engine_side.engines.sglang.versions import check_version

START = f"python -m sglang.launch_server --model-path PATH --custom-weight-loader {LOADER}"


class HttpLine:
    """Over the endpoints of an SGLang server."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def ask(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        ok, text = self.check_weights([FRONT, base64.b64encode(pack(request)).decode()], deadline)
        try:
            frame = base64.b64decode(text, validate=True) if ok else b""
        except ValueError:
            frame = b""
        if not frame:
            raise ConfigError(
                "this server was started without weighbridge's plugin",
                where=self._client.url,
                expected="the plugin 'weighbridge' of the entry point group sglang.srt.plugins",
                got=text[:200],
                remedy="install weighbridge where SGLang runs, and let SGLANG_PLUGINS, if set, name 'weighbridge'",
            )
        return msg.read_reply(frame, self._client.url)

    def call(self, method: str, deadline: Deadline, **arguments: Any) -> Any:
        try:
            self._client.post(f"/{method}", deadline, body=arguments, plain=True)
        except HttpStatus as error:
            if error.status == 400 and method == "flush_cache":
                return False
            raise error.as_error() from error
        return True

    def check_weights(self, words: list[str], deadline: Deadline) -> tuple[bool, str]:
        body = {"action": ACTION, "skip_tensor_list": words}
        try:
            said = self._client.post("/weights_checker", deadline, body=body)
        except HttpStatus as error:
            if error.status == 400:
                return False, error.text
            raise error.as_error() from error
        if not isinstance(said, dict) or not isinstance(said.get("message"), str):
            raise ProtocolError("an answer of another kind", where=f"{self._client.url}/weights_checker", got=str(said))
        return bool(said.get("success")), said["message"]


class SglangServerDriver(FrontendDriver):
    """Over a server that stays its owner's."""

    def __init__(self, client: HttpClient, arguments: Arguments) -> None:
        super().__init__(HttpLine(client), arguments, client.url)
        self._client = client

    def examine(self, deadline: Deadline) -> Iterator[Check]:
        """What the server says of itself, and what its schedulers find in their weights."""
        label = str(self._client.get("/model_info", Deadline.after(CALL_S)).get("weight_version"))
        state, paused = self.state(), self.facts().paused
        yield from server_checks.check_service("SGLang", self.ranks, state, label, paused, "/continue_generation")
        yield from server_checks.check_weights(self, deadline)


def recognise(client: HttpClient, deadline: Deadline) -> SglangServerDriver | None:
    """The adapter of an SGLang server; None for anything else. Raises ConfigError, with the remedy, for one that was
    started without the loader or the plugin, or on another node."""
    about = _about(client, deadline)
    if about is None:
        return None
    check_version(str(about["version"]))
    arguments = Arguments.read(about.get, client.url, START)
    line = HttpLine(client)
    front = server_checks.identify(lambda request: line.ask(request, deadline), client.url)
    server_checks.require_sight(front, client.url)
    adapter = SglangServerDriver(client, arguments)
    adapter.facts()
    return adapter


def _about(client: HttpClient, deadline: Deadline) -> Mapping[str, Any] | None:
    """What SGLang's server says of itself; None for one that does not answer as SGLang's does."""
    try:
        model, server = client.get("/model_info", deadline), client.get("/server_info", deadline)
    except (HttpStatus, BridgeError):
        return None
    known = isinstance(model, dict) and "weight_version" in model
    return server if known and isinstance(server, dict) and "version" in server else None
