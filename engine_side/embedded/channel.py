"""Frames between the engine's process and the children that hold the other ranks: length, then MessagePack."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from typing import Any, TypeVar

from bridge.errors import DeadlineExceeded, PeerLost, ProtocolError
from bridge.protocol import codec
from bridge.protocol.deadline import Deadline

T = TypeVar("T")
_HEAD = struct.Struct(">I")


class Channel:
    """One end of a socketpair. Used by one thread at a time."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock = sock
        self._peer = peer
        self._buffer = bytearray()

    def send(self, message: codec.Message, deadline: Deadline) -> None:
        """Send one message. Raises PeerLost when the other end is gone, DeadlineExceeded when it does not read."""
        frame = codec.pack(message)
        try:
            self._sock.settimeout(max(deadline.remaining_s, 0.001))
            self._sock.sendall(_HEAD.pack(len(frame)) + frame)
        except TimeoutError:
            raise self._late() from None
        except OSError as error:
            raise self._lost(str(error)) from error

    def receive(self, kind: type[T] | Any, deadline: Deadline | None) -> T:
        """Wait for the next message; None waits for ever (a child for its parent). Raises PeerLost at the end of the
        stream, DeadlineExceeded, ProtocolError."""
        (length,) = _HEAD.unpack(self._take(_HEAD.size, deadline))
        if length > codec.MAX_FRAME:
            expected, remedy = f"<= {codec.MAX_FRAME}", "run one version of weighbridge in all processes"
            raise ProtocolError("a frame is too large", expected=expected, got=str(length), remedy=remedy)
        message: T = codec.unpack(self._take(length, deadline), kind)
        return message

    def ready(self) -> bool:
        """Tell if something arrived, or the other end is gone."""
        return bool(self._buffer) or bool(select.select([self._sock], [], [], 0)[0])

    def _take(self, size: int, deadline: Deadline | None) -> bytes:
        # What has arrived stays in the buffer when the deadline passes, so a later call goes on in step.
        while len(self._buffer) < size:
            timeout = None if deadline is None else deadline.remaining_s
            if not select.select([self._sock], [], [], timeout)[0]:
                raise self._late()
            try:
                part = self._sock.recv(1 << 20)
            except OSError as error:
                raise self._lost(str(error)) from error
            if not part:
                raise self._lost("end of stream")
            self._buffer += part
        out = bytes(self._buffer[:size])
        del self._buffer[:size]
        return out

    def close(self) -> None:
        """End the stream, also where another process has inherited the socket."""
        with contextlib.suppress(OSError):  # the other end is gone
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _late(self) -> DeadlineExceeded:
        return DeadlineExceeded("a rank did not answer in time", where=self._peer, remedy="look for a hung process")

    def _lost(self, got: str) -> PeerLost:
        remedy = "restart the engine; the log of the process says why it ended"
        return PeerLost("the process of a rank is gone", where=self._peer, got=got, remedy=remedy)
