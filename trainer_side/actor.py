"""TrainerActor: the coordinator and its ledger as a Ray actor, on the trainer's node but outlasting the trainer."""

from __future__ import annotations

import os

import torch

from bridge.coordinator.coordinator import Coordinator
from bridge.daemon import ray_cluster
from bridge.journal.ledger import Ledger
from bridge.protocol.codec import pack, unpack
from bridge.protocol.coordinator_messages import ToCoordinator


class TrainerActor:
    """Hosts the coordinator; `bridge.daemon.ray_cluster.start` makes it with `ray.remote`.

    Several threads call it, so that a request which waits does not block the others.
    """

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
        """Handle one packed request and return the packed reply; an error of ours comes back as Refused."""
        return pack(self._coordinator.handle(unpack(frame, ToCoordinator)))

    def pid(self) -> int:
        """Return the actor's process id."""
        return os.getpid()
