"""Transports: one sealed version of one arena arrives, checked, in an arena of another process.

A transport knows bytes and digests, not the meaning of tensors; the coordinator decides which rank sends when, and what
follows from a failure. One contract test runs on all of them. They are found by name: entries are strings, imported on
use; a backend that cannot be used here says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol

from bridge.entry_points import load
from bridge.errors import ConfigError, DeadlineExceeded, PeerLost, TransportError
from bridge.protocol.deadline import Deadline
from bridge.shm.arena import Arena

TRANSPORTS: Mapping[str, str] = MappingProxyType(
    {
        "gloo": "bridge.transports.collective:connect_gloo",
        "nccl": "bridge.transports.collective:connect_nccl",
        "rccl": "bridge.transports.collective:connect_rccl",
    }
)
"""Name -> function that connects one end; it raises ConfigError, with the reason, where its backend is missing."""


class Transport(Protocol):
    """One end of a group of one source and its receivers. Called from one thread at a time.

    Each round is one `send` at the source and one `receive` at every receiver, in the same order on all of them, on
    arenas of the same manifest. A failed transfer may end the group: later calls then raise Closed, and the
    coordinator makes a new group (a new epoch) of the ranks that live.
    """

    def send(self, arena: Arena, slot: int, deadline: Deadline) -> None:
        """*(source)* Replicate a sealed slot, which must not be written meanwhile. Blocks until every receiver has
        checked and sealed it.

        Raises ProtocolError (the slot is not sealed, or a receiver's arena has another manifest), DigestMismatch (a
        receiver got other bytes), DeadlineExceeded (naming the receivers that did not come), PeerLost, Closed.
        """
        ...

    def receive(self, arena: Arena, slot: int, deadline: Deadline) -> int:
        """*(receiver)* Receive the source's next version into `slot` of a writable arena, check it there and seal it;
        returns the version.

        The slot's seal is removed just before the first byte, and set again when every digest is right: after any error
        the slot is either as it was or open. Raises as `send`, and TransportError when the round was called off because
        another receiver failed.
        """
        ...

    def close(self) -> None:
        """Leave the group and let go of its memory. Idempotent; never waits for a peer."""
        ...


@contextmanager
def torch_errors(what: str, deadline: Deadline) -> Iterator[None]:
    """Turn errors of torch.distributed (RuntimeError and its Dist* subclasses) into TransportErrors.

    Past the deadline it is a DeadlineExceeded, before it a PeerLost: the connections of a dead process close at once.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        if deadline.expired:
            raise DeadlineExceeded(
                f"{what} outlasted its deadline",
                where=what,
                expected="an end before the deadline",
                got=text,
                remedy="raise timeout_s, or look for a hung peer",
            ) from error
        raise PeerLost(
            f"{what} lost its peer",
            where=what,
            expected="all ranks of the group",
            got=text,
            remedy="make a new group of the ranks that live",
        ) from error
    except OSError as error:
        raise TransportError(
            f"{what} failed",
            where=what,
            expected="a transfer without errors",
            got=str(error),
            remedy="see the network of this node",
        ) from error


def connect(name: str, *args: Any, **options: Any) -> Transport:
    """Connect one end of transport `name`; the arguments are the transport's own.

    Raises ConfigError for an unknown transport, and with the reason for one that cannot be used here.
    """
    if name not in TRANSPORTS:
        raise ConfigError(
            "no such transport",
            where="transport",
            expected=", ".join(TRANSPORTS),
            got=repr(name),
            remedy="choose one of these",
        )
    transport: Transport = load(TRANSPORTS[name])(*args, **options)
    return transport
