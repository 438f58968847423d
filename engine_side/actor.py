"""EngineActor: one engine service as a Ray actor. The engine lives in this process."""

from __future__ import annotations

from typing import Any

from bridge.daemon.service_actor import ServiceActor
from bridge.protocol.codec import unpack
from bridge.protocol.engine_messages import ToEngine
from engine_side.driver.service import EngineService
from engine_side.engines.registry import host


class EngineActor(ServiceActor):
    """Started by `bridge.daemon.actors.start`."""

    def __init__(self, engine_id: str, spec: str, arguments: bytes, threads: int) -> None:
        """Start the engine that `spec` names; blocks until it can serve."""

        def start(node: str) -> EngineService:
            driver = host(spec, unpack(arguments, dict[str, Any]))
            return EngineService(engine_id, driver, node=node, threads=threads)

        super().__init__(f"{engine_id} of {spec}", ToEngine, threads, start)
