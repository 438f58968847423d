"""TrainerActor: the coordinator and its ledger as a Ray actor, on the trainer's node but outlasting the trainer."""

from __future__ import annotations

import logging
import os

import torch

from bridge.coordinator.coordinator import Coordinator
from bridge.daemon import actors, ray_cluster
from bridge.errors import BridgeError
from bridge.journal.ledger import Ledger
from bridge.protocol.codec import ErrorInfo, pack, unpack
from bridge.protocol.coordinator_messages import Refused, ToCoordinator
from bridge.protocol.deadline import Deadline
from bridge.shm.remains import remove_remains

log = logging.getLogger(__name__)


class TrainerActor:
    """Started by `bridge.daemon.actors.start`. Several threads call it, so that a wait does not block a question."""

    def __init__(self, name: str, engines: list[str], threads: int, start_timeout_s: float) -> None:
        """Open the journal, remove what a crashed daemon of this name left in shared memory, and claim the engines.
        Never raises: Ray would turn the error into a dead actor. Every call then answers with it."""
        import ray

        torch.set_num_threads(threads)
        try:
            ports = [
                actors.engine_port(engine, ray.get_actor(f"{name}:{engine}", namespace=ray_cluster.NAMESPACE))
                for engine in engines
            ]
            ledger = Ledger.open(name)
            remove_remains(ledger.path)
            node = str(ray.get_runtime_context().get_node_id())
            self._coordinator: Coordinator | Refused = Coordinator(
                name, ports, ledger, node=node, start_timeout_s=start_timeout_s
            )
        except Exception as error:  # process boundary: the starter is told what was wrong
            log.exception("the coordinator of %s could not be started", name)
            self._coordinator = Refused(ErrorInfo.of(error))

    def call(self, frame: bytes) -> bytes:
        """Answer one request; an error of ours comes back as Refused. Blocks as `Coordinator.handle` does."""
        if isinstance(self._coordinator, Refused):
            return pack(self._coordinator)
        try:
            remaining_s, request = unpack(frame, tuple[float, ToCoordinator])
            return pack(self._coordinator.handle(request, Deadline.after(remaining_s)))
        except BridgeError as error:
            return pack(Refused(ErrorInfo.of(error)))

    def pid(self) -> int:
        """Process id of this actor."""
        return os.getpid()
