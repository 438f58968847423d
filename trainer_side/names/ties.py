"""Find ties (names of one tensor) and check at each push that names which the bound model tied still are one tensor.

A tied tensor travels once, under one of its names. That is right only as long as the others are the same: a model that
was untied after it was bound has two tensors where one travels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bridge.errors import BridgeError, DuplicateTensor
from bridge.model.same_bits import same_bits
from trainer_side.names.naming import CanonicalMap
from trainer_side.names.tensor_checks import require_plain

NO_ADDRESS = -1
"""In a tie pattern: nothing to compare (no elements), or no values (meta), which the slow path tells apart."""


def tie_pattern(sources: Sequence[torch.Tensor], addresses: Sequence[int]) -> list[int]:
    """Return for each tensor the index of the first one that is the same elements of the same storage."""
    first: dict[Any, int] = {}
    keep = first.setdefault
    pattern = [keep(address, k) if address else NO_ADDRESS for k, address in enumerate(addresses)]
    if len(first) == len(addresses):
        return pattern
    for k, head in enumerate(pattern):
        if head not in (k, NO_ADDRESS):
            t = sources[k]
            same = (addresses[k], t.shape, t.stride(), t.dtype, t.device)
            h = sources[head]
            pattern[k] = head if same == (addresses[head], h.shape, h.stride(), h.dtype, h.device) else keep(same, k)
    return pattern


@dataclass(frozen=True, slots=True)
class Tie:
    """Two names that were one tensor when the model was bound, and the same names with wrappers."""

    kept: str
    alias: str
    raw_kept: str
    raw_alias: str


@dataclass(frozen=True, slots=True)
class TiesSent:
    """The bound model's ties that one layout relies on.

    Attributes:
        pairs: ties of which both names were pushed, as different storages: (tie, index of one, index of the other).
        unsent: ties of which one name was pushed; its value is used for both.
    """

    pairs: tuple[tuple[Tie, int, int], ...] = ()
    unsent: tuple[Tie, ...] = ()


def list_ties(known: CanonicalMap) -> tuple[Tie, ...]:
    """List the ties of a bound model."""
    raw = {clean: given for given, clean in known.raw.items()}
    return tuple(Tie(kept, alias, raw[kept], raw[alias]) for alias, kept in known.ties.items())


def sort_ties(
    ties: Sequence[Tie], index: Mapping[str, int], came: Mapping[str, int], pattern: Sequence[int]
) -> TiesSent:
    """Sort the bound model's ties by which of their names were pushed.

    Args:
        index: clean name -> position, of every name that was pushed.
        came: kept name -> position of the tensor that travels for it.
        pattern: of `tie_pattern`.
    """
    pairs, unsent = [], []
    for tie in ties:
        travels = came.get(tie.kept)
        if travels is None:
            continue
        if not {tie.kept, tie.alias} <= index.keys():
            unsent.append(tie)
        for name in (tie.kept, tie.alias):
            other = index.get(name, travels)
            if other != travels and (pattern[other] != pattern[travels] or pattern[other] == NO_ADDRESS):
                pairs.append((tie, travels, other))
    return TiesSent(tuple(pairs), tuple(unsent))


def check_ties(model: nn.Module, sent: TiesSent, sources: Sequence[torch.Tensor]) -> None:
    """Raise DuplicateTensor, naming both, when a tie of the bound model is two different tensors by now.

    Called at every push; a few look-ups per tie. Values are compared only where storages differ.
    """
    for tie, travels, other in sent.pairs:
        if not same_bits(sources[travels], sources[other]):
            raise _untied(tie, "the bound model ties two names, but they came as two different tensors")
    for tie in sent.unsent:
        kept, alias = _at(model, tie.raw_kept), _at(model, tie.raw_alias)
        if kept is not alias and kept is not None and alias is not None and _differ(kept, alias):
            raise _untied(tie, "the bound model no longer ties two names, and only one of them came")


def _differ(kept: torch.Tensor, alias: torch.Tensor) -> bool:
    """Compare two of the model's own tensors; False where one has no values here (ZeRO frees them between steps, FSDP
    shards them)."""
    try:
        a, b = require_plain("", kept), require_plain("", alias)
    except BridgeError:
        return False
    return bool(a.numel() and b.numel()) and not same_bits(a, b)


def _at(model: nn.Module, raw: str) -> torch.Tensor | None:
    """The parameter or buffer that the model has under a name now; None when its modules were exchanged for others."""
    path, _, name = raw.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


def _untied(tie: Tie, what: str) -> DuplicateTensor:
    return DuplicateTensor(
        what,
        where=f"{tie.kept} and {tie.alias}",
        expected="one tensor under both names, as when the model was bound",
        got="separate storages that hold different values",
        remedy="if the model was untied, bind it again (b.bind(model)); else tie it (model.tie_weights()) and push its "
        "named_parameters()",
        names=(tie.kept, tie.alias),
    )
