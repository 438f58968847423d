"""TrainerActor: the coordinator and its ledger as a Ray actor, on the trainer's node but outlasting the trainer."""

from __future__ import annotations

from bridge.coordinator.coordinator import Coordinator
from bridge.daemon import actors, ray_cluster
from bridge.daemon.service_actor import ServiceActor
from bridge.journal.ledger import Ledger
from bridge.protocol.coordinator_messages import ToCoordinator
from bridge.shm.remains import remove_remains


class TrainerActor(ServiceActor):
    """Started by `bridge.daemon.actors.start`."""

    def __init__(self, name: str, engines: list[str], threads: int, start_timeout_s: float) -> None:
        """Open the journal, remove what a crashed daemon of this name left in shared memory, and claim the engines."""

        def start(node: str) -> Coordinator:
            import ray

            ports = [
                actors.engine_port(engine, ray.get_actor(f"{name}:{engine}", namespace=ray_cluster.NAMESPACE))
                for engine in engines
            ]
            ledger = Ledger.open(name)
            remove_remains(ledger.path)
            return Coordinator(name, ports, ledger, node=node, start_timeout_s=start_timeout_s)

        super().__init__(f"the coordinator of {name}", ToCoordinator, threads, start)
