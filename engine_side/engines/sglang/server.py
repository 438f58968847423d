"""Recognise, examine and drive a running SGLang server on this node through its own endpoints."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any

from bridge.coordinator.health import Check
from bridge.errors import BridgeError
from bridge.protocol.codec import pack
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common import server_checks
from engine_side.engines.common.frontend_client import CALL_S
from engine_side.engines.common.http import HttpClient, HttpStatus, read_field
from engine_side.engines.common.refusals import require_version
from engine_side.engines.sglang import LOADER
from engine_side.engines.sglang.arguments import Arguments
from engine_side.engines.sglang.remote import SglangDriver
from engine_side.engines.sglang.scheduler_messages import ACTION, FRONT, without_plugin

START = f"python -m sglang.launch_server --model-path PATH --custom-weight-loader {LOADER}"


class SglangServerDriver(SglangDriver):
    """The driver of a server, which stays its owner's, over its endpoints."""

    def __init__(self, client: HttpClient, get: Arguments) -> None:
        super().__init__(get, client.url, START)
        self._client = client

    def ask_frontend(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        ok, text = self.check_weights([FRONT, base64.b64encode(pack(request)).decode()], deadline)
        try:
            frame = base64.b64decode(text, validate=True) if ok else b""
        except ValueError:
            frame = b""
        if not frame:
            raise without_plugin(self.where, text)
        return msg.read_reply(frame, self.where)

    def call_engine(self, method: str, deadline: Deadline, **arguments: Any) -> Any:
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
            answer = self._client.post("/weights_checker", deadline, body=body)
        except HttpStatus as error:
            if error.status == 400:
                return False, error.text
            raise error.as_error() from error
        message = read_field(answer, "message", str, f"{self.where}/weights_checker")
        return bool(answer.get("success")), message

    def examine(self, deadline: Deadline) -> Iterator[Check]:
        """Report whether the server serves, which version, who drives it, and whether its weights are those that were
        pushed. Writes nothing."""
        label = str(self._client.get("/model_info", Deadline.after(CALL_S)).get("weight_version"))
        state, paused = self.state(), self.facts().paused
        yield from server_checks.check_service("SGLang", self.ranks, state, label, paused, "/continue_generation")
        yield from server_checks.check_weights(self, deadline)


def recognise(client: HttpClient, deadline: Deadline) -> SglangServerDriver | None:
    """Return the driver of an SGLang server; None for any other server. Blocks.

    Raises ConfigError, with the remedy, for a server that was started without the loader or the plugin, or on another
    node."""
    info = _server_info(client, deadline)
    if info is None:
        return None
    require_version("SGLang", str(info["version"]))
    driver = SglangServerDriver(client, info.get)
    server_checks.identify(lambda request: driver.ask_frontend(request, deadline), client.url)
    driver.facts()
    return driver


def _server_info(client: HttpClient, deadline: Deadline) -> Mapping[str, Any] | None:
    """Return the start arguments that SGLang's server reports; None for a server that does not answer as SGLang's."""
    try:
        model, server = client.get("/model_info", deadline), client.get("/server_info", deadline)
    except (HttpStatus, BridgeError):
        return None
    known = isinstance(model, dict) and "weight_version" in model
    return server if known and isinstance(server, dict) and "version" in server else None
