"""Addresses that are none, and servers that do not speak HTTP."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from bridge.cli import commands
from bridge.errors import BridgeError, ConfigError, DeadlineExceeded, PeerLost, ProtocolError
from bridge.protocol.deadline import Deadline
from engine_side.engines.common.http import HttpClient

NO_ADDRESSES = [
    "http://127.0.0.1:abc", "http://127.0.0.1:99999", "http://127.0.0.1:0", "http://[::1", "http://a b:80",
    "http://a/b c", "http://127.0.0.1:80\n", "http://\u2100:80", "http://", "http://:80", "ftp://a:80", "a:80",
]  # fmt: skip
Server = Callable[[bytes], str]


@pytest.fixture
def server() -> Iterator[Server]:
    """Starts servers that say one thing to everybody; their addresses."""
    opened: list[socket.socket] = []

    def start(answer: bytes) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        opened.append(listening)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    peer, _ = listening.accept()
                    with peer:
                        peer.recv(4096)
                        peer.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for one in opened:
        one.shutdown(socket.SHUT_RDWR)
        one.close()


@pytest.mark.parametrize("url", NO_ADDRESSES)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HttpClient(url)
    assert caught.value.expected
    assert caught.value.remedy


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://[::1]:8000/", "https://localhost", "http://a.b/base"])
def test_what_is_one(url: str) -> None:
    assert HttpClient(url).url == url.rstrip("/")


BABBLE = [
    (b"SSH-2.0-OpenSSH_9.2p1\r\n", PeerLost),
    (b"", PeerLost),
    (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n", PeerLost),
    (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:abc/\r\nContent-Length: 0\r\n\r\n", PeerLost),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{", ProtocolError),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", PeerLost),
]


@pytest.mark.parametrize(("answer", "kind"), BABBLE, ids=[str(k) for k in range(len(BABBLE))])
def test_a_port_where_something_else_answers(server: Server, answer: bytes, kind: type[BridgeError]) -> None:
    client = HttpClient(server(answer))
    for call in (client.get, client.post):
        with pytest.raises(kind):
            call("/version", Deadline.after(10))


def test_the_command_says_so_too(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["health", "--server", "http://127.0.0.1:abc"]) == 2
    assert commands.main(["health", "--server", server(BABBLE[0][0])]) == 2
    assert "bug of weighbridge" not in capsys.readouterr().err


def test_a_server_that_drips_is_late() -> None:
    """Each read returns in time; the answer as a whole does not."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            peer, _ = listening.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while True:
                    peer.sendall(b" ")
                    time.sleep(0.02)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    started = time.monotonic()
    with listening, pytest.raises(DeadlineExceeded):
        HttpClient(f"http://127.0.0.1:{listening.getsockname()[1]}").get("/version", Deadline.after(0.5))
    assert time.monotonic() - started < 5
    thread.join(10)
    assert not thread.is_alive()
