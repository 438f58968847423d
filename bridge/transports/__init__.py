"""Transports by name. Entries are strings, imported on use; a backend that cannot be used here says why."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from bridge.entry_points import load
from bridge.errors import ConfigError
from bridge.transports.base import Transport

__all__ = ["TRANSPORTS", "Transport", "connect"]

TRANSPORTS: Mapping[str, str] = MappingProxyType(
    {
        "gloo": "bridge.transports.collective:connect_gloo",
        "nccl": "bridge.transports.collective:connect_nccl",
        "rccl": "bridge.transports.collective:connect_rccl",
    }
)
"""Name -> function that connects one end; it raises ConfigError, with the reason, where its backend is missing."""


def connect(name: str, *args: Any, **options: Any) -> Transport:
    """Connect one end of transport `name`; the arguments are the transport's own.

    Raises ConfigError for an unknown transport, and with the reason for one that cannot be used here.
    """
    if name not in TRANSPORTS:
        raise ConfigError(
            "no such transport", got=repr(name), expected=", ".join(TRANSPORTS), remedy="choose one of these"
        )
    transport: Transport = load(TRANSPORTS[name])(*args, **options)
    return transport
