"""State that an engine's frontend keeps for the next bridge, and how requests name a LoRA."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from bridge.errors import SAME_MODEL, ConfigError, NotFound, ShapeMismatch

CURRENT, BASE = "current", "base"
"""The published LoRA (or the base model, where a version without one is published), and the base model alone."""


@dataclass
class PublishedState:
    """The version and LoRA that were published last, and whether a bridge has paused the engine.

    Attributes:
        retiring: LoRAs that vLLM is to drop once no request uses them. SGLang waits for that by itself.
    """

    paused: bool = False
    version: int = 0
    lora: str | None = None
    retiring: set[str] = field(default_factory=set)

    def resolve_lora(self, name: str) -> str | None:
        """The LoRA that a request means by "current", "base" or a LoRA's name. None: the base model."""
        return self.lora if name == CURRENT else None if name == BASE else name


def asleep_error(where: str, remedy: str) -> ConfigError:
    """The error for an engine whose owner has paused it or put it to sleep."""
    return ConfigError(
        "the engine is asleep or paused",
        where=where,
        expected="an engine that runs",
        got="somebody else has paused it or put it to sleep",
        remedy=remedy,
    )


def lora_misfit(where: str, error: Exception, names: Iterable[str]) -> ShapeMismatch:
    """The error for a LoRA that the engine's own code could not put into a slot: it raised `error`."""
    return ShapeMismatch(
        "an adapter's tensors do not fit the engine's slots",
        where=where,
        expected="tensors of the layers' shapes",
        got=f"{type(error).__name__}: {error}",
        remedy=SAME_MODEL,
        names=tuple(names),
    )


def lora_not_loaded(name: str) -> NotFound:
    """The error for a request that names a LoRA which the engine does not hold."""
    return NotFound(
        "this engine holds no such adapter",
        where="adapter",
        expected="the name of an adapter that is loaded",
        got=repr(name),
        remedy='use "current", "base", or a name that the engine lists; a push may have replaced this adapter',
    )


def parse_version(label: object) -> int:
    """The version in an engine's weight label; 0 for a label that no push has set (an engine's own "default")."""
    text = str(label)
    return int(text) if text.isdecimal() else 0
