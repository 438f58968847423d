"""Write version 0 into an arena slot, by canonical name: from a folder of safetensors, or from another arena."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import torch

from bridge.errors import ConfigError
from bridge.model.dtypes import Landing, landing
from bridge.model.torch_dtypes import dtype_name
from bridge.shm.arena import Arena


def write_checkpoint(folder: Path, arena: Arena, slot: int, names: Collection[str]) -> list[str]:
    """Fill the tensors `names` of `slot` from the folder's safetensors, cast to the wire dtypes.

    Returns the names that the folder does not hold, or holds in another shape. Blocks; the slot stays unsealed.
    Raises ConfigError without the `hf` extra.
    """
    return _fill(arena, slot, names, _checkpoint_tensors(folder))


def write_held(older: Arena, older_slot: int, arena: Arena, slot: int, names: Collection[str]) -> list[str]:
    """Fill the tensors `names` of `slot` from a version in another arena; returns and blocks as `write_checkpoint`."""
    held = zip(older.manifest.by_name, older.tensors(older_slot), strict=True)
    return _fill(arena, slot, names, held)


def _fill(arena: Arena, slot: int, names: Collection[str], tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    open_names = set(names)
    with Arena.open(arena.path, arena.manifest, writable=True) as writable:
        into = dict(zip(arena.manifest.by_name, writable.tensors(slot), strict=True))
        for name, tensor in tensors:
            if name in open_names and tensor.shape == into[name].shape and _carries(tensor, into[name]):
                into[name].copy_(tensor)
                open_names.remove(name)
        into.clear()
    return [name for name in arena.manifest.by_name if name in open_names]


def _carries(tensor: torch.Tensor, into: torch.Tensor) -> bool:
    """Tell if a tensor means in the other's dtype what it means in its own: codes are no values."""
    found = landing(dtype_name(tensor.dtype), dtype_name(into.dtype), buffer=True)
    return found in (Landing.CARRIED, Landing.CONVERTED)


def _checkpoint_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ConfigError(
            "reading checkpoints needs safetensors",
            where="this environment",
            expected="the extra `hf`",
            got=str(error),
            remedy="pip install 'weighbridge[hf]'",
        ) from error
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 safe_open is no mapping
                yield name, handle.get_tensor(name)
