"""Bake a plan: trace the engine's own loader once, to see where every element of a checkpoint goes.

`bake` runs the loader of a meta skeleton on meta stand-ins of the announced tensors under a `Recorder`; the recorded
moves are the plan, and interval arithmetic proves that each engine element is written exactly once. `bind` finds the
live module of each skeleton module by path. Nothing here touches a live weight; both run once per plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from bridge.errors import BridgeError, ConfigError, MissingTensor, OutOfMemory, UnexpectedTensor
from bridge.model.manifest import TensorInfo
from bridge.model.regions import (
    Coverage,
    Fill,
    Move,
    RankPlan,
    Region,
    TargetTensor,
    dense,
    dest_coverage,
    follow,
    source_coverage,
)
from bridge.model.torch_dtypes import DTYPES, dtype_of
from bridge.tracing.provenance import storage_key
from bridge.tracing.recorder import Recorder
from engine_side.live.inplace import twin_parameter, unregistered_tensors
from engine_side.live.storage_layout import is_dense, whole_view_key
from engine_side.plan import loader_errors
from engine_side.plan.experiment_errors import experiment_step
from engine_side.plan.unplaced import Standing, find_standing, target_paths
from engine_side.protocol import NamesUnloaded, RankHost


@dataclass(frozen=True)
class TargetPlace:
    """One name under which a skeleton module holds a target: `module` path, attribute `name`, the target's path."""

    module: str
    name: str
    target: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}" if self.module else self.name


@dataclass(frozen=True)
class Targets:
    """All parameters and persistent buffers of a skeleton; ties by storage are one target with several places.

    Attributes:
        mirrors: places of non-persistent buffers and plain attributes that a constructor made as views of a whole
            target. Where post-load gives the target other storage, its values go on being used here.
    """

    targets: tuple[TargetTensor, ...]
    places: tuple[TargetPlace, ...]
    tensors: Mapping[str, torch.Tensor]
    mirrors: tuple[TargetPlace, ...] = ()

    def with_buffers(self, buffers: Mapping[str, torch.Tensor]) -> Targets:
        """Add non-persistent buffers as targets."""
        if not buffers:
            return self
        wire = {dtype: name for name, dtype in DTYPES.items()}
        return replace(
            self,
            targets=(
                *self.targets,
                *(
                    TargetTensor(path, wire.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), True)
                    for path, tensor in buffers.items()
                ),
            ),
            places=(*self.places, *(TargetPlace(*_split(path), path) for path in buffers)),
            tensors={**self.tensors, **buffers},
        )

    def of_module(self, *, mirrors: bool = False) -> dict[str, tuple[TargetPlace, ...]]:
        """Group the places by module path, in the skeleton's order, with the mirrors at the end of each or without."""
        out: dict[str, list[TargetPlace]] = {}
        for place in (*self.places, *(self.mirrors if mirrors else ())):
            out.setdefault(place.module, []).append(place)
        return {path: tuple(places) for path, places in out.items()}


