"""The ports through which a push is orchestrated. Each has one in-process form and one across Ray (`daemon.py`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from bridge.arena import Arena
from bridge.deadline import Deadline
from bridge.errors import ProtocolError, PushAborted
from bridge.manifest import TensorInfo
from bridge.messages import FromCoordinator, FromEngine, Reference, Refused, ToCoordinator, ToEngine

T = TypeVar("T")


class EnginePort(Protocol):
    """One engine service, wherever it lives."""

    @property
    def id(self) -> str: ...

    def call(self, request: ToEngine, deadline: Deadline) -> FromEngine:
        """Blocks for the answer. Raises PeerLost or DeadlineExceeded; errors of the service come back as Refused."""
        ...


class CoordinatorPort(Protocol):
    """The daemon's ledger and fan-out, wherever it lives."""

    def call(self, request: ToCoordinator, deadline: Deadline) -> FromCoordinator:
        """Blocks for the answer. Raises PeerLost or DeadlineExceeded; errors of the daemon come back as Refused."""
        ...


def expect(reply: object, kind: type[T]) -> T:
    """The reply as `kind`; a Refused is raised as the error it carries, anything else is a ProtocolError."""
    if isinstance(reply, kind):
        return reply
    if isinstance(reply, Refused):
        error = reply.error.rebuild()
        if isinstance(error, PushAborted):
            error.serving = dict(reply.serving)
            error.receipt = reply.receipt
        raise error
    raise ProtocolError("an answer of the wrong kind", expected=kind.__name__, got=type(reply).__name__)


class Snapshot(Protocol):
    """The trainer's tensors of one push, collected but not yet copied: canonical names in a fixed order."""

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Name, trainer dtype, global shape. The same object as last time when nothing about the layout changed."""
        ...


@dataclass(frozen=True)
class Written:
    """What a snapshot wrote: 8-byte digests in manifest order, and the bytes that really had to be written."""

    digests: bytes
    nbytes: int


class TrainerPort(Protocol):
    """The trainer side of one Bridge, in the trainer's own process."""

    @property
    def bound(self) -> bool: ...

    def bind(self, model: torch.nn.Module) -> None:
        """Read names, ties and buffers from the live model; nothing of it is ever written."""
        ...

    def collect(self, named: Iterable[tuple[str, torch.Tensor]], *, partial: bool) -> Snapshot:
        """Exhaust the iterable, hold references, turn live names into canonical ones."""
        ...

    def write(
        self, snapshot: Snapshot, arena: Arena, slot: int, base: int | None, *, allow_nonfinite: bool, threads: int
    ) -> Written:
        """Cast every tensor into the unsealed slot; tensors not in the snapshot are carried over from `base`."""
        ...

    def reference(self, max_tokens: int | None = None) -> Reference:
        """The canary's reference from the bound model, one no-grad forward; prompts are cut to `max_tokens`. Raises
        ConfigError when it has none."""
        ...

    def storages(self) -> frozenset[int]:
        """Addresses of the storages of the bound model and of the last snapshot."""
        ...

    def close(self) -> None:
        """Stop the copying threads and let go of the arena. Idempotent."""
        ...
