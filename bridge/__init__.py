"""weighbridge: verified weight sync from an RL trainer into running inference engines.

    import bridge

    b = bridge.launch("embedded:PATH", name="run1", model=model)
    receipt = b.push(model.named_parameters())

The public names, nothing else. Importing this loads neither ray, transformers nor any engine; all but the errors are
loaded on first use, so that the command line answers `--help` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bridge.errors import (
    ArenaFull,
    BridgeError,
    Busy,
    CanaryMismatch,
    Closed,
    ConfigError,
    DeadlineExceeded,
    DigestMismatch,
    DtypeMismatch,
    DuplicateTensor,
    EngineQuarantined,
    IntegrityError,
    LeaseHeld,
    MissingTensor,
    NonFinite,
    NotFound,
    OutOfMemory,
    PeerLost,
    ProtocolError,
    PushAborted,
    ShapeMismatch,
    StaleVersion,
    TransportError,
    UnexpectedTensor,
    UnsupportedLora,
)

if TYPE_CHECKING:
    from bridge.api import attach, bind, connect, health, launch, push
    from bridge.client import Bridge
    from bridge.coordinator.health import Check, HealthReport
    from bridge.handles import EngineHandle, PendingPush
    from bridge.model.receipt import EngineReport, Receipt
    from bridge.protocol.codec import Completion, Sampling

__all__ = [
    "ArenaFull",
    "Bridge",
    "BridgeError",
    "Busy",
    "CanaryMismatch",
    "Check",
    "Closed",
    "Completion",
    "ConfigError",
    "DeadlineExceeded",
    "DigestMismatch",
    "DtypeMismatch",
    "DuplicateTensor",
    "EngineHandle",
    "EngineQuarantined",
    "EngineReport",
    "HealthReport",
    "IntegrityError",
    "LeaseHeld",
    "MissingTensor",
    "NonFinite",
    "NotFound",
    "OutOfMemory",
    "PeerLost",
    "PendingPush",
    "ProtocolError",
    "PushAborted",
    "Receipt",
    "Sampling",
    "ShapeMismatch",
    "StaleVersion",
    "TransportError",
    "UnexpectedTensor",
    "UnsupportedLora",
    "attach",
    "bind",
    "connect",
    "health",
    "launch",
    "push",
]

_ON_USE = {
    "bridge.api": ("attach", "bind", "connect", "health", "launch", "push"),
    "bridge.client": ("Bridge",),
    "bridge.coordinator.health": ("Check", "HealthReport"),
    "bridge.handles": ("EngineHandle", "PendingPush"),
    "bridge.model.receipt": ("EngineReport", "Receipt"),
    "bridge.protocol.codec": ("Completion", "Sampling"),
}


def __getattr__(name: str) -> Any:
    for module, names in _ON_USE.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
