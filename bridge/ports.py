"""Ports: what the orchestrator of a push needs from engines, coordinator and trainer, wherever those live."""

from __future__ import annotations

import os
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from bridge.errors import Closed, ProtocolError, UnexpectedTensor
from bridge.model.declared_losses import Rounding
from bridge.model.lora_format import LoraLimits, LoraSpec
from bridge.model.manifest import TensorInfo
from bridge.protocol.coordinator_messages import Reference, Refused, ToCoordinator
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import ToEngine

if TYPE_CHECKING:  # commands speak through ports, and need no torch
    import torch

    from bridge.shm.arena import Arena, Seal

T = TypeVar("T")
R = TypeVar("R", contravariant=True)


class Port(Protocol[R]):
    """Carries requests to one engine's service or to the coordinator, wherever that lives."""

    @property
    def id(self) -> str: ...

    def call(self, request: R, reply: type[T], deadline: Deadline) -> T:
        """Send a request and wait for its reply. Blocks. Raises what the service raises, PeerLost,
        DeadlineExceeded, and ProtocolError for a reply of another kind."""
        ...


EnginePort = Port[ToEngine]
CoordinatorPort = Port[ToCoordinator]


def require_own_process(pid: int, where: str) -> None:
    """Raise Closed unless this is process `pid`: a port, and what it reaches, belongs to the process that opened it.
    Called before every call through a port; does not block."""
    if os.getpid() != pid:
        raise Closed(
            "this Bridge belongs to the process that opened it, and this is a forked child of it",
            where=where,
            expected=f"pid {pid}",
            got=f"pid {os.getpid()}",
            remedy="call it in the parent; a child opens a Bridge of its own: bridge.attach for an engine of its own, "
            "or bridge.connect(name) in a child that multiprocessing started by 'spawn' (Ray does not survive a fork)",
        )


def expect(reply: object, kind: type[T], where: str | None = None) -> T:
    """Narrow a reply, of the peer `where`, to its kind. Raises the error that a Refused carries, and ProtocolError for
    another kind."""
    if isinstance(reply, kind):
        return reply
    if isinstance(reply, Refused):
        raise reply.error.rebuild(where)
    raise ProtocolError(
        "an answer of the wrong kind", where=where, expected=kind.__name__, got=type(reply).__name__,
        remedy="run the same version of weighbridge on both sides",
    )  # fmt: skip


class Handles(Protocol):
    """A coordinator or an engine service: answers requests, or raises."""

    def handle(self, request: Any, deadline: Deadline) -> object: ...


class InProcessPort:
    """A port to a service of this process: a plain call, which takes as long as the engine does. Raises Closed in a
    forked child."""

    def __init__(self, port_id: str, service: Handles) -> None:
        self.id = port_id
        self._service = service
        self._pid = os.getpid()

    def call(self, request: Any, reply: type[T], deadline: Deadline) -> T:
        """Answer in this thread."""
        if os.getpid() != self._pid:
            require_own_process(self._pid, self.id)
        answer = self._service.handle(request, deadline)
        return answer if isinstance(answer, reply) else expect(answer, reply)


class SnapshotLayout(Protocol):
    """Lists the tensors that a plan is made for. Compared by identity: the same object means that nothing changed."""

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Name, trainer dtype and global shape of each tensor, canonical names in a fixed order."""
        ...


class Snapshot(Protocol):
    """Tensors of one push, collected but not yet copied."""

    @property
    def layout(self) -> SnapshotLayout:
        """The layout of the tensors; the same object as last time while it is the same."""
        ...

    @property
    def storages(self) -> frozenset[int]:
        """Addresses of the storages of the tensors, and of the LoRA model that they are computed from."""
        ...

    @property
    def adapter(self) -> LoraSpec | None:
        """Set when the tensors are a LoRA adapter's and not the model's."""
        ...

    @property
    def merged(self) -> bool:
        """True for weights that hold adapters."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about the tensors, for the receipt."""
        ...


