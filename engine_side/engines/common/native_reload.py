"""An engine's own way to load new weights from memory: what `weighbridge bench --engine` compares a push with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bridge.errors import ConfigError
from engine_side.engines.common.hosting import not_installed
from engine_side.engines.registry import entry


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


NATIVE_RELOADS: Mapping[str, str] = {
    "vllm": "engine_side.engines.vllm.native_reload:start",
    "sglang": "engine_side.engines.sglang.native_reload:start",
}
"""Scheme of an engine spec -> function that starts the engine on a checkpoint folder."""


def start(scheme: str, folder: Path) -> NativeReload:
    """Start an engine for the bench. Blocks until it can serve.

    Raises:
        ConfigError: no engine of this scheme has such a call, or it is not installed.
    """
    if scheme not in NATIVE_RELOADS:
        raise ConfigError(
            "no such kind of engine to measure", where="engine", expected=" | ".join(NATIVE_RELOADS), got=repr(scheme),
            remedy="measure one of these",
        )  # fmt: skip
    try:
        native: NativeReload = entry(NATIVE_RELOADS[scheme])(folder)
    except ModuleNotFoundError as error:
        raise not_installed(scheme, error) from error
    return native
