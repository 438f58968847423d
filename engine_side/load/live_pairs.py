"""Pair what a version holds with the live storage that it belongs in: the work lists that are copied and compared.

Takes no decision and copies nothing: the plan and the strategies say what goes where, `copies.py` does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from bridge.model.regions import dense
from engine_side.live.inplace import find_tensor
from engine_side.load.copies import CopyPair, make_pair
from engine_side.load.sources import CanonicalTensors
from engine_side.plan.strategies import ModuleStrategy


def moved_pairs(canonical: CanonicalTensors, choices: Iterable[ModuleStrategy], slot: int) -> Iterator[CopyPair]:
    """Make a pair per move and live place; storage that two places share comes once."""
    seen: set[tuple[int, str]] = set()
    for choice in choices:
        for name, target, _ in canonical.parts(choice):
            stored, live = choice.stored[name], find_tensor(canonical.decided.live[choice.path], name)
            moved = stored.readable and target not in canonical.computed.sources
            if live is None or not moved or (live.data_ptr(), target) in seen:
                continue
            seen.add((live.data_ptr(), target))
            for move in canonical.moves.get(target, ()):
                sent = canonical.sent(move, slot)
                for at, of in stored.locate(move.dest, move.source) or ():
                    made = make_pair(live, at, sent, of, canonical.index[move.tensor], target)
                    if made is not None:
                        yield made


def computed_pairs(canonical: CanonicalTensors, choices: Iterable[ModuleStrategy], slot: int) -> Iterator[CopyPair]:
    """Make pairs of the computed targets: one for each tensor that a target is computed from, of the same views."""
    values = canonical.computed.buffers(slot)
    for choice in choices if values else ():
        for name, target, _ in canonical.parts(choice):
            stored, live = choice.stored[name], find_tensor(canonical.decided.live[choice.path], name)
            if target not in values or live is None or not stored.readable:
                continue
            whole = dense((values[target].numel(),))
            for at, of in stored.locate(whole, whole) or ():
                for source in canonical.computed.sources[target]:
                    made = make_pair(live, at, values[target], of, canonical.index[source], target)
                    if made is not None:
                        yield made


def live_pairs(canonical: CanonicalTensors, choices: Iterable[ModuleStrategy], slot: int) -> list[CopyPair]:
    """List the pairs of these modules, moved and computed, in the same order for every slot."""
    modules = list(choices)
    return [*moved_pairs(canonical, modules, slot), *computed_pairs(canonical, modules, slot)]


def live_constants(canonical: CanonicalTensors) -> Iterator[tuple[str, torch.Tensor, float]]:
    """Yield (target, live view, value) of every fill that lies in readable storage."""
    for choice in canonical.decided.choices.values():
        for name, target, _ in canonical.parts(choice):
            live, stored = find_tensor(canonical.decided.live[choice.path], name), choice.stored[name]
            if live is None or target in canonical.computed.sources:
                continue
            for fill in canonical.fills.get(target, ()):
                for at, _ in stored.locate(fill.dest, fill.dest) or ():
                    view = live.detach().as_strided(at.shape, at.strides, live.storage_offset() + at.offset)
                    yield target, view, fill.value
