"""Three ways to a Bridge (`launch`, `connect`, `attach`), and the module-level calls on the most recent one."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from bridge import entry_points
from bridge.client import Bridge, Named
from bridge.config import from_environment
from bridge.coordinator.health import HealthReport, orphaned_memory
from bridge.errors import ConfigError
from bridge.journal.state_dir import checked_name
from bridge.ports import TrainerPort
from bridge.protocol.deadline import Deadline
from bridge.session import InProcessSession, RaySession, Session

_most_recent: weakref.ref[Bridge] | None = None
"""The Bridge that the module-level calls use; weak, for a Bridge that its owner drops must be free to go."""


def _open(session: Session, model: torch.nn.Module | None) -> Bridge:
    """A Bridge over a session, bound to `model`; closes the session when that fails."""
    global _most_recent
    try:
        trainer: TrainerPort = entry_points.load(entry_points.TRAINER)()
        made = Bridge(session, trainer, from_environment())
        if model is not None:
            made.bind(model)
    except BaseException:
        session.close()
        raise
    _most_recent = weakref.ref(made)
    return made


def launch(
    engine: str, *, name: str = "default", engines: int = 1, model: torch.nn.Module | None = None, **engine_args: Any
) -> Bridge:
    """Start a daemon with `engines` hosted engines on Ray and connect to it (a local Ray is started when none runs).

    Args:
        engine: what to host, "embedded:PATH", "vllm:PATH" or "sglang:PATH", PATH a Hugging Face checkpoint folder.
        name: the daemon's name; other processes find it by `bridge.connect(name)`. What a crashed daemon of this name
            left behind (engine actors, shared memory) is removed first.
        model: bound at once, as `Bridge.bind` does.
        engine_args: passed to every engine (`tensor_parallel_size`, `dtype`, `layout`, ...).

    Blocks until every engine can serve, at most `WEIGHBRIDGE_START_TIMEOUT_S`.

    Raises:
        ConfigError: a bad spec or argument, with the engine's own words.
        Busy: a daemon of that name runs, or is being started by another process.
        DeadlineExceeded: an engine was not ready in time; everything that was started is stopped again.
    """
    if engines < 1:
        raise ConfigError(
            "at least one engine is needed",
            where="engines",
            expected="1 or more",
            got=str(engines),
            remedy="leave it out for 1",
        )
    config = from_environment()
    checked_name(name)
    entry_points.load(entry_points.CHECK_SPEC)(engine)
    session = RaySession.launch(name, [(engine, engine_args)] * engines, config)
    try:
        return _open(session, model)
    except BaseException:
        session.shutdown()
        raise


def connect(name: str = "default", *, model: torch.nn.Module | None = None) -> Bridge:
    """Connect to a running daemon. Raises NotFound, naming those that run. Keep the Bridge: see `attach`."""
    return _open(RaySession.find(name), model)


def attach(engine: Any, *, name: str | None = None, model: torch.nn.Module | None = None) -> Bridge:
    """Open a Bridge into an engine of this process, without Ray: an embedded Engine, a `vllm.LLM`, a `sglang.Engine` or
    any `torch.nn.Module`; or into an engine's server on this node, by its address: "http://host:port".

    The engine stays the caller's: closing the Bridge leaves it running. Without a `name` the journal is not kept, and
    versions begin at 1. Keep the Bridge: one that nothing refers to any more is closed, as a file is. It belongs to
    this process; in a forked child its calls raise Closed.

    Raises:
        ConfigError: no driver fits the object, or nothing that can be driven answers at the address.
        Busy: another Bridge drives the engine, or a daemon has the journal of that name open.
    """
    return _open(InProcessSession(engine, name, from_environment()), model)


def examine(url: str, timeout_s: float = 120.0) -> HealthReport:
    """Examine the engine server at `url`, whoever drives it: does it serve, which version, and do its live weights
    still hold what was loaded last. Blocks; changes nothing. Raises ConfigError as `attach` does."""
    checks = entry_points.load(entry_points.EXAMINE)(url, Deadline.after(timeout_s))
    return HealthReport(url, (*checks, orphaned_memory(from_environment().shm_dir)))


def _current() -> Bridge:
    remedy = "b = bridge.attach(...), bridge.connect(...) or bridge.launch(...), and keep b"
    if _most_recent is None:
        raise ConfigError(
            "there is no Bridge yet",
            where="bridge",
            expected="a Bridge that this process has opened",
            got="none",
            remedy=remedy,
        )
    made = _most_recent()
    if made is None:
        raise ConfigError(
            "the most recent Bridge is gone: nothing referred to it any more",
            where="bridge",
            expected="a Bridge that something still refers to",
            got="none",
            remedy=remedy,
        )
    return made


def push(named: Named, **options: Any) -> Any:
    """`Bridge.push` on the most recent Bridge that this process opened and still refers to."""
    return _current().push(named, **options)


def bind(model: torch.nn.Module) -> None:
    """`Bridge.bind` on the most recent Bridge that this process opened and still refers to."""
    _current().bind(model)


def health(timeout_s: float = 120.0) -> HealthReport:
    """`Bridge.health` of the most recent Bridge that this process opened and still refers to."""
    return _current().health(timeout_s)
