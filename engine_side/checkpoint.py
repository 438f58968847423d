"""A checkpoint folder as version 0: safetensors files straight into an arena slot, by canonical name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridge.arena import Arena
from bridge.errors import ConfigError


def write_checkpoint(folder: Path, arena: Arena, slot: int) -> list[str]:
    """Fill `slot` from the folder's safetensors, cast to the wire dtypes; returns the names that it does not hold (or
    holds in another shape). Blocks; the slot stays unsealed. Raises ConfigError without the `hf` extra."""
    wanted = arena.manifest.by_name
    into = dict(zip(wanted, arena.tensors(slot), strict=True))
    done: set[str] = set()
    with Arena.open(arena.path, arena.manifest, writable=True) as writable:
        into = dict(zip(wanted, writable.tensors(slot), strict=True))
        for name, tensor in _tensors(folder):
            if name in into and tensor.shape == into[name].shape:
                into[name].copy_(tensor)
                done.add(name)
        into.clear()
    return [name for name in wanted if name not in done]


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ConfigError("reading checkpoints needs safetensors", remedy="pip install 'weighbridge[hf]'") from error
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 safe_open is no mapping
                yield name, handle.get_tensor(name)
