"""An engine's own way to load new weights from memory: what `weighbridge bench --engine` compares a push with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from bridge.entry_points import load


@dataclass(frozen=True)
class NativeReload:
    """A running engine of this process and its own call for new weights.

    Attributes:
        label: the name of that call.
        own: loads canonical tensors, as a trainer's `named_parameters()` gives them. Returns when the engine serves
            them with empty caches; proves nothing; raises what the engine raises.
        stop: ends the engine.
    """

    engine: object
    label: str
    own: Callable[[Iterable[tuple[str, torch.Tensor]]], None]
    stop: Callable[[], None]


def start(scheme: str, folder: Path) -> NativeReload:
    """Start an engine ("vllm", "sglang") on a checkpoint folder, for the bench. Blocks until it can serve. Raises
    ConfigError for one that is not installed."""
    load(f"{scheme}:__version__")  # says how to install an engine that is missing
    native: NativeReload = load(f"engine_side.engines.{scheme}.native_reload:start")(folder)
    return native
