"""What every engine's front keeps for whichever bridge comes next, and the words in which requests are asked for."""

from __future__ import annotations

from dataclasses import dataclass

from bridge.errors import ConfigError, NotFound

CURRENT, BASE = "current", "base"
MODES = ("drain", "abort", "keep")


@dataclass
class PublishedState:
    """What was published, and whether a bridge has paused the engine."""

    paused: bool = False
    version: int = 0
    adapter: str | None = None

    def meant(self, adapter: str) -> str | None:
        """The adapter that a request asks for by this word; None is the base model."""
        return self.adapter if adapter == CURRENT else None if adapter == BASE else adapter


def check_mode(inflight: str) -> None:
    """Raises ConfigError for a word that says nothing about requests in flight."""
    if inflight not in MODES:
        raise ConfigError("no such mode", where="inflight", expected=" | ".join(MODES), got=repr(inflight))


def lora_not_loaded(name: str) -> NotFound:
    return NotFound("this engine holds no such adapter", where="adapter", got=repr(name))


def number(label: object) -> int:
    """An engine's label as a version; 0 for what it calls its own checkpoint, and for labels of others."""
    text = str(label)
    return int(text) if text.isdecimal() else 0
