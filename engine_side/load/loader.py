"""Bake once, apply many: a sealed version in the local arena becomes live weights.

`Loader(host, tensors)` bakes and finds strategies; `map` compiles the plan onto an arena's slots into pairs of views;
`apply` then copies. The steady state walks no module tree and matches no name: it checks that bound tensors lie where
they lay, runs precomputed work lists on threads, and repeats post-load for the modules that need it. One thread at a
time; blocks; no collectives of its own (an engine's post-load may have some, so all ranks apply together).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from operator import is_

import torch

from bridge.errors import BridgeError, ConfigError, MissingTensor, ProtocolError
from bridge.model.manifest import Manifest, TensorInfo
from bridge.protocol.rank_jobs import RankBake
from bridge.shm.memcpy import uncollected
from engine_side.live.forward_caches import ForwardCaches
from engine_side.live.inplace import AttributeSnapshot, Outcome, held
from engine_side.live.module_tree import BoundModules, Replaced
from engine_side.load.arena_views import ArenaViews
from engine_side.load.copies import CopyBatch, CopyPair, batches, pair, run_all
from engine_side.load.explain import explain
from engine_side.load.sources import ArenaSlot, CanonicalTensors
from engine_side.plan.bake import Baked, bake, bind, side_by_side, stand_ins
from engine_side.plan.experiment_errors import experiment_step
from engine_side.plan.loader_errors import LOADER_ERRORS
from engine_side.plan.quant_groups import find_incomplete_groups
from engine_side.plan.strategies import ModuleStrategy, Strategy, StrategyTable, decide
from engine_side.plan.twins import Cluster, Twin, graft, redo
from engine_side.protocol import RankHost


@dataclass(frozen=True)
class LoadOutcome:
    """What one `apply` did.

    Attributes:
        written: bytes copied into live or temporary storage, or packed from the arena.
        rebound: "module.name" of parameters whose storage moved; `created`: of those that were not there before.
        post_loaded: modules whose post-load step ran again.
        dropped: "module.name" of what forwards had kept of the former weights, and will make again.
    """

    written: int
    rebound: tuple[str, ...]
    created: tuple[str, ...]
    post_loaded: tuple[str, ...]
    load_s: float
    postload_s: float
    dropped: tuple[str, ...] = ()


@dataclass(slots=True)
class _BoundTensor:
    """A live tensor and where it lay when views of it were made; `path` is "module.name"."""

    path: str
    registry: Mapping[str, object]
    name: str
    tensor: torch.Tensor
    address: int

    def moved(self) -> bool:
        return self.registry.get(self.name) is not self.tensor or self.tensor.data_ptr() != self.address


@dataclass
class _Compiled:
    """Work lists of one slot."""

    pairs: list[CopyPair]
    batches: list[CopyBatch]
    constants: list[tuple[str, torch.Tensor, float]]


@dataclass
class _Map:
    """A plan on an arena. `slots` keep the mapping's tensors alive."""

    manifest: Manifest
    slots: list[ArenaSlot]
    index: Mapping[str, int]
    direct: dict[int, _Compiled] = field(default_factory=dict)
    readable: dict[int, dict[str, list[CopyPair]]] = field(default_factory=dict)


