"""What `weighbridge bench --engine` measures against: an engine's own way to take new weights from memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bridge.errors import ConfigError
from engine_side.engines.registry import entry


@dataclass(frozen=True)
class NativeReload:
    """A running engine of this process and the call that loads weights without the bridge.

    `own(named)` takes canonical tensors as a trainer's `named_parameters()` gives them, returns when the engine serves
    them (its caches dropped, nothing proven), and raises what the engine raises. `label` is that call's name.
    """

    engine: object
    label: str
    own: Callable[[Iterable[tuple[str, torch.Tensor]]], None]
    stop: Callable[[], None]


NATIVE_RELOADS: Mapping[str, str] = {
    "vllm": "engine_side.engines.vllm.native_reload:start",
    "sglang": "engine_side.engines.sglang.native_reload:start",
}
"""Scheme of an engine spec -> starter taking a checkpoint folder."""


def start(scheme: str, folder: Path) -> NativeReload:
    """Start the engine and its own way. Blocks until it can serve. Raises ConfigError for a scheme without one, or an
    engine that is not installed."""
    if scheme not in NATIVE_RELOADS:
        raise ConfigError("no such kind of engine to measure", expected=" | ".join(NATIVE_RELOADS), got=repr(scheme))
    try:
        rival: NativeReload = entry(NATIVE_RELOADS[scheme])(folder)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "this engine is not installed here",
            where=scheme,
            got=f"no module named {error.name}",
            remedy=f"run the bench in the environment of {scheme}",
        ) from error
    return rival
