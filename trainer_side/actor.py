"""TrainerActor: the coordinator and its ledger as a Ray actor, on the trainer's node but outlasting the trainer."""

from __future__ import annotations

import os

import torch

from bridge.coordinator.coordinator import Coordinator
from bridge.daemon import ray_cluster
from bridge.errors import BridgeError
from bridge.journal.ledger import Ledger
from bridge.protocol.codec import ErrorInfo, pack, unpack
from bridge.protocol.coordinator_messages import Refused, ToCoordinator
from bridge.protocol.deadline import Deadline


class TrainerActor:
    """Made by `bridge.daemon.ray_cluster.start` with `ray.remote`; several threads call it, so a wait does
    not block a question."""

    def __init__(self, name: str, engines: list[str], threads: int) -> None:
        import ray

        torch.set_num_threads(threads)
        ports = [
            ray_cluster.engine_port(engine, ray.get_actor(f"{name}:{engine}", namespace=ray_cluster.NAMESPACE))
            for engine in engines
        ]
        node = str(ray.get_runtime_context().get_node_id())
        self._coordinator = Coordinator(name, ports, Ledger.open(name), node=node)

    def call(self, frame: bytes) -> bytes:
        """Answer one request; an error of ours comes back as Refused. Blocks as `Coordinator.handle` does."""
        try:
            remaining_s, request = unpack(frame, tuple[float, ToCoordinator])
            return pack(self._coordinator.handle(request, Deadline.after(remaining_s)))
        except BridgeError as error:
            return pack(Refused(ErrorInfo.of(error)))

    def pid(self) -> int:
        return os.getpid()
