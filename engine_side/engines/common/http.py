"""Client of one engine server: JSON over HTTP with the standard library, errors of `bridge.errors`."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from bridge.errors import ConfigError, DeadlineExceeded, PeerLost, ProtocolError
from bridge.protocol.deadline import Deadline

T = TypeVar("T")
MAX_NBYTES = 64 << 20
"""Longest answer that is read."""
_PART_NBYTES = 1 << 20


@dataclass(frozen=True)
class HttpStatus(Exception):
    """The server at `url` answered a call of `route` with an error status and this body."""

    url: str
    route: str
    status: int
    text: str

    def __str__(self) -> str:
        return f"{self.route} answered {self.status}: {self.text[:500]}"

    def as_error(self) -> PeerLost | ProtocolError:
        """Convert it into an error of `bridge.errors`; 5xx says that the engine behind the server is gone."""
        kind = PeerLost if self.status >= 500 else ProtocolError
        return kind(
            "the server could not do what was asked",
            where=f"{self.url}{self.route}",
            expected="status 200",
            got=str(self),
            remedy="look into the server's log; start it again if its engine has died",
        )


class HttpClient:
    """Calls one server. Calls block; several threads may call at once. Uses no proxy: the server is on this node."""

    def __init__(self, url: str) -> None:
        """Args: url: `http://HOST:PORT` (or https). Raises ConfigError for anything else. Opens no connection."""
        if not _is_address(url):
            raise ConfigError(
                "not the address of a server", where="engine", expected="http://HOST:PORT", got=repr(url),
                remedy="give the address that the server was started on",
            )  # fmt: skip
        self.url = url.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, route: str, deadline: Deadline) -> Any:
        """Send a GET. Returns and raises as `post`."""
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
        """Send a POST and return the JSON of its answer; None for an empty one.

        Args:
            query: arguments in the address; booleans become "true" and "false".
            body: arguments as JSON.
            plain: the answer may be anything; it is read and dropped, and None returned.

        Raises:
            HttpStatus: the answer's status is an error.
            PeerLost: nobody answers.
            DeadlineExceeded: the answer was not complete at the deadline.
            ProtocolError: the answer is not JSON.
        """
        words = {key: str(value).lower() if isinstance(value, bool) else value for key, value in (query or {}).items()}
        address = f"{self.url}{route}" + (f"?{urllib.parse.urlencode(words)}" if words else "")
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return self._call(urllib.request.Request(address, data, headers, method="POST"), route, deadline, plain)

    def _call(self, request: urllib.request.Request, route: str, deadline: Deadline, plain: bool = False) -> Any:
        deadline.check(f"a call of {route}")
        where = f"{self.url}{route}"
        late = DeadlineExceeded(
            "the server did not answer in time",
            where=where,
            expected="an answer before the deadline",
            got="none",
            remedy="look for a hung engine, or raise timeout_s",
        )
        try:
            with self._opener.open(request, timeout=max(deadline.remaining_s, 0.001)) as reply:
                raw = bytearray()
                # the socket's timeout holds for each read: a server that sends a byte now and then would never be late
                while len(raw) < MAX_NBYTES and (part := reply.read1(_PART_NBYTES)):
                    raw += part
                    if deadline.expired:
                        raise late
        except urllib.error.HTTPError as error:
            with error:
                raise HttpStatus(self.url, route, error.code, error.read(4096).decode(errors="replace")) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise late from error
            got = str(reason).strip() or type(error).__name__
            remedy = "start it, or look into its log"
            raise PeerLost(
                "the server does not answer", where=where, expected="a server that answers", got=got, remedy=remedy
            ) from error
        if plain:
            return None
        try:
            return json.loads(raw) if raw.strip() else None
        except ValueError as error:
            raise ProtocolError(
                "an answer that is not JSON", where=where, expected="JSON", got=repr(bytes(raw[:200])),
                remedy="give the address of the engine's own server",
            ) from error  # fmt: skip


def read_field(answer: object, key: str, kind: type[T], where: str) -> T:
    """Read a field of the JSON that a server answered with. Raises ProtocolError for an answer of another form."""
    found = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(found, kind):
        raise ProtocolError(
            "the server's answer has another form",
            where=where,
            expected=f"an object in which {key!r} is of type {kind.__name__}",
            got=str(answer)[:200],
            remedy="give the address of the engine's own server, not of a router before it",
        )
    return found


def _is_address(url: str) -> bool:
    if not url.isprintable() or " " in url:
        return False
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:  # brackets that do not close, a port that is none
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
