"""Stand-ins for servers, for tests of who is driven and who is not."""

from __future__ import annotations

import json
import socket
from http.server import BaseHTTPRequestHandler
from typing import Any


class Answers(BaseHTTPRequestHandler):
    """A server of canned answers."""

    routes: dict[str, Any] = {}

    def do_GET(self) -> None:
        known = self.routes.get(self.path.partition("?")[0])
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(404 if known is None else 200)
        self.end_headers()
        self.wfile.write(b"{}" if known is None else json.dumps(known).encode())

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
