"""Bake a plan: trace the engine's own loader once, to see where every element of a checkpoint goes.

`bake` runs the loader of a meta skeleton on meta stand-ins of the announced tensors under a `Recorder`; the recorded
moves are the plan, and interval arithmetic proves that each engine element is written exactly once. Nothing here
touches a live weight; it runs once per plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from bridge.errors import BridgeError, ConfigError, MissingTensor, UnexpectedTensor
from bridge.model.manifest import TensorInfo
from bridge.model.regions import (
    Coverage,
    Move,
    RankPlan,
    Region,
    dense,
    dest_coverage,
    source_coverage,
)
from bridge.model.torch_dtypes import DTYPES
from engine_side.plan import loader_errors
from engine_side.plan.targets import Targets
from engine_side.plan.trace import Trace, offer_each, stand_in, stand_ins, trace
from engine_side.plan.unplaced import Unplaced, find_unplaced, target_paths
from engine_side.protocol import NamesUnloaded, RankHost


@dataclass(frozen=True)
class Baked:
    """The plan of one rank, with the facts about it that the driver needs.

    Attributes:
        plan: the moves; `targets` says which module holds what.
        targets: every place of the skeleton, also those that a partial plan leaves out.
        infos: the tensors that it was baked for.
        dtypes: sent tensor -> wire name of the dtype it lands in; absent when it lands in several.
        unread: names that this rank has no place for: another rank may. `unplaced`: what it has where they would go.
        followers: names that were not sent, and change with a sent tensor to which this rank ties them -> that tensor.
        read: source regions of tensors that this rank reads only in part.
        computed: target -> the tensors that the engine's loader computes it from.
        problems: errors that make the plan unusable, most telling first. Empty in a sound plan.
        partial: a subset of the model was meant.
        skeleton: the one on which the loader was traced, so that all of its stand-ins are loaded.
        unloaded: targets of the skeleton that no checkpoint fills, or only with values that the engine keeps; they are
            not part of the plan.
    """

    plan: RankPlan
    targets: Targets
    infos: tuple[TensorInfo, ...]
    dtypes: dict[str, str]
    unread: tuple[str, ...]
    unplaced: Unplaced
    followers: Mapping[str, str]
    read: dict[str, tuple[Region, ...]]
    computed: dict[str, tuple[str, ...]]
    problems: tuple[BridgeError, ...]
    partial: bool
    skeleton: nn.Module
    unloaded: frozenset[str] = frozenset()

    @cached_property
    def coverage(self) -> Coverage:
        """Holes and overlaps per target, empty in a sound plan."""
        return dest_coverage(self.plan)


def bake(
    host: RankHost,
    infos: Sequence[TensorInfo],
    *,
    partial: bool = False,
    unsent: Sequence[str] = (),
    kept: AbstractSet[str] = frozenset(),
) -> Baked:
    """Trace the loader of `host` on the announced tensors. Once per plan; milliseconds, no weight memory.

    Args:
        infos: names, wire dtypes and global shapes of the tensors.
        partial: a subset of the model is meant: elements that nothing reaches are no problem.
        unsent: names of what the trainer has besides.
        kept: those of `infos` that are the engine's own. A module that nothing else reaches is left alone; where
            several of them fill one place, the last does, as when the engine loads them.

    Weights that do not fit are not raised but listed in `Baked.problems`. Raises ConfigError when the loader fails and
    no tensor explains it; OutOfMemory.
    """
    wanted = tuple(infos)
    first, refused = _trace_around(host, wanted)
    used = {move.tensor for move in first.moves}
    offenders = loader_errors.explain_refusals(host, refused, stand_ins(wanted) if refused else {}, used, trace)
    found, placed = _offer_aliases(host, wanted, first, offenders)
    alone = _reached_by_these_alone(found, kept)
    found = replace(found, moves=tuple(m for m in _last_of(found.moves, kept) if m.target not in alone))
    computed = _computed_from(host, wanted, found, offenders)
    reached = {move.target for move in found.moves}.union(found.tainted)
    unloaded = alone | (host.unloaded() - reached if isinstance(host, NamesUnloaded) else frozenset[str]())
    plan = _plan(found, partial, unloaded)
    # codes without a place for their scales: that the scales have none leads nowhere, so it comes second
    problems: list[BridgeError] = list(loader_errors.dtype_errors(plan, computed, wanted))
    problems.extend(error for name, error in offenders.items() if name not in kept)  # nobody sent those
    problems.extend(loader_errors.broadcast_errors(plan.moves, wanted))
    problems.extend(loader_errors.coverage_errors(plan, dest_coverage(plan), wanted, partial))
    sources = {path: _sources_of(path, found, computed) for path in found.tainted}
    misfits = {name for name, error in offenders.items() if not isinstance(error, UnexpectedTensor)}
    used = {move.tensor for move in plan.moves}.union(misfits, *sources.values())
    unread = [i.name for i in wanted if i.name not in used and math.prod(i.shape) > 0]
    if not any(isinstance(problem, MissingTensor) for problem in problems):
        unread += _unplaced_aliases(host, wanted, found, placed)
    places, filled = found.targets.tensors, _filled(plan)
    unplaced = find_unplaced(unread, found.skeleton, places, filled, used) if unread else Unplaced()
    besides = find_unplaced(unsent, found.skeleton, places, filled, used) if unsent else Unplaced()
    return Baked(
        plan=plan,
        targets=found.targets,
        infos=wanted,
        dtypes=_landing_dtypes(plan),
        unread=tuple(unread),
        unplaced=unplaced,
        followers=besides.partners,
        read=_partly_read(wanted, plan.moves, sources),
        computed=sources,
        problems=loader_errors.merge_names(problems),
        partial=partial,
        skeleton=found.skeleton,
        unloaded=unloaded,
    )


def _sources_of(path: str, found: Trace, computed: Mapping[str, frozenset[str]]) -> tuple[str, ...]:
    """Name the tensors that a target is computed from; where none is known, those of the others of its module."""
    known = computed[path].union(found.beside.get(path, ()), (m.tensor for m in found.moves if m.target == path))
    module = path.rpartition(".")[0]
    return tuple(sorted(known or {m.tensor for m in found.moves if m.target.rpartition(".")[0] == module}))


def _trace_around(host: RankHost, infos: tuple[TensorInfo, ...]) -> tuple[Trace, dict[str, loader_errors.LoaderRaised]]:
    """Trace, leaving out the tensors at which the loader raises; returns those with what it raised."""
    weights = stand_ins(infos)
    refused: dict[str, loader_errors.LoaderRaised] = {}
    while True:
        left = {name: weight for name, weight in weights.items() if name not in refused}
        try:
            return trace(host, left), refused
        except loader_errors.LoaderRaised as raised:
            if raised.tensor is None or raised.tensor not in left:
                raise ConfigError(
                    "the engine's own loader failed, and no tensor explains it",
                    where=type(host.model).__name__,
                    expected="a loader that takes the checkpoint's tensors",
                    got=f"{type(raised.error).__name__}: {raised.error}",
                    remedy="load the same checkpoint into this engine to see its own error",
                ) from raised.error
            refused[raised.tensor] = raised
            refused.update(offer_each(host, {n: w for n, w in left.items() if n != raised.tensor}).refused)


def _offer_aliases(
    host: RankHost, infos: tuple[TensorInfo, ...], first: Trace, offenders: Mapping[str, BridgeError]
) -> tuple[Trace, frozenset[str]]:
    """Offer tied tensors under their other names, for an engine that does not tie what the trainer ties; returns also
    the names that it takes."""
    aliases = [(alias, info) for info in infos for alias in info.aliases if info.name not in offenders]
    open_elements = sum(dest_coverage(_plan(first, False)).holes.values()) if aliases else 0
    owner = {alias: info.name for alias, info in aliases}
    offered = {name: w for name, w in stand_ins(infos).items() if name not in offenders}
    best, placed = first, set[str]()
    for alias, info in aliases:
        if not open_elements:
            break
        attempt = {**offered, alias: stand_in(info)}
        try:
            found = trace(host, attempt)
        except loader_errors.LoaderRaised:
            continue  # an unknown alias is no error: nobody sent it as a tensor of its own
        coverage = dest_coverage(_plan(found, False))
        left = sum(coverage.holes.values())
        if left < open_elements and not coverage.overlaps:
            best, offered, open_elements = found, attempt, left
            placed.add(alias)
    moves = tuple(Move(owner.get(m.tensor, m.tensor), m.source, m.target, m.dest) for m in best.moves)
    return replace(best, moves=moves), frozenset(placed)


def _unplaced_aliases(host: RankHost, infos: tuple[TensorInfo, ...], found: Trace, placed: frozenset[str]) -> list[str]:
    """List the names that the checkpoint has beside the one under which a tensor travels, and for which this rank has
    no place: neither takes its loader them, nor are they other paths of what the tensor fills."""
    shared = {alias: info for info in infos for alias in info.shared if alias not in placed}
    asked = {alias: info for alias, info in shared.items() if math.prod(info.shape) > 0}
    if not asked:
        return []
    filled = {move.target: move.tensor for move in found.moves}
    paths = target_paths(found.skeleton, found.targets.tensors)
    for alias in [a for a, info in asked.items() if filled.get(paths.get(a, "")) == info.name]:
        del asked[alias]
    weights = {a: stand_in(info) for a, info in asked.items()}
    taken = offer_each(host, weights).taken if weights else frozenset[str]()
    return [alias for alias in asked if alias not in taken]


def _filled(plan: RankPlan) -> dict[str, str]:
    """Map each target to the sent tensor that fills it, where it is one alone."""
    by_target: dict[str, set[str]] = {}
    for move in plan.moves:
        by_target.setdefault(move.target, set()).add(move.tensor)
    return {target: next(iter(names)) for target, names in by_target.items() if len(names) == 1}


def _computed_from(
    host: RankHost, infos: tuple[TensorInfo, ...], found: Trace, offenders: Mapping[str, BridgeError]
) -> dict[str, frozenset[str]]:
    """Map each target whose values cannot be followed to the tensors that they come from, by loading one at a time."""
    fed: dict[str, set[str]] = {path: set() for path in found.tainted}
    moved = {move.tensor for move in found.moves} if fed else set()
    for name, weight in stand_ins(infos).items() if fed else ():
        if name in moved or name in offenders:
            continue
        try:
            alone = trace(host, {name: weight})
        except loader_errors.LoaderRaised:
            continue
        for path in alone.tainted:
            fed.setdefault(path, set()).add(name)
    return {path: frozenset(names) for path, names in fed.items()}


def _reached_by_these_alone(found: Trace, kept: AbstractSet[str]) -> frozenset[str]:
    """Find the targets in modules that no tensor but kept ones reaches."""
    others = {move.target for move in found.moves if move.tensor not in kept}.union(found.tainted)
    held = {move.target for move in found.moves if move.tensor in kept} - others
    modules = (places for places in found.targets.of_module().values() if held.intersection(p.target for p in places))
    alone = [places for places in modules if others.isdisjoint(place.target for place in places)]
    return frozenset(place.target for places in alone for place in places if place.target in held)


def _last_of(moves: Sequence[Move], kept: AbstractSet[str]) -> tuple[Move, ...]:
    """Leave out moves of kept tensors over which a later one of them writes."""
    last = {(move.target, move.dest): k for k, move in enumerate(moves) if move.tensor in kept}
    return tuple(m for k, m in enumerate(moves) if m.tensor not in kept or last[m.target, m.dest] == k)


def _plan(found: Trace, partial: bool, unloaded: frozenset[str] = frozenset()) -> RankPlan:
    targets, fills = found.targets.targets, found.fills
    if partial:
        touched = {move.target for move in found.moves}.union(found.tainted)
        targets = tuple(t for t in targets if t.path in touched)
    elif unloaded:
        targets = tuple(t for t in targets if t.path not in unloaded)
    if partial or unloaded:
        kept = {t.path for t in targets}
        fills = tuple(f for f in fills if f.target in kept)
    return RankPlan(targets, found.moves, fills, dict(found.tainted))


def _landing_dtypes(plan: RankPlan) -> dict[str, str]:
    """Map tensors to the one dtype of all targets that they land in, where there is one that can travel."""
    known = {t.path: t.dtype for t in plan.targets}
    landing: dict[str, set[str]] = {}
    for move in plan.moves:
        landing.setdefault(move.tensor, set()).add(known[move.target])
    return {name: next(iter(found)) for name, found in landing.items() if len(found) == 1 and found <= DTYPES.keys()}


def _partly_read(
    infos: tuple[TensorInfo, ...], moves: tuple[Move, ...], computed: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[Region, ...]]:
    """Map tensors that this rank reads only in part to the regions that it reads."""
    regions: dict[str, list[Region]] = {}
    for move in moves:  # elements that a broadcast reads several times count once
        kept = [(n, s) for n, s in zip(move.source.shape, move.source.strides, strict=True) if s or n == 1]
        once = Region(move.source.offset, tuple(n for n, _ in kept), tuple(s for _, s in kept))
        regions.setdefault(move.tensor, []).append(once)
    whole = {name for names in computed.values() for name in names}
    sizes = {i.name: math.prod(i.shape) for i in infos if i.name in regions and i.name not in whole}
    shapes = {i.name: dense(i.shape) for i in infos}
    sizes = {name: size for name, size in sizes.items() if shapes[name] not in regions[name]}  # read whole at once
    used = [(name, region) for name in sizes for region in regions[name]]
    return {name: tuple(regions[name]) for name in source_coverage(sizes, used)}
