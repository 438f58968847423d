"""weighbridge: verified weight sync from an RL trainer into running inference engines.

    import bridge

    b = bridge.launch("embedded:PATH", name="run1", model=model)
    receipt = b.push(model.named_parameters())

The public names, nothing else. Importing this loads neither ray, transformers nor any engine.
"""

from bridge.api import attach, bind, connect, health, launch, push
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
    PeerLost,
    ProtocolError,
    PushAborted,
    ShapeMismatch,
    StaleVersion,
    TransportError,
    UnexpectedTensor,
    UnsupportedLora,
)
from bridge.health import Check, HealthReport
from bridge.push import Bridge, EngineHandle, PendingPush
from bridge.receipt import EngineReport, Receipt
from bridge.wire import Completion, Sampling

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