class Loader:
    """One rank's way from the arena into its live model.

    Args:
        host: the engine's rank half.
        tensors: what the trainer announced; baked at once.
        partial: a subset of the model is meant; the rest stays untouched.
        threads: how many threads copy and compare; torch's own thread count is left alone.

    `baked.problems` is filled instead of raising for weights that do not fit; such a loader can do nothing else.
    Raises ConfigError when a module has no strategy or the live model is not what the skeleton becomes.
    """

    def __init__(
        self, host: RankHost, tensors: Sequence[TensorInfo], *, partial: bool = False, threads: int = 1
    ) -> None:
        self.host = host
        self.threads = max(1, threads)
        with uncollected():
            self.baked: Baked = bake(host, tensors, partial=partial)
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="weighbridge-load")
        # A tensor that does not fit explains what is missing; what is torn says more about it than a hole does.
        holes = [problem for problem in self.baked.problems if isinstance(problem, MissingTensor)]
        others = [problem for problem in self.baked.problems if not isinstance(problem, MissingTensor)]
        self.problems: tuple[BridgeError, ...] = (*others, *find_incomplete_groups(self.baked), *holes)
        self._map: _Map | None = None
        self._lender: ArenaViews | None = None
        self._touched = False
        if self.problems:
            return
        with uncollected():
            self.decided: StrategyTable = decide(host, self.baked)
        self.problems = tuple(_packed_in_part(self.baked, self.decided))
        self.canonical = CanonicalTensors(self.baked, self.decided, self.pool, self.threads)
        self._rebuilt = [c for c in self.decided.choices.values() if not c.direct]
        self._feeds: dict[str, frozenset[int]] = {}
        template = self.decided.twins.template
        self.derived = tuple(bind(template, host.model, self.decided.derived).items())
        """(path, live module) of those without weights whose post-load step derives something from others."""
        self.sources_of = {path: self._around(path) for path, _ in self.derived}
        """Path of a derived module -> those that it may derive something from."""
        self.caches = self._forward_caches()
        self._tree = BoundModules(host.model, (*self.decided.live.values(), *(module for _, module in self.derived)))
        self._moved: dict[str, None] = {}

    def close(self) -> None:
        """Stop the threads and let go of the arena. Idempotent."""
        if self._map is not None:
            self.canonical.map((), {})
        self._map = None
        self._lend_from(None)
        self.pool.shutdown(wait=True)

    # ---- what the driver asks ----------------------------------------------------------------------------------------

    def check(self) -> Loader:
        """Raises the first problem of the plan."""
        if self.problems:
            raise self.problems[0]
        return self

    def rank_bake(self) -> RankBake:
        """The answer to a BakeJob. Raises the first problem of the plan."""
        self.check()
        baked = self.baked
        return RankBake(
            digest=baked.plan.digest,
            dtypes=baked.dtypes,
            unread=baked.unread,
            read=baked.read,
            strategies=self.decided.counts(),
            native=self.decided.native,
            moves=len(baked.plan.moves),
        )

    def explain(self, name: str) -> tuple[dict[str, str], ...]:
        """Where one canonical tensor goes: a row per move (tensor, parameter, regions, module, strategy, reason)."""
        return explain(self.baked, self.canonical, name)

    def replaced(self) -> list[Replaced]:
        """Where the live tree has other modules than those that the plan was bound to. About 60 ns per module."""
        return self._tree.replaced(self.host.model)

    def gone(self) -> list[tuple[str, frozenset[int]]]:
        """("module.name", manifest indices) of live parameters that are no longer there, as of the last look."""
        return [
            (f"{choice.path}.{name}", self._sources(self.decided.clusters[choice.path].targets[role]))
            for choice, name, role in self._absent
        ]

    def _sources(self, target: str) -> frozenset[int]:
        return frozenset(self.mapped.index[move.tensor] for move in self.canonical.moves.get(target, ()))

    def lost(self, replaced: Iterable[Replaced]) -> list[ModuleStrategy]:
        """The modules of the plan that hang, or hung, below what was replaced."""
        below = self._tree.below(replaced)
        return [c for c in self.decided.choices.values() if id(self.decided.live[c.path]) in below]

    def require_bound(self) -> None:
        """Raises ConfigError when a module was replaced since the plan was made: what is written to the former one
        reaches no output."""
        found = self.replaced()
        if found:
            first, more = found[0], f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise ConfigError(
                "a module of the engine was replaced after it was attached",
                where=f"{first.path or 'the root module'}{more}",
                expected=first.expected,
                got=first.got,
                remedy="close this bridge and attach the engine again",
                names=tuple(each.path for each in found),
            )

    # ---- compile -----------------------------------------------------------------------------------------------------

    def map(self, manifest: Manifest, slots: Iterable[ArenaSlot], lender: ArenaViews | None = None) -> None:
        """Compile the plan onto the versions of an arena: `slots[k]` are the tensors of slot k in manifest order.

        The tensors must stay mapped until the next `map` or `close`. With a `lender`, which the loader then closes,
        large weights that the engine packs are packed from where they lie.

        Raises ProtocolError for a manifest that lacks a tensor of the plan or has it in another shape.
        """
        self.check()
        for info in self.baked.infos:
            spec = manifest.by_name.get(info.name)
            if spec is None or spec.shape != info.shape:
                raise ProtocolError(
                    "the arena's manifest is not the plan's",
                    where=info.name,
                    expected=f"shape {list(info.shape)}",
                    got="absent" if spec is None else f"shape {list(spec.shape)}",
                )
        index = {spec.name: k for k, spec in enumerate(manifest.tensors)}
        self._lend_from(lender)
        with uncollected():
            self._compile_all(_Map(manifest, [list(slot) for slot in slots], index))

    def _compile_all(self, mapped: _Map) -> None:
        self._map, index = mapped, mapped.index
        self.canonical.map(mapped.slots, index)
        self._feeds = {c.path: self._fed_by(c, index) for c in self.decided.choices.values()}
        bound = {id(module) for module in self.decided.live.values()}
        self.snapshot = AttributeSnapshot.take(self.host.model, bound)
        self._watch()
        for slot in range(len(mapped.slots)):
            self._compile(slot)

    @property
    def mapped(self) -> _Map:
        """The current mapping. Raises ConfigError before `map`."""
        if self._map is None:
            raise ConfigError("this plan is not mapped onto an arena yet")
        return self._map

    def _watch(self) -> None:
        self._watches: list[_BoundTensor] = []
        self._absent: list[tuple[ModuleStrategy, str, int]] = []
        for choice in self.decided.choices.values():
            module = self.decided.live[choice.path]
            for name, role in self.canonical.places(choice):
                tensor = held(module, name)
                if tensor is None and choice.direct and choice.stored[name].readable:
                    self._absent.append((choice, name, role))
                if choice.direct and tensor is not None:
                    registries = (module._parameters, module._buffers, module.__dict__)
                    registry = next(r for r in registries if r.get(name) is tensor)
                    path = f"{choice.path}.{name}"
                    self._watches.append(_BoundTensor(path, registry, name, tensor, tensor.data_ptr()))
        self._bound = [watch.tensor for watch in self._watches]
        self._addresses = [watch.address for watch in self._watches]
        self._written = frozenset(self._addresses)

    def _in_place(self) -> bool:
        """Do all bound tensors hang and lie where they did? About 0.4 us each."""
        if any(held(self.decided.live[choice.path], name) is not None for choice, name, _ in self._absent):
            return False
        now = [watch.registry.get(watch.name) for watch in self._watches]
        return all(map(is_, now, self._bound)) and [t.data_ptr() for t in self._bound] == self._addresses

    def _compile(self, slot: int) -> None:
        """Pairs for everything that is written straight into live storage."""
        direct = [c for c in self.decided.choices.values() if c.direct]
        pairs = list(self._pairs(direct, slot))
        self.mapped.direct[slot] = _Compiled(pairs, batches(pairs, self.threads), list(self.constants()))
        self.mapped.readable.pop(slot, None)

    def _pairs(self, choices: Iterable[ModuleStrategy], slot: int) -> Iterable[CopyPair]:
        """A pair per move and live place; storage that two places share comes once."""
        seen: set[tuple[int, str]] = set()
        for choice in choices:
            module, cluster = self.decided.live[choice.path], self.decided.clusters[choice.path]
            for name, role in self.canonical.places(choice):
                stored, live = choice.stored[name], held(module, name)
                target = cluster.targets[role]
                if live is None or not stored.readable or (live.data_ptr(), target) in seen:
                    continue
                seen.add((live.data_ptr(), target))
                for move in self.canonical.moves.get(target, ()):
                    tensor = self.mapped.index[move.tensor]
                    sent = self.mapped.slots[slot][tensor]
                    for at, of in stored.locate(move.dest, move.source) or ():
                        made = pair(live, at, sent, of, tensor, target, choice.path)
                        if made is not None:
                            yield made

    def readable_pairs(self, slot: int) -> dict[str, list[CopyPair]]:
        """Module path -> pairs of all its tensors that can be read back, whatever the strategy."""
        cache = self.mapped.readable.get(slot)
        if cache is None:
            cache = {}
            compiled = self.mapped.direct.get(slot)
            known = () if compiled is None else compiled.pairs
            rest = self.decided.choices.values() if compiled is None else self._rebuilt
            for item in chain(known, self._pairs(rest, slot)):
                cache.setdefault(item.module, []).append(item)
            self.mapped.readable[slot] = cache
        return cache

    def constants(self) -> Iterable[tuple[str, torch.Tensor, float]]:
        """(target, live view, value) of every fill that lies in readable storage."""
        for choice in self.decided.choices.values():
            module, cluster = self.decided.live[choice.path], self.decided.clusters[choice.path]
            for name, role in self.canonical.places(choice):
                live, stored = held(module, name), choice.stored[name]
                for fill in self.canonical.fills.get(cluster.targets[role], ()):
                    if live is None:
                        continue
                    for at, _ in stored.locate(fill.dest, fill.dest) or ():
                        view = live.detach().as_strided(at.shape, at.strides, live.storage_offset() + at.offset)
                        yield cluster.targets[role], view, fill.value

    def feeds(self, path: str) -> frozenset[int]:
        """Manifest indices of the tensors that reach the module at `path`."""
        return self._feeds[path]

    # ---- apply -------------------------------------------------------------------------------------------------------

    def apply(self, slot: int, changed: Iterable[int] | None = None) -> LoadOutcome:
        """Make the live model hold the version in `slot`; with `changed` (manifest indices) only what these feed.

        After an error the live model is undefined: apply another version over it. Post-load runs once per touched
        module, after its last shard. Raises ConfigError, before anything is written, when a module was replaced.
        """
        began = time.perf_counter()
        self.require_bound()
        self.rebind_if_moved()
        moved, self._moved = tuple(self._moved), {}
        wanted = None if changed is None else set(changed)
        compiled = self.mapped.direct[slot]
        work = compiled.batches
        if wanted is not None:
            work = batches([p for p in compiled.pairs if p.tensor in wanted], self.threads)
        with torch.no_grad():
            run_all(self.pool, [batch.copy for batch in work])
            if wanted is None:
                for _, view, value in compiled.constants:
                    view.fill_(value)
        loaded = time.perf_counter()
        written = sum(batch.nbytes for batch in work)
        outcomes, post_loaded, more = self._rebuild(slot, wanted)
        rebound = (*moved, *(name for name, what in outcomes.items() if what is Outcome.REBOUND))
        created = tuple(name for name, what in outcomes.items() if what is Outcome.CREATED)
        dropped = self.caches.clear()
        done = time.perf_counter()
        return LoadOutcome(written + more, rebound, created, post_loaded, loaded - began, done - loaded, dropped)

    def apply_subset(self, slot: int, names: Iterable[str]) -> LoadOutcome:
        """`apply` for canonical names. Raises ConfigError for one that is not in the manifest."""
        try:
            return self.apply(slot, [self.mapped.index[name] for name in names])
        except KeyError as error:
            raise ConfigError("no such tensor in this plan", where=str(error)) from error

    def _rebuild(self, slot: int, wanted: set[int] | None) -> tuple[dict[str, Outcome], tuple[str, ...], int]:
        """Redo, twin and native modules, then the modules that derive something from what was touched."""
        outcomes: dict[str, Outcome] = {}
        done: list[str] = []
        written = 0
        self.canonical.begin(self._written)
        for choice in self._rebuilt:
            if wanted is not None and wanted.isdisjoint(self._feeds[choice.path]):
                continue
            with experiment_step("rebuilding a module", f"{choice.path} ({choice.cls})", memory_only=True):
                found, nbytes = self._rebuild_one(choice, slot)
            outcomes.update({f"{choice.path}.{name}": what for name, what in found.items()})
            written += nbytes
            done.append(choice.path)
        touched = {p for p, feeds in self._feeds.items() if wanted is None or not wanted.isdisjoint(feeds)}
        for path, module in self.derived:
            if not touched.isdisjoint(self.sources_of[path]):
                self.host.post_load(module)
                done.append(path)
        self.decided.twins.forget()
        if done:
            self.mapped.readable.clear()
        return outcomes, tuple(done), written

    def _rebuild_one(self, choice: ModuleStrategy, slot: int) -> tuple[dict[str, Outcome], int]:
        module = self.decided.live[choice.path]
        if choice.strategy is Strategy.REDO:
            return self._redo(choice, slot)
        twin, k = self.twin(choice, slot)
        return graft(twin.modules[k], twin.before[k], module), sum(
            t.numel() * t.element_size() for t in twin.modules[k].parameters(recurse=False)
        )

    def _redo(self, choice: ModuleStrategy, slot: int) -> tuple[dict[str, Outcome], int]:
        """Post-load again, on the module's own storages, copies, or what the arena lends."""
        lent = self._borrow(choice, slot)
        values = {**self.canonical.values(choice, slot, reuse=True, without=lent), **lent}
        lent.clear()
        nbytes = sum(v.numel() * v.element_size() for v in values.values())
        try:
            template = self.decided.twins.template.get_submodule(choice.path)
            return redo(self.host, self.decided.live[choice.path], template, values), nbytes
        finally:
            values.clear()
            if self._lender is not None:
                self._lender.settle()

    def _borrow(self, choice: ModuleStrategy, slot: int) -> dict[str, torch.Tensor]:
        """What post-load packs away, where the arena holds it whole."""
        lent: dict[str, torch.Tensor] = {}
        for name, stored in choice.stored.items():
            if self._lender is not None and not stored.readable:
                shown = self._lender.lend(self.canonical.in_one_piece(choice, name, slot))
                if shown is not None:
                    lent[name] = shown
        return lent

    def _lend_from(self, lender: ArenaViews | None) -> None:
        former, self._lender = self._lender, lender
        if former is not None:
            former.close()

    def rebind_if_moved(self) -> None:
        """Views of a storage that is no longer the live one would write into nowhere, and show nothing. Under which
        parameters the engine itself swapped the storage is the next load's to say; those that hold another object are
        none of these."""
        if self._in_place():
            return
        moved = [watch for watch in self._watches if watch.moved()]
        self._watch()
        for slot in range(len(self.mapped.slots)):
            self._compile(slot)
        self._moved |= {watch.path: None for watch in moved if watch.registry.get(watch.name) is watch.tensor}

    def _forward_caches(self) -> ForwardCaches:
        """Find what forwards of the live modules may have cached. What a loader or a post-load step sets is no cache."""
        with experiment_step("building a skeleton", type(self.host.model).__name__):
            fresh = self.host.skeleton()
        with suppress(*LOADER_ERRORS):
            self.host.load_weights(fresh, iter(stand_ins(self.baked.infos).items()))
        choices, derived = self.decided.choices, set(self.decided.derived)
        found = {path: choice.kept for path, choice in choices.items()}
        pairs = [each for each in side_by_side(fresh, self.host.model) if each[0] not in derived]
        return ForwardCaches(self.host.model, pairs, found)

    # ---- twins -------------------------------------------------------------------------------------------------------

    def twin(self, choice: ModuleStrategy, slot: int) -> tuple[Twin, int]:
        """A fresh twin of the module's cluster holding the version in `slot`, post-loaded; the module's index in it."""
        cluster = self.decided.clusters[choice.path]
        k = cluster.paths.index(choice.path)
        if choice.strategy is Strategy.NATIVE:
            return self._native_twin(choice, cluster, slot), k
        twin = self.decided.twins.take(self.decided.alike[choice.path], self.decided.live)
        with torch.no_grad():
            for role, target in enumerate(cluster.targets):
                place = next((m, n) for m, names in enumerate(cluster.places) for n, r in names.items() if r == role)
                into = held(twin.modules[place[0]], place[1])
                if into is not None:
                    self.canonical.fill_or_keep(cluster, role, target, into.detach(), slot)
        twin.post_load(self.host)
        return twin, k

    def _native_twin(self, choice: ModuleStrategy, cluster: Cluster, slot: int) -> Twin:
        """The engine's own loader, on a skeleton in which only this module has memory."""
        twins = self.decided.twins
        twins.forget()
        twin = twins.take((cluster,), self.decided.live)
        sources = [name for path in cluster.paths for name in self.baked.native_sources.get(path, ())]
        weights = {name: self.mapped.slots[slot][self.mapped.index[name]] for name in dict.fromkeys(sources)}
        with torch.no_grad():
            self.host.load_weights(twins.skeleton, iter(weights.items()))
        twin.post_load(self.host)
        return twin

    # ---- read back ---------------------------------------------------------------------------------------------------

    def read_back(self, into: ArenaSlot) -> tuple[str, ...]:
        """Write the live weights into a writable slot (the tensors in manifest order), as version 0.

        Returns the tensors whose values the live model no longer holds in canonical form (packed, cast, native), or
        holds in a dtype that the wire dtype cannot carry exactly. This rank writes only the regions it reads. Raises
        ConfigError when a module was replaced since the plan was made.
        """
        self.require_bound()
        lost: set[str] = {name for names in self.baked.native_sources.values() for name in names}
        slot = len(self.mapped.slots)
        self.mapped.slots.append(into)
        try:
            pairs = [p for items in self.readable_pairs(slot).values() for p in items]
        finally:
            self.mapped.slots.pop()
            self.mapped.readable.pop(slot, None)
        names = [spec.name for spec in self.mapped.manifest.tensors]
        lost |= {names[p.tensor] for p in pairs if torch.promote_types(p.live.dtype, p.sent.dtype) != p.sent.dtype}
        covered = {(p.tensor, p.target) for p in pairs}
        lost |= {m.tensor for m in self.baked.plan.moves if (self.mapped.index[m.tensor], m.target) not in covered}
        turned = [CopyPair(p.sent, p.live, p.tensor, p.target, p.module, _turn(p.run)) for p in pairs]
        with torch.no_grad():
            run_all(self.pool, [batch.copy for batch in batches(turned, self.threads)])
        return tuple(name for name in names if name in lost)

    # ---- small helpers -----------------------------------------------------------------------------------------------

    def _around(self, path: str) -> frozenset[str]:
        """The modules of the plan that a module without weights may derive something from: those that hang, under
        whichever name, below it or below its parent."""
        template = self.decided.twins.template
        below = {id(m) for m in template.get_submodule(path.rpartition(".")[0]).modules()}
        return frozenset(p for p in self.decided.choices if id(template.get_submodule(p)) in below)

    def _fed_by(self, choice: ModuleStrategy, index: Mapping[str, int]) -> frozenset[int]:
        """Manifest indices of the tensors that reach a module."""
        cluster = self.decided.clusters[choice.path]
        targets = {cluster.targets[role] for _, role in self.canonical.places(choice)}
        names = {m.tensor for target in targets for m in self.canonical.moves.get(target, ())}
        names.update(self.baked.native_sources.get(choice.path, ()))
        return frozenset(index[name] for name in names)


def _turn(run: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
    return None if run is None else (run[1], run[0], run[2])


def _packed_in_part(baked: Baked, decided: StrategyTable) -> Iterable[MissingTensor]:
    """A module whose storage is packed can only be rebuilt from all of its tensors."""
    if not baked.partial:
        return
    planned = {t.path for t in baked.plan.targets}
    for choice in decided.choices.values():
        cluster = decided.clusters[choice.path]
        names = cluster.places[cluster.paths.index(choice.path)]
        for name, role in names.items():
            target = cluster.targets[role]
            whole = target in planned and target not in baked.coverage.holes
            if choice.direct or whole or choice.stored[name].identity:
                continue
            yield MissingTensor(
                "a module whose storage is packed needs all of its tensors",
                where=f"{target} -> {choice.path} ({choice.cls})",
                expected="every tensor that feeds this module, or none",
                got=f"strategy {choice.strategy.value}: {choice.reason}",
                remedy="send the module's other tensors too",
                names=(target,),
            )
