"""The engine-adapter protocol (`base.py`) and who fills it. Entries are strings, imported on use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.errors import ConfigError, NotFound

if TYPE_CHECKING:
    from engine_side.adapters.base import EngineAdapter
    from engine_side.adapters.module import Canonical

HOSTED: Mapping[str, str] = {"embedded": "engine_side.adapters.embedded:host"}
"""Scheme of an engine spec ("embedded:PATH") -> factory taking (path, engine arguments)."""

ATTACHED: tuple[str, ...] = (
    "engine_side.adapters.embedded:attach",
    "engine_side.adapters.vllm.driver:attach",
    "engine_side.adapters.sglang.driver:attach",
    "engine_side.adapters.module:attach",
)
"""Tried in order: each takes what `adapt` was given and answers an adapter, or None for an object not of its kind."""


def _load(target: str) -> Any:
    import importlib

    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def host(spec: str, arguments: Mapping[str, Any]) -> EngineAdapter:
    """Start the engine that a spec like "embedded:PATH" names, in this process. Blocks until it can serve. Raises
    ConfigError for an unknown scheme or argument, NotFound for a missing folder."""
    scheme, path = check_spec(spec)
    adapter: EngineAdapter = _load(HOSTED[scheme])(path, dict(arguments))
    return adapter


def check_spec(spec: str) -> tuple[str, str]:
    """(scheme, folder) of a spec. Raises ConfigError for a scheme that nobody hosts, NotFound for a missing folder."""
    scheme, colon, path = spec.partition(":")
    if not colon or scheme not in HOSTED:
        raise ConfigError(
            "no such kind of engine",
            where="engine",
            expected=" | ".join(f"{name}:PATH" for name in HOSTED),
            got=repr(spec),
        )
    if not Path(path).is_dir():
        raise NotFound("no such checkpoint folder", where=path, remedy="give the folder of a Hugging Face checkpoint")
    return scheme, path


def adapt(engine: object, canonical: Canonical | None = None) -> EngineAdapter:
    """The adapter for an object of this process. Raises ConfigError for an object that nobody knows.

    Args:
        canonical: how checkpoint names map onto a module that has no loader of its own; None: by its live names.
    """
    for target in ATTACHED:
        adapter: EngineAdapter | None = _load(target)(engine, canonical)
        if adapter is not None:
            return adapter
    raise ConfigError(
        "nobody knows how to push into this object",
        where="engine",
        expected="an embedded Engine, a vllm.LLM, a sglang.Engine or any torch.nn.Module",
        got=type(engine).__name__,
    )
