"""Transports by name. Entries are strings, imported on use; a backend that cannot be used here says why."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from bridge.errors import ConfigError
from bridge.transports.base import Transport

__all__ = ["TRANSPORTS", "Registry", "Transport"]

Connect = Callable[..., Transport]
"""Makes one end of a transport; which arguments it takes is the transport's own."""

TRANSPORTS: Mapping[str, str] = MappingProxyType(
    {
        "gloo": "bridge.transports.collective:connect_gloo",
        "nccl": "bridge.transports.collective:connect_nccl",
        "rccl": "bridge.transports.collective:connect_rccl",
    }
)
"""Name -> `module:function`. The function raises ConfigError, saying why, where its backend is missing."""


class Registry:
    """Resolves names to transports and remembers, for `doctor` and for messages, why one is missing."""

    def __init__(self, entries: Mapping[str, str] = TRANSPORTS) -> None:
        self._entries = dict(entries)
        self._missing: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    @property
    def missing(self) -> Mapping[str, str]:
        """Name -> why it could not be used, for those that were tried."""
        return dict(self._missing)

    def resolve(self, name: str) -> Connect:
        """The function that connects transport `name`. Raises ConfigError for an unknown or a missing one."""
        target = self._entries.get(name)
        if target is None:
            raise ConfigError("no such transport", got=repr(name), expected=", ".join(self._entries))
        module, _, attribute = target.partition(":")
        try:
            connect: Connect = vars(importlib.import_module(module))[attribute]
        except (ImportError, KeyError) as error:
            reason = f"{target} failed to import: {error}"
            self._missing[name] = reason
            raise ConfigError("this transport is not available", where=name, got=reason) from error
        return connect

    def connect(self, name: str, *args: Any, **options: Any) -> Transport:
        """Connect one end of transport `name`. Raises ConfigError with the reason where it is missing."""
        connect = self.resolve(name)
        try:
            transport = connect(*args, **options)
        except ConfigError as error:
            self._missing[name] = str(error)
            raise
        self._missing.pop(name, None)
        return transport
