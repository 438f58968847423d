"""Refusal of engines that cannot be driven: of versions that were not tried, of arguments that rule out a push, and of
weights in the trainer's own memory."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from bridge.errors import ConfigError, some_names

TRIED = {"vLLM": ((0, 32), (0, 33)), "SGLang": ((0, 5, 23), (0, 5, 24))}
"""Package -> the oldest version that was tried, and the next one, which was not. vLLM's hooks change from one minor
version to the next, the inner calls of SGLang's scheduler between patches."""


def require_version(package: str, version: str) -> None:
    """Check the version of an engine's package, when a bridge attaches to it or starts it. Raises ConfigError for one
    outside the range that was tried."""
    oldest, first_unknown = TRIED[package]
    found = re.match(r"\d+(?:\.\d+)*", version)
    numbers = tuple(map(int, found.group().split("."))) if found else ()
    if not oldest <= numbers[: len(oldest)] < first_unknown:
        low, high = (".".join(map(str, each)) for each in (oldest, first_unknown))
        raise ConfigError(
            f"this version of {package} has not been tried",
            where=package.lower(),
            expected=f">={low},<{high}",
            got=version,
            remedy="install a version in this range, or a newer weighbridge",
        )


def refuse_arguments(found: Iterable[tuple[str, str, str, str]]) -> None:
    """Raise ConfigError for the first engine argument that rules out a push: its name, the reason, what a push needs,
    and its value."""
    for name, reason, expected, got in found:
        raise ConfigError(
            reason,
            where=name,
            expected=expected,
            got=got,
            remedy=f"start the engine without {name}",
        )


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
            where=some_names(shared),
            expected=f"an {engine} with weights of its own",
            got=f"{len(shared)} tensors at the same address on both sides",
            remedy=remedy,
            names=tuple(shared),
        )
