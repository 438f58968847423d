"""The states of one engine during its life under a bridge, and the steps between them."""

from __future__ import annotations

import enum
from collections.abc import Mapping


class EngineState(enum.Enum):
    """The state of one engine; it generates in SERVING only."""

    STAGING = "STAGING"
    """Paused; a version (or a LoRA) is being written into it."""
    LOADED = "LOADED"
    """All tensors are written, none was checked yet."""
    VERIFIED = "VERIFIED"
    """Every level that was asked for has passed; the engine waits for the other engines' votes."""
    SERVING = "SERVING"
    """Generates with its serving version."""
    STALE = "STALE"
    """Lost, restarted or late: must take part in a verified sync before it serves."""
    QUARANTINED = "QUARANTINED"
    """Holds unverified weights; refuses to generate until a full version was loaded and verified."""


_LOST = (EngineState.STALE, EngineState.QUARANTINED)
TRANSITIONS: Mapping[EngineState, tuple[EngineState, ...]] = {
    # Back to SERVING: nothing had been written yet.
    EngineState.STAGING: (EngineState.LOADED, EngineState.SERVING, *_LOST),
    # Back to STAGING: the previous version is being put back.
    EngineState.LOADED: (EngineState.VERIFIED, EngineState.STAGING, *_LOST),
    EngineState.VERIFIED: (EngineState.SERVING, EngineState.STAGING, *_LOST),
    EngineState.SERVING: (EngineState.STAGING, *_LOST),
    EngineState.STALE: (EngineState.STAGING, *_LOST),
    EngineState.QUARANTINED: (EngineState.STAGING, *_LOST),
}
"""State -> states that may follow it."""
