"""The other end of an actor's port: a service that answers packed requests in a Ray actor."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from bridge.errors import BridgeError
from bridge.ports import Handles
from bridge.protocol.codec import ErrorInfo, pack, unpack
from bridge.protocol.coordinator_messages import Refused
from bridge.protocol.deadline import Deadline

log = logging.getLogger(__name__)


class ServiceActor:
    """Base of the actors that `bridge.daemon.actors.start` starts: frames in, frames out. Several threads call it, so
    that generation runs beside control, and a wait does not block a question."""

    def __init__(self, name: str, requests: Any, threads: int, start: Callable[[str], Handles]) -> None:
        """Start the service. Never raises: Ray would turn the error into a dead actor. Every call then answers with it.

        Args:
            requests: the union of the messages that the service answers.
            start: makes the service, given this node's id. Blocks until it can serve.
        """
        import ray

        torch.set_num_threads(threads)  # Ray's num_cpus=0 sets OMP_NUM_THREADS=1
        self._frame: Any = tuple[float, requests]
        try:
            self._service: Handles | Refused = start(str(ray.get_runtime_context().get_node_id()))
        except Exception as error:  # process boundary: the starter is told what was wrong
            log.exception("%s could not be started", name)
            self._service = Refused(ErrorInfo.of(error))

    def call(self, frame: bytes) -> bytes:
        """Answer one request; an error of ours comes back as Refused. Blocks as the service's `handle` does."""
        if isinstance(self._service, Refused):
            return pack(self._service)
        try:
            remaining_s, request = unpack(frame, self._frame)
            answer: Any = self._service.handle(request, Deadline.after(remaining_s))
            return pack(answer)
        except BridgeError as error:
            return pack(Refused(ErrorInfo.of(error)))
