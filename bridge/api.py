"""Three ways to a Bridge, and the same calls on the most recent one."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from bridge import entry_points
from bridge.client import Bridge, Named
from bridge.config import from_environment
from bridge.coordinator.coordinator import Coordinator
from bridge.coordinator.health import HealthReport, assess_server, local_facts
from bridge.daemon import ray_cluster
from bridge.errors import BridgeError, ConfigError
from bridge.journal.ledger import Ledger
from bridge.journal.state_dir import checked_name
from bridge.ports import CoordinatorPort, EnginePort, TrainerPort, expect
from bridge.protocol.coordinator_messages import ToCoordinator, WaitRequest
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import ToEngine


@dataclass
class _Default:
    """The most recent Bridge of this process, for the module-level calls."""

    bridge: Bridge | None = None


_default = _Default()


Request = TypeVar("Request")
T = TypeVar("T")


class LocalPort(Generic[Request]):
    """A service of this process as a port: a plain call. `admit` raises for a request that this thread may not wait
    for."""

    def __init__(
        self,
        port_id: str,
        handle: Callable[[Request, Deadline], object],
        admit: Callable[[Request], None] | None = None,
    ) -> None:
        self.id = port_id
        self._handle = handle
        self._admit = admit

    def call(self, request: Request, reply: type[T], deadline: Deadline) -> T:
        if self._admit is not None:
            self._admit(request)
        return expect(self._handle(request, deadline), reply)


def _remember(made: Bridge, model: torch.nn.Module | None, undo: Callable[[], None] | None = None) -> Bridge:
    if model is not None:
        try:
            made.bind(model)
        except BaseException:
            (undo or made.close)()
            raise
    _default.bridge = made
    return made


def launch(
    engine: str, *, name: str = "default", engines: int = 1, model: torch.nn.Module | None = None, **engine_args: Any
) -> Bridge:
    """Start a daemon with `engines` hosted engines on Ray and connect to it (a local Ray is started when none runs).

    Args:
        engine: what to host, "embedded:PATH" with PATH a Hugging Face checkpoint folder.
        name: the daemon's name; other processes find it by `bridge.connect(name)`.
        model: bound at once, as `Bridge.bind` does.
        engine_args: passed to every engine (`tensor_parallel_size`, `dtype`, `layout`, ...).

    Blocks until every engine can serve. Raises ConfigError for a bad spec, argument or a name that is taken.
    """
    if engines < 1:
        raise ConfigError("at least one engine is needed", where="engines", got=str(engines))
    config = from_environment()
    checked_name(name)
    entry_points.load(entry_points.CHECK_SPEC)(engine)
    ray_cluster.ensure_ray()
    try:
        coordinator, ports = ray_cluster.start(name, [(engine, engine_args)] * engines, config)
    except BaseException:
        ray_cluster.stop_ray_if_idle()
        raise
    made = _on_ray(name, coordinator, ports)
    return _remember(made, model, undo=made.shutdown)


def connect(name: str = "default", *, model: torch.nn.Module | None = None) -> Bridge:
    """Connect to a running daemon. Raises NotFound, naming those that run."""
    coordinator, ports = ray_cluster.find(name)
    return _remember(_on_ray(name, coordinator, ports), model)


def _on_ray(name: str, coordinator: CoordinatorPort, engines: Sequence[EnginePort]) -> Bridge:
    trainer: TrainerPort = entry_points.load(entry_points.TRAINER)()
    return Bridge(name, coordinator, engines, trainer, from_environment(), on_shutdown=lambda: ray_cluster.stop(name))


def attach(engine: Any, *, name: str | None = None, model: torch.nn.Module | None = None) -> Bridge:
    """A Bridge into an engine of this process, without Ray: an embedded Engine, a `vllm.LLM`, a
    `sglang.Engine` or any `torch.nn.Module`; or into an engine's server on this node, by its address:
    "http://host:port".

    The engine stays the caller's: closing the Bridge leaves it running. Without a `name` the journal is not kept, and
    versions begin at 1.
    Raises ConfigError for an object that nobody knows how to load, and for an address where nobody answers that can be
    driven.
    """
    config = from_environment()
    chosen = f"attached-{os.getpid()}-{secrets.token_hex(4)}" if name is None else checked_name(name)
    trainer: TrainerPort = entry_points.load(entry_points.TRAINER)()
    adapter = entry_points.load(entry_points.ADAPT)(engine, entry_points.load(entry_points.ROUTES))
    node = socket.gethostname()
    state: Path | None = None

    def forget() -> None:
        if state is not None:
            shutil.rmtree(state, ignore_errors=True)

    try:
        service = entry_points.load(entry_points.SERVICE)("engine0", adapter, node=node, threads=config.copy_threads)
        port = LocalPort[ToEngine]("engine0", service.handle)
        state = None if name is not None else Path(tempfile.mkdtemp(prefix="weighbridge-"))
        ledger = Ledger.open(chosen, directory=state)
        try:
            coordinator = Coordinator(chosen, [port], ledger, node=node, shm_dir=config.shm_dir)
        except BaseException:
            ledger.close()
            raise
    except BaseException:
        forget()
        with contextlib.suppress(BridgeError):  # what went wrong first is worth more
            adapter.close()
        raise

    def detach() -> None:
        atexit.unregister(detach)
        coordinator.close()
        forget()

    def admit(request: ToCoordinator) -> None:
        if not (isinstance(request, WaitRequest) and request.timeout_s == 0.0):  # which only asks
            service.refuse_caller()

    atexit.register(detach)
    made = Bridge(
        chosen,
        LocalPort[ToCoordinator](chosen, coordinator.handle, admit),
        [port],
        trainer,
        config,
        before_close=service.refuse_caller,
        on_close=detach,
        guard=adapter.refuse_shared,
        state=state,
    )
    return _remember(made, model)


def examine(url: str, timeout_s: float = 120.0) -> HealthReport:
    """Examine the engine server at `url`, whoever drives it: does it serve, which version, and do its live weights
    still hold what was loaded last. Blocks; changes nothing. Raises ConfigError as `attach` does."""
    checks = entry_points.load(entry_points.EXAMINE)(url, Deadline.after(timeout_s))
    return assess_server(url, checks, local_facts(from_environment().shm_dir))


def _current() -> Bridge:
    if _default.bridge is None:
        raise ConfigError("there is no Bridge yet", remedy="bridge.launch, bridge.connect or bridge.attach first")
    return _default.bridge


def push(named: Named, **options: Any) -> Any:
    """`Bridge.push` on the most recent Bridge."""
    return _current().push(named, **options)


def bind(model: torch.nn.Module) -> None:
    """`Bridge.bind` on the most recent Bridge."""
    _current().bind(model)


def health(timeout_s: float = 120.0) -> HealthReport:
    """`Bridge.health` of the most recent Bridge."""
    return _current().health(timeout_s)
