"""Refusal of weights that the trainer and an engine hold in the same memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bridge.errors import ConfigError


def require_apart(
    tensors: Iterable[tuple[str, torch.Tensor]],
    storages: frozenset[int],
    engine: str = "engine",
    remedy: str = "clone one of them",
) -> None:
    """Check before a push that the engine's live tensors lie in none of the trainer's `storages` (data addresses).
    Storage without memory, as post-load leaves it, has no address. Raises ConfigError with the names of the shared."""
    addresses = {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors}
    shared = sorted(name for name, address in addresses.items() if address and address in storages)
    if shared:
        raise ConfigError(
            f"the trainer and the {engine} share storage",
            where=f"{', '.join(shared[:5])}{' ...' if len(shared) > 5 else ''}",
            expected=f"an {engine} with weights of its own",
            got=f"{len(shared)} tensors at the same address on both sides",
            remedy=remedy,
            names=tuple(shared),
        )