@dataclass(frozen=True)
class Baked:
    """The plan of one rank, with the facts about it that the driver needs.

    Attributes:
        plan: the moves; `targets` says which module holds what.
        targets: every place of the skeleton, also those that a partial plan leaves out.
        infos: the tensors that it was baked for.
        dtypes: sent tensor -> wire name of the dtype it lands in; absent when it lands in several.
        unread: names that this rank has no place for: another rank may. `standing`: what it has where they would go.
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
    standing: Standing
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


@dataclass(frozen=True)
class Trace:
    """The record of one run of a loader.

    Attributes:
        targets: with the non-persistent buffers that the loader has written, such as a weight plus one.
        tainted: targets whose values cannot be followed -> why; these buffers among them.
        beside: path of such a buffer -> the tensors that were copied into it on the way.
    """

    skeleton: nn.Module
    targets: Targets
    moves: tuple[Move, ...]
    fills: tuple[Fill, ...]
    tainted: Mapping[str, str]
    beside: Mapping[str, frozenset[str]] = field(default_factory=dict)


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
    standing = find_standing(unread, found.skeleton, places, filled, used) if unread else Standing()
    besides = find_standing(unsent, found.skeleton, places, filled, used) if unsent else Standing()
    return Baked(
        plan=plan,
        targets=found.targets,
        infos=wanted,
        dtypes=_landing_dtypes(plan),
        unread=tuple(unread),
        standing=standing,
        followers=besides.partners,
        read=_partly_read(wanted, plan.moves, sources),
        computed=sources,
        problems=loader_errors.merge_names(problems),
        partial=partial,
        skeleton=found.skeleton,
        unloaded=unloaded,
    )


def _split(path: str) -> tuple[str, str]:
    module, _, name = path.rpartition(".")
    return module, name


def stand_ins(infos: Sequence[TensorInfo]) -> dict[str, torch.Tensor]:
    """Make a contiguous meta tensor of the wire dtype and global shape for each announced tensor, by name."""
    return {i.name: torch.empty(i.shape, dtype=dtype_of(i.dtype), device="meta") for i in infos}


def collect_targets(skeleton: nn.Module, shared: frozenset[int] = frozenset()) -> Targets:
    """Collect the targets of a skeleton, in the order of its modules.

    A tensor that is not on meta is replaced by a meta one, so that tracing cannot write it. Raises ConfigError for one
    whose elements have gaps between them or share memory.

    Args:
        shared: addresses of storages that the live engine owns; skeleton tensors that lie there are left out.
    """
    targets: list[TargetTensor] = []
    places: list[TargetPlace] = []
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[tuple[int, int, tuple[int, ...], tuple[int, ...]], str] = {}
    wire = {dtype: name for name, dtype in DTYPES.items()}  # torch's own word for a dtype that only this engine uses
    for module_path, module in skeleton.named_modules():
        for name, tensor, buffer in own_tensors(module):
            if tensor.device.type != "meta":
                if tensor.untyped_storage().data_ptr() in shared:
                    continue
                tensor = twin_parameter(tensor, torch.empty_like(tensor, device="meta"))
                registry = module._buffers if buffer else module._parameters
                registry[name] = tensor
            path = f"{module_path}.{name}" if module_path else name
            if not is_dense(tensor):
                raise ConfigError(
                    "a parameter's elements do not fill one stretch of memory",
                    where=path,
                    expected="a dense tensor, in any order of its dimensions",
                    got=f"shape {list(tensor.shape)}, strides {list(tensor.stride())}",
                    remedy="give the module a parameter of its own: nn.Parameter(tensor.contiguous())",
                    names=(path,),
                )
            key = (tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())
            first = seen.setdefault(key, path) if tensor.numel() else path
            places.append(TargetPlace(module_path, name, first))
            if first == path:
                tensors[path] = tensor
                targets.append(
                    TargetTensor(path, wire.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), buffer)
                )
    return Targets(tuple(targets), tuple(places), tensors, tuple(_mirrors(skeleton, tensors)))


def _mirrors(skeleton: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[TargetPlace]:
    """Find the places that view a whole target in the order of its memory, without being a parameter themselves."""
    owners = {whole_view_key(tensor): path for path, tensor in tensors.items() if tensor.numel()}
    for module_path, module in skeleton.named_modules():
        for name, tensor in unregistered_tensors(module):
            target = owners.get(whole_view_key(tensor))
            if target is not None and is_dense(tensor):
                yield TargetPlace(module_path, name, target)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield (name, tensor, is a buffer) of the module's own parameters and persistent buffers."""
    for name, param in module._parameters.items():
        if param is not None:
            yield name, param, False
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer, True


def live_storages(model: nn.Module) -> frozenset[int]:
    """List the addresses of all storages that a live model's parameters and buffers use."""
    found = (*model.parameters(), *model.buffers())
    return frozenset(t.untyped_storage().data_ptr() for t in found if t.device.type != "meta")


def trace(host: RankHost, weights: Mapping[str, torch.Tensor]) -> Trace:
    """Run the loader once on a fresh skeleton. Raises LoaderRaised, which says at which tensor; OutOfMemory.

    What a loader finds wrong with the whole, after the last tensor, is no error: coverage tells what is missing.
    """
    with experiment_step("building a skeleton", type(host.model).__name__):
        skeleton = host.skeleton()
        targets = collect_targets(skeleton, live_storages(host.model))
        buffers = _buffers_beside(skeleton, targets)
    recorder = Recorder(weights, targets.tensors)
    with recorder:
        try:
            with experiment_step("tracing the engine's loader", type(host.model).__name__, memory_only=True):
                host.load_weights(skeleton, recorder.feed(iter(weights.items())))
        except OutOfMemory:
            raise
        except loader_errors.LOADER_ERRORS as error:
            if not recorder.streamed:
                raise loader_errors.LoaderRaised(error, recorder.current, targets.tensors, weights) from error
    beside = dict(_written_beside(recorder, buffers))
    return Trace(
        skeleton,
        targets.with_buffers({path: tensor for path, tensor in buffers.items() if path in beside}),
        tuple(recorder.moves),
        uncovered_fills(recorder),
        {**recorder.tainted, **dict.fromkeys(beside, "a buffer that the loader sets beside a parameter")},
        beside,
    )


def _written_beside(recorder: Recorder, buffers: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, frozenset[str]]]:
    """Find the buffers into which a loader has put anything that came from a sent tensor, with the tensors known."""
    for path, tensor in buffers.items():
        if recorder.derived(tensor):
            log = recorder.storages[storage_key(tensor)].log
            yield path, frozenset(write.name for write in log if write.name is not None)


def _buffers_beside(skeleton: nn.Module, targets: Targets) -> dict[str, torch.Tensor]:
    """Collect the non-persistent buffers of a skeleton that share no storage with a target."""
    held = {storage_key(tensor) for tensor in targets.tensors.values()}
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in skeleton.named_modules()
        for name, tensor in unregistered_tensors(module)
        if name in module._buffers and tensor.is_meta and tensor.numel() and is_dense(tensor)
        if storage_key(tensor) not in held
    }


