"""EngineActor: one engine service as a Ray actor. Frames in, frames out; the engine lives in this process."""

from __future__ import annotations

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


class EngineActor:
    """Made by `bridge.daemon.ray_cluster.start` with `ray.remote`; `max_concurrency` threads call it, so that
    generation runs beside control."""

    def __init__(self, engine_id: str, spec: str, arguments: bytes, threads: int) -> None:
        # Ray's num_cpus=0 leaves one OpenMP thread; say what we want instead (transports.md 10)
        torch.set_num_threads(threads)
        self._service: EngineService | None = None
        self._refused: Refused | None = None
        try:
            adapter = host(spec, unpack(arguments, dict[str, Any]))
        except Exception as error:  # process boundary: whoever starts us is told what was wrong with the engine
            self._refused = Refused(ErrorInfo.of(error))
        else:
            self._service = EngineService(engine_id, adapter, node=_node(), threads=threads)

    def call(self, frame: bytes) -> bytes:
        """Answer one request; an error of ours comes back as Refused. Blocks as `EngineService.handle` does."""
        if self._service is None:
            return pack(self._refused or Refused(ErrorInfo("PeerLost", "this engine was never started")))
        try:
            remaining_s, request = unpack(frame, tuple[float, ToEngine])
            return pack(self._service.handle(request, Deadline.after(remaining_s)))
        except BridgeError as error:
            return pack(Refused(ErrorInfo.of(error)))

    def pid(self) -> int:
        return os.getpid()


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())
