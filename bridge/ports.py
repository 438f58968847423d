"""The ports through which a push is orchestrated. Each has one in-process form and one across Ray (`daemon.py`)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from bridge.errors import ProtocolError, PushAborted
from bridge.model.lora_format import LoraLimits, LoraSpec
from bridge.model.manifest import TensorInfo
from bridge.protocol.coordinator_messages import FromCoordinator, Reference, Refused, ToCoordinator
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import FromEngine, ToEngine
from bridge.shm.arena import Arena

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

    @property
    def adapter(self) -> LoraSpec | None:
        """Set when the tensors are an adapter's and not the model's."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the receipt should say about them."""
        ...


@dataclass(frozen=True)
class Choice:
    """How a push travels: the mode that the capability table gave, why (for the receipt), and what else to say."""

    mode: str
    reason: str
    notes: tuple[str, ...] = ()


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

    def choose(self, mode: str, limits: Sequence[LoraLimits | None]) -> Choice:
        """The mode in which the bound model travels to engines with these limits. Raises UnsupportedLora, naming the
        tensors that `mode` cannot carry and the mode that can; ConfigError for a mode that needs LoRA without any."""
        ...

    def collect(self, named: Iterable[tuple[str, torch.Tensor]], *, partial: bool, mode: str = "full") -> Snapshot:
        """Exhaust the iterable, hold references, turn live names into the canonical ones of a mode."""
        ...

    def collect_base(self) -> Snapshot:
        """The bound model's base weights as they stand, whatever was sent. Raises UnsupportedLora when they are packed
        in a format that no engine's weights can be compared with."""
        ...

    def base_mark(self, sent: Snapshot | None = None) -> Hashable | None:
        """A fingerprint of the bound model's base, equal while nothing of it moved. None when it has none, or when the
        snapshot `sent` holds other values than the live base."""
        ...

    def write(
        self,
        snapshot: Snapshot,
        arena: Arena,
        slot: int,
        base: int | None,
        *,
        allow_nonfinite: bool,
        threads: int,
        timeout_s: float,
    ) -> Written:
        """Cast every tensor into the unsealed slot; tensors not in the snapshot are carried over from `base`. Raises
        IntegrityError when the model's LoRA state has changed since it was collected, DeadlineExceeded when the copying
        threads outlast `timeout_s`."""
        ...

    def reference(self, max_tokens: int | None = None, mode: str = "full") -> tuple[Reference, Reference | None]:
        """The canary's reference from the bound model, one no-grad forward; prompts are cut to `max_tokens`. Of an
        adapter also the one of the model without it; of mode "base" that one alone. Raises ConfigError when the model
        has none."""
        ...

    def storages(self) -> frozenset[int]:
        """Addresses of the storages of the bound model and of the last snapshot."""
        ...

    def close(self) -> None:
        """Stop the copying threads and let go of the arena. Idempotent."""
        ...
