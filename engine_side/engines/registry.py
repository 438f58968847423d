"""The engines that can be hosted or attached, and their drivers. Entries are strings, imported on use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.entry_points import load
from bridge.errors import ConfigError, NotFound
from engine_side.engines.common.server_discovery import attach_server, is_url

if TYPE_CHECKING:
    from engine_side.engines.module import CanonicalRoutes
    from engine_side.protocol import EngineDriver

HOSTED: Mapping[str, str] = {
    "embedded": "engine_side.engines.embedded:host",
    "vllm": "engine_side.engines.vllm.hosted:host",
    "sglang": "engine_side.engines.sglang.driver:host",
}
"""Scheme of an engine spec ("embedded:PATH") -> factory taking (path, engine arguments)."""
VARIABLES: Mapping[str, tuple[str, ...]] = {"vllm": ("VLLM_",), "sglang": ("SGLANG_",)}
"""Scheme -> prefixes of the environment variables that its engines read when they start."""

ATTACHED: tuple[str, ...] = (
    "engine_side.engines.embedded:attach",
    "engine_side.engines.vllm.driver:attach",
    "engine_side.engines.sglang.driver:attach",
)
"""Factories, tried in order: object -> driver, or None for an object of another kind. Modules are tried after them."""


def host(spec: str, arguments: Mapping[str, Any]) -> EngineDriver:
    """Start the engine that a spec like "embedded:PATH" names, in this process. Blocks until it can serve. Raises
    ConfigError for an unknown scheme or argument, NotFound for a missing folder."""
    scheme, path = check_spec(spec)
    driver: EngineDriver = load(HOSTED[scheme])(path, dict(arguments))
    return driver


def check_spec(spec: str) -> tuple[str, str]:
    """Split a spec into scheme and folder. Raises ConfigError for an unknown scheme, NotFound for a missing folder."""
    scheme, colon, path = spec.partition(":")
    if not colon or scheme not in HOSTED:
        raise ConfigError(
            "no such kind of engine",
            where="engine",
            expected=" | ".join(f"{name}:PATH" for name in HOSTED),
            got=repr(spec),
            remedy="write the engine's kind in front of the folder",
        )
    if not Path(path).is_dir():
        raise NotFound(
            "no such checkpoint folder",
            where=path,
            expected="a folder",
            got="nothing there",
            remedy="give the folder of a Hugging Face checkpoint",
        )
    return scheme, path


def environment(spec: str) -> dict[str, str]:
    """Return the variables of this process that a hosted engine of this kind reads: its actor may run in a Ray that
    was started without them."""
    prefixes = VARIABLES.get(spec.partition(":")[0], ())
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


def adapt(engine: object, canonical: CanonicalRoutes | None = None) -> EngineDriver:
    """Find the driver for an object of this process, or for the server at an address. Raises ConfigError for an object
    of an unknown kind, and for an address without a server that can be driven.

    Args:
        canonical: maps checkpoint names onto a module that has no loader of its own; None: by its live names.
    """
    if is_url(engine):
        return attach_server(str(engine))
    driver: EngineDriver | None
    for target in ATTACHED:
        driver = load(target)(engine)
        if driver is not None:
            return driver
    driver = load("engine_side.engines.module:attach")(engine, canonical)
    if driver is not None:
        return driver
    raise ConfigError(
        "nobody knows how to push into this object",
        where="engine",
        expected="an embedded Engine, a vllm.LLM, a sglang.Engine, any torch.nn.Module, or a server's http://HOST:PORT",
        got=repr(engine) if isinstance(engine, str) else type(engine).__name__,
        remedy="bridge.launch hosts an engine from a checkpoint folder"
        if isinstance(engine, str)
        else "attach the engine itself, not a wrapper around it",
    )