@dataclass(frozen=True)
class ModeChoice:
    """The mode of a push as the capability table gave it, the reason for the receipt, and notes."""

    mode: str
    reason: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """A snapshot in its slot: the seal that closed it, and the bytes that had to be written."""

    seal: Seal
    nbytes: int


class TrainerPort(Protocol):
    """The trainer's side of one Bridge, in the trainer's own process. Used by that Bridge only, one call at a time."""

    @property
    def bound(self) -> bool:
        """True once a model is bound."""
        ...

    def bind(self, model: torch.nn.Module) -> None:
        """Read names, ties and buffers from the live model, which is never written to."""
        ...

    def choose(self, mode: str, limits: Sequence[LoraLimits | None]) -> ModeChoice:
        """Choose the mode in which the bound model travels to engines with these limits. Raises UnsupportedLora, naming
        the tensors that `mode` cannot carry and the mode that can; ConfigError for a mode that needs LoRA without any.
        """
        ...

    def collect(
        self,
        named: Iterable[tuple[str, torch.Tensor]],
        *,
        partial: bool,
        mode: str = "full",
        deadline: Deadline | None = None,
    ) -> Snapshot:
        """Exhaust the iterable, hold references, and turn live names into the canonical ones of a mode. Raises
        UnsupportedLora where what is computed for a layer is not what the layer computes."""
        ...

    def keep(self, named: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """Copy tensors to host memory as they come, one by one. Raises as `collect` for what is no plain tensor."""
        ...

    def collect_base(self) -> Snapshot:
        """Collect the bound model's base weights as they stand, whatever was sent. Raises UnsupportedLora when they are
        packed in a format that no engine's weights can be compared with."""
        ...

    def base_mark(self, sent: Snapshot | None = None) -> Hashable | None:
        """Fingerprint the bound model's base; equal while nothing of it moved. None when it has none, or when the
        snapshot `sent` holds other values than the live base."""
        ...

    def write(
        self,
        snapshot: Snapshot,
        arena: Arena,
        slot: int,
        base: int | None,
        *,
        version: int,
        allow_nonfinite: bool,
        threads: int,
        deadline: Deadline,
        unused: Collection[str] = (),
    ) -> Written:
        """Open the slot, cast every tensor but those of `unused` into it, and seal it as `version`; tensors that are
        not in the snapshot are carried over from slot `base`. Blocks for one pass over the bytes. Raises IntegrityError
        when the model's LoRA state has changed since it was collected, DeadlineExceeded when the copying threads
        outlast the deadline; then the slot is left unsealed."""
        ...

    def unsent(self, snapshot: Snapshot) -> tuple[str, ...]:
        """List the names of the bound model's other tensors, beside a snapshot of a subset; none without a model."""
        ...

    def prove_independent(self, names: Sequence[str], snapshot: Snapshot, engines: str) -> None:
        """Show that the bound model's text logits do not depend on tensors of a snapshot for which `engines` have no
        place. Blocks for a short forward. Raises UnexpectedTensor for those of which it cannot be shown."""
        ...

    def reference(
        self,
        snapshot: Snapshot,
        max_tokens: int | None = None,
        mode: str = "full",
        roundings: Iterable[Rounding] = (),
        *,
        deadline: Deadline,
    ) -> tuple[Reference, Reference | None]:
        """Compute the canary's reference: one no-grad forward of the bound model, prompts cut to `max_tokens` tokens,
        and one more for each of `roundings`, where the model lets it be done.
        For an adapter also the reference of the model without it; for mode "base" that one alone. Raises ConfigError
        when the model has none, DeadlineExceeded when the forward outlasts the deadline, and as `collect` for layers
        of the snapshot that only the model can call."""
        ...

    def explain(self, error: UnexpectedTensor) -> UnexpectedTensor:
        """Return the error with what the bound model knows of tensors for which engines have no place."""
        ...

    def doubts(self, snapshot: Snapshot) -> tuple[str, ...]:
        """Say which computed tensors were not compared with their layers, and why; with any of them the push is
        "partial". Called after `reference`, which compares some."""
        ...

    def close(self) -> None:
        """Stop the copying threads and let go of the arena. Idempotent."""
        ...
