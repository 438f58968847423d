"""The states of one engine during its life under a bridge, and the steps between them."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType

from bridge.errors import ProtocolError


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
TRANSITIONS: Mapping[EngineState, tuple[EngineState, ...]] = MappingProxyType(
    {
        # Back to SERVING: nothing had been written yet.
        EngineState.STAGING: (EngineState.LOADED, EngineState.SERVING, *_LOST),
        # Back to STAGING: the previous version is being put back.
        EngineState.LOADED: (EngineState.VERIFIED, EngineState.STAGING, *_LOST),
        EngineState.VERIFIED: (EngineState.SERVING, EngineState.STAGING, *_LOST),
        EngineState.SERVING: (EngineState.STAGING, *_LOST),
        EngineState.STALE: (EngineState.STAGING, *_LOST),
        EngineState.QUARANTINED: (EngineState.STAGING, *_LOST),
    }
)
"""State -> states that may follow it."""


class Standing:
    """Keeps the state of one engine and the version that it serves; owned by the engine's service."""

    def __init__(self, engine: str, state: EngineState = EngineState.STALE, serving: int | None = None) -> None:
        self.engine = engine
        self.state = state
        self.serving = serving
        """The version that it serves; None: no verified one."""

    def move(self, to: EngineState, serving: int | None = None) -> None:
        """Go to another state.

        Args:
            serving: the version served from now on; None keeps the present one. A quarantined engine serves none.

        Raises ProtocolError for a step that is not in TRANSITIONS, or for SERVING without a version; then nothing has
        changed.
        """
        if to not in TRANSITIONS[self.state]:
            raise ProtocolError(
                "an engine cannot go from this state to that one", where=self.engine,
                expected=f"{self.state.name} -> {', '.join(state.name for state in TRANSITIONS[self.state])}",
                got=to.name,
            )  # fmt: skip
        version = self.serving if serving is None else serving
        if to is EngineState.SERVING and version is None:
            raise ProtocolError("an engine cannot serve without a version", where=self.engine)
        self.state = to
        self.serving = None if to is EngineState.QUARANTINED else version
