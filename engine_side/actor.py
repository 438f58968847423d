"""EngineActor: one engine service as a Ray actor. Frames in, frames out; the engine lives in this process."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from bridge.errors import BridgeError
from bridge.protocol.codec import ErrorInfo, pack, unpack
from bridge.protocol.coordinator_messages import Refused
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import ToEngine
from engine_side.driver.service import EngineService
from engine_side.engines.registry import host

log = logging.getLogger(__name__)


class EngineActor:
    """Started by `bridge.daemon.actors.start`. Several threads call it, so that generation runs beside control."""

    def __init__(self, engine_id: str, spec: str, arguments: bytes, threads: int) -> None:
        """Start the engine that `spec` names; blocks until it can serve. Never raises: Ray would turn the error into a
        dead actor. Every call then answers with it."""
        import ray

        torch.set_num_threads(threads)  # Ray's num_cpus=0 sets OMP_NUM_THREADS=1
        try:
            driver = host(spec, unpack(arguments, dict[str, Any]))
            node = str(ray.get_runtime_context().get_node_id())
            self._service: EngineService | Refused = EngineService(engine_id, driver, node=node, threads=threads)
        except Exception as error:  # process boundary: the starter is told what was wrong with the engine
            log.exception("%s could not be started from %s", engine_id, spec)
            self._service = Refused(ErrorInfo.of(error))

    def call(self, frame: bytes) -> bytes:
        """Answer one request; an error of ours comes back as Refused. Blocks as `EngineService.handle` does."""
        if isinstance(self._service, Refused):
            return pack(self._service)
        try:
            remaining_s, request = unpack(frame, tuple[float, ToEngine])
            return pack(self._service.handle(request, Deadline.after(remaining_s)))
        except BridgeError as error:
            return pack(Refused(ErrorInfo.of(error)))

    def pid(self) -> int:
        """Process id of this actor."""
        return os.getpid()
