"""One engine server as seen from here: JSON over HTTP with the standard library, errors in our words."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bridge.errors import ConfigError, DeadlineExceeded, PeerLost, ProtocolError
from bridge.protocol.deadline import Deadline

MAX_NBYTES = 64 << 20
"""Longest answer that is read."""


@dataclass(frozen=True)
class HttpStatus(Exception):
    """The server answered, and not with 200."""

    route: str
    status: int
    text: str

    def __str__(self) -> str:
        return f"{self.route} answered {self.status}: {self.text[:500]}"


class HttpClient:
    """Calls of one server. Blocks; may be used from several threads. No proxies: the server is on this node."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for anything but `http://HOST:PORT` (or https)."""
        if not _is_address(url):
            raise ConfigError(
                "not the address of a server", where="engine", expected="http://HOST:PORT", got=repr(url),
                remedy="give the address that the server was started on",
            )  # fmt: skip
        self.url = url.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, route: str, deadline: Deadline) -> Any:
        """As `post`."""
        return self._call(urllib.request.Request(f"{self.url}{route}"), route, deadline)

    def post(
        self,
        route: str,
        deadline: Deadline,
        query: Mapping[str, object] | None = None,
        body: object = None,
        *,
        plain: bool = False,
    ) -> Any:
        """The JSON answer (None for an empty one; not looked at and None for `plain`). Raises HttpStatus for an answer
        that is an error, PeerLost when nobody answers, DeadlineExceeded, ProtocolError for one that is no JSON."""
        words = {key: str(value).lower() if isinstance(value, bool) else value for key, value in (query or {}).items()}
        address = f"{self.url}{route}" + (f"?{urllib.parse.urlencode(words)}" if words else "")
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return self._call(urllib.request.Request(address, data, headers, method="POST"), route, deadline, plain)

    def _call(self, request: urllib.request.Request, route: str, deadline: Deadline, plain: bool = False) -> Any:
        deadline.check(f"a call of {route}")
        try:
            with self._opener.open(request, timeout=max(deadline.remaining_s, 0.001)) as reply:
                raw = reply.read(MAX_NBYTES)
        except urllib.error.HTTPError as error:
            with error:
                raise HttpStatus(route, error.code, error.read(4096).decode(errors="replace")) from None
        except TimeoutError as error:
            raise self._late(route) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise self._late(route) from error
            got = str(getattr(error, "reason", error)).strip() or type(error).__name__
            raise PeerLost("the server does not answer", where=f"{self.url}{route}", got=got) from error
        if plain:
            return None
        try:
            return json.loads(raw) if raw.strip() else None
        except ValueError as error:
            got = repr(raw[:200])
            raise ProtocolError("an answer that is no JSON", where=f"{self.url}{route}", got=got) from error

    def _late(self, route: str) -> DeadlineExceeded:
        return DeadlineExceeded("the server did not answer in time", where=f"{self.url}{route}")


def _is_address(url: str) -> bool:
    if not url.isprintable() or " " in url:
        return False
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:  # brackets that do not close, a port that is none
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