def _sources_of(path: str, found: Trace, computed: Mapping[str, frozenset[str]]) -> tuple[str, ...]:
    """Name the tensors that a target is computed from; where none is known, those of the others of its module."""
    known = computed[path].union(found.beside.get(path, ()), (m.tensor for m in found.moves if m.target == path))
    module = path.rpartition(".")[0]
    return tuple(sorted(known or {m.tensor for m in found.moves if m.target.rpartition(".")[0] == module}))


def uncovered_fills(recorder: Recorder) -> tuple[Fill, ...]:
    """Subtract from the fills what moves wrote over: clearing a parameter before copying into it is no double write."""
    over: dict[str, list[Region]] = {}
    for move in recorder.moves:
        over.setdefault(move.target, []).append(move.dest)
    out: list[Fill] = []
    for fill in recorder.fills:
        rest = [fill.dest]
        for dest in over.get(fill.target, ()):
            split = [(region, follow(region, region, dest, dest)) for region in rest]
            rest = [out for region, hit in split for out in ([region] if hit is None else [o for o, _ in hit.outside])]
        out.extend(Fill(fill.target, region, fill.value) for region in rest)
    return tuple(out)


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


@dataclass(frozen=True)
class Offered:
    """The answer of a loader to each of some tensors: those of which elements went somewhere, and those at which it
    raised. The others it swallowed."""

    taken: frozenset[str]
    refused: Mapping[str, loader_errors.LoaderRaised]


def offer_each(host: RankHost, weights: Mapping[str, torch.Tensor]) -> Offered:
    """Find out which tensors the loader takes or refuses, however many: on one skeleton, it is called again after each
    that it raises at, with those that it has not taken yet. Raises OutOfMemory."""
    with experiment_step("building a skeleton", type(host.model).__name__):
        skeleton = host.skeleton()
        targets = collect_targets(skeleton, live_storages(host.model))
    recorder = Recorder(weights, targets.tensors)
    refused: dict[str, loader_errors.LoaderRaised] = {}
    left, seen = dict(weights), 0
    with recorder:
        while left:
            recorder.current = None
            try:
                with experiment_step("tracing the engine's loader", type(host.model).__name__, memory_only=True):
                    host.load_weights(skeleton, recorder.feed(iter(list(left.items()))))
                break
            except OutOfMemory:
                raise
            except loader_errors.LOADER_ERRORS as error:
                if recorder.streamed:
                    break
                raised = loader_errors.LoaderRaised(error, recorder.current, targets.tensors, weights)
            finally:
                for move in recorder.moves[seen:]:
                    left.pop(move.tensor, None)
                seen = len(recorder.moves)
            if raised.tensor is None or left.pop(raised.tensor, None) is None:
                break  # it fails for a reason that no tensor explains: the next trace says so
            refused[raised.tensor] = raised
    return Offered(frozenset(move.tensor for move in recorder.moves), refused)


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
        attempt = {**offered, alias: torch.empty(info.shape, dtype=dtype_of(info.dtype), device="meta")}
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
    weights = {a: torch.empty(info.shape, dtype=dtype_of(info.dtype), device="meta") for a, info in asked.items()}
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


# ---- binding -------------------------------------------------------------------------------------------------------


def bind(skeleton: nn.Module, live: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Find the live module of every skeleton path, walking through any chain of `base_layer` wrappers at each hop.

    Raises ConfigError, naming the path and the live class, where a hop is missing. Does not compare the names that the
    modules hold: post-load may have taken some away.
    """
    return {path: find_live(skeleton, live, path) for path in paths}


def find_live(skeleton: nn.Module, live: nn.Module, path: str) -> nn.Module:
    """Find the live counterpart of the skeleton module at `path`, without its wrappers."""
    here, there = skeleton, unwrap(live, skeleton)
    walked: list[str] = []
    for hop in path.split(".") if path else ():
        here = here.get_submodule(hop)
        child = there._modules.get(hop)
        if child is None:
            raise ConfigError(
                "the live model has no such module",
                where=path,
                expected=f"{type(here).__name__} at {'.'.join([*walked, hop])}",
                got=f"{type(there).__name__} with {', '.join(there._modules) or 'no children'}",
                remedy="start the engine anew, and attach before anything exchanges its modules",
            )
        there = unwrap(child, here)
        walked.append(hop)
    return there


def side_by_side(skeleton: nn.Module, live: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Walk two trees at once: (path, skeleton module, its live counterpart without wrappers), each live module once.

    Modules that only one of the trees has are left out.
    """
    seen: set[int] = set()
    todo = [("", skeleton, unwrap(live, skeleton))]
    while todo:
        path, here, there = todo.pop()
        if id(there) in seen:
            continue
        seen.add(id(there))
        yield path, here, there
        for hop, child in here._modules.items():
            found = there._modules.get(hop)
            if child is not None and found is not None:
                todo.append((f"{path}.{hop}" if path else hop, child, unwrap(found, child)))


def unwrap(live: nn.Module, skeleton: nn.Module) -> nn.Module:
    """Unwrap `live`; a skeleton module with a `base_layer` of its own is walked into by name instead."""
    while "base_layer" not in skeleton._modules:
        inner = live._modules.get("base_layer")
        if inner is None:
            return live
        live = inner
    return live
