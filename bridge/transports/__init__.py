"""Transports by name. Entries are strings, imported on use; a backend that cannot be used here says why."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from bridge.entry_points import load
from bridge.errors import ConfigError
from bridge.transports.base import Transport

__all__ = ["TRANSPORTS", "Registry", "Transport"]

TRANSPORTS: Mapping[str, str] = MappingProxyType(
    {
        "gloo": "bridge.transports.collective:connect_gloo",
        "nccl": "bridge.transports.collective:connect_nccl",
        "rccl": "bridge.transports.collective:connect_rccl",
    }
)
"""Name -> function that connects one end; it raises ConfigError, with the reason, where its backend is missing."""


class Registry:
    """Connects transports by name and remembers, for messages, why one is missing."""

    def __init__(self, entries: Mapping[str, str] = TRANSPORTS) -> None:
        self._entries = dict(entries)
        self._missing: dict[str, str] = {}

    @property
    def missing(self) -> Mapping[str, str]:
        """Name -> why it could not be used, for those that were tried."""
        return dict(self._missing)

    def connect(self, name: str, *args: Any, **options: Any) -> Transport:
        """Connect one end of transport `name`; the arguments are the transport's own.

        Raises ConfigError for an unknown transport, and with the reason for one that cannot be used here.
        """
        if name not in self._entries:
            raise ConfigError(
                "no such transport", got=repr(name), expected=", ".join(self._entries), remedy="choose one of these"
            )
        try:
            transport: Transport = load(self._entries[name])(*args, **options)
        except ConfigError as error:
            self._missing[name] = str(error)
            raise
        self._missing.pop(name, None)
        return transport
