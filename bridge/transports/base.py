"""The contract of every transport: one sealed version of one arena arrives, checked, in an arena of another process.

A transport knows bytes and digests, not the meaning of tensors; the coordinator decides which rank sends when, and what
follows from a failure. One contract test runs on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from bridge.errors import DeadlineExceeded, PeerLost, TransportError
from bridge.protocol.deadline import Deadline
from bridge.shm.arena import Arena


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
                f"{what} outlasted its deadline", got=text, remedy="raise timeout_s, or look for a hung peer"
            ) from error
        raise PeerLost(f"{what} lost its peer", got=text, remedy="make a new group of the ranks that live") from error
    except OSError as error:
        raise TransportError(f"{what} failed", got=str(error), remedy="see the network of this node") from error
