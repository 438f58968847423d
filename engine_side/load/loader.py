"""Bake once, apply many: a sealed version in the local arena becomes live weights.

`Loader(host, tensors)` bakes and finds strategies; `map` compiles the plan onto an arena's slots into pairs of views;
`apply` then copies. The steady state walks no module tree and matches no name: it checks that bound tensors lie where
they lay, runs precomputed work lists on threads, and repeats post-load for the modules that need it. One thread at a
time; blocks; no collectives of its own (an engine's post-load may have some, so all ranks apply together).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import nn

from bridge.errors import BridgeError, ConfigError, MissingTensor, ProtocolError, UnexpectedTensor
from bridge.model.manifest import Manifest, TensorInfo, lay_out
from bridge.model.regions import Region, dense
from bridge.protocol.rank_jobs import RankBake
from bridge.shm.arena import Seal
from bridge.shm.memcpy import uncollected
from engine_side.live.bindings import AttributeSnapshot, BoundModules, BoundTensors, Replaced
from engine_side.live.forward_caches import ForwardCaches
from engine_side.live.inplace import Outcome, TensorRegistry, find_registry, find_tensor
from engine_side.load.arena_views import ArenaViews
from engine_side.load.computed_targets import ComputedTargets
from engine_side.load.copies import (
    Comparison,
    CopyBatch,
    CopyPair,
    batches,
    compare_all,
    comparisons,
    copy_all,
    make_pair,
)
from engine_side.load.sources import ArenaSlot, CanonicalTensors
from engine_side.plan.bake import Baked, bake, bind, side_by_side
from engine_side.plan.experiment_errors import experiment_step
from engine_side.plan.quant_groups import find_incomplete_groups
from engine_side.plan.refusals import Feeders, listed, waiting_tensors, with_accepted_shape
from engine_side.plan.strategies import ModuleStrategy, Strategy, StrategyTable, decide
from engine_side.plan.twins import Role, Twin, graft, redo
from engine_side.protocol import RankHost
from engine_side.quantise.checkpoint_form import CheckpointForm, checkpoint_form
from engine_side.quantise.slots import QuantisedSlots


@dataclass(frozen=True)
class LoadOutcome:
    """The record of one `apply`.

    Attributes:
        written: bytes copied into live or temporary storage, or packed from the arena.
        rebound: "module.name" of parameters whose storage moved; `created`: of those that were not there before.
        dropped: "module.name" of forward caches that were cleared; the next forward computes them anew.
    """

    written: int
    rebound: tuple[str, ...]
    created: tuple[str, ...]
    load_s: float
    postload_s: float
    dropped: tuple[str, ...] = ()


@dataclass
class _DirectCopies:
    """Work lists of one slot: the copies that go straight into live storage, and (target, view, value) of constants."""

    pairs: list[CopyPair]
    batches: list[CopyBatch]
    constants: list[tuple[str, torch.Tensor, float]]


@dataclass
class _Readable:
    """The pairs of one slot that can be read back, and their comparisons, made when they are first compared."""

    pairs: list[CopyPair]
    comparisons: list[Comparison] | None = None


@dataclass
class ArenaMap:
    """A plan on an arena, empty before `map`. `slots` keep the mapping alive; `index` gives a tensor's place in one."""

    manifest: Manifest = field(default_factory=lambda: lay_out(()))
    slots: list[ArenaSlot] = field(default_factory=list)
    index: Mapping[str, int] = field(default_factory=dict)
    direct: dict[int, _DirectCopies] = field(default_factory=dict)
    readable: dict[int, _Readable] = field(default_factory=dict)


class Loader:
    """The way from the arena into the live model of one rank.

    Args:
        host: the engine's rank half.
        tensors: the tensors that the trainer announced; baked at once, in the form of the engine's checkpoint.
        partial: a subset of the model is meant; the rest stays untouched. `unsent`: names of that rest, if known.
        unknown_allowed: names for which there is no place are no problem if nothing is missing: the caller decides.
        threads: how many threads copy and compare; torch's own thread count is left alone.

    Attributes:
        problems: why weights do not fit; filled instead of raised. A loader with problems can do nothing else.
        form: what becomes of the announced tensors before the engine's loader gets them.
        codes: the codes and scales that this rank makes of the arena's values, once mapped.
        derived: (path, live module) of modules without weights whose post-load step derives something from others.
        sources_of: path of a derived module -> paths of the modules that it may derive something from.
        caches: the forward caches of the live model.
        modules: the modules of the live tree to which the plan is bound.
        rebuilt: the modules whose storage cannot be written directly.
        feeds: path of a module -> manifest indices of the tensors that reach it, once mapped.
        absent: ("module.name", manifest indices) of live parameters that were gone when the plan was last compiled.

    Raises ConfigError when a module has no strategy or the live model is not what the skeleton becomes; DtypeMismatch
    for values that the engine's quantiser cannot be reproduced for; OutOfMemory.
    """

    def __init__(
        self,
        host: RankHost,
        tensors: Sequence[TensorInfo],
        *,
        partial: bool = False,
        unsent: Sequence[str] = (),
        unknown_allowed: bool = False,
        threads: int = 1,
    ) -> None:
        self.host = host
        self.threads = max(1, threads)
        self.announced = tuple(tensors)
        self.form: CheckpointForm = checkpoint_form(host, tensors, partial)
        with uncollected():
            self.baked: Baked = bake(
                host, self.form.tensors, partial=partial, unsent=unsent, kept=self.form.kept.keys()
            )
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="weighbridge-load")
        # A tensor that does not fit explains what is missing; an incomplete group says more about it than a hole does.
        holes = [problem for problem in self.baked.problems if isinstance(problem, MissingTensor)]
        others = [problem for problem in self.baked.problems if not isinstance(problem, MissingTensor)]
        found: tuple[BridgeError, ...] = (
            *with_accepted_shape(host, self.baked, others),
            *find_incomplete_groups(self.baked, self.form.kept.keys()),
            *waiting_tensors(host, self.baked),
            *holes,
        )
        undecided = unknown_allowed and all(isinstance(problem, UnexpectedTensor) for problem in found)
        self.problems = () if undecided else found
        self.mapped = ArenaMap()
        self.codes: QuantisedSlots | None = None
        self._seal_of: Callable[[int], Seal | None] = lambda _: None
        self.began_to_write = False
        """The last `apply` came as far as live storage, whether or not it ended."""
        self._views: ArenaViews | None = None
        if self.problems:
            return
        with uncollected():
            self.decided: StrategyTable = decide(host, self.baked)
        self.computed = ComputedTargets(host, self.baked, self.decided)
        self.canonical = CanonicalTensors(self.baked, self.decided, self.computed, self.pool, self.threads)
        self.problems = tuple(self._packed_in_part()) if partial else ()
        self.rebuilt = [c for c in self.decided.choices.values() if not c.direct]
        self.feeds: dict[str, frozenset[int]] = {}
        template = self.decided.twins.template
        self.derived = tuple(bind(template, host.model, self.decided.derived).items())
        self.sources_of: dict[str, frozenset[str]] = {}
        for path, _ in self.derived:  # whatever hangs, under any name, below the module or below its parent
            around = {id(m) for m in template.get_submodule(path.rpartition(".")[0]).modules()}
            self.sources_of[path] = frozenset(
                p for p in self.decided.choices if id(template.get_submodule(p)) in around
            )
        kept = {path: choice.kept for path, choice in self.decided.choices.items()}
        pairs = [each for each in side_by_side(self.baked.skeleton, host.model) if each[0] not in self.decided.derived]
        self.caches = ForwardCaches(host.model, pairs, kept)  # what a loader or post-load sets is no cache
        self.modules = BoundModules(host.model, (*self.decided.live.values(), *(module for _, module in self.derived)))
        self._moved: dict[str, None] = {}

    def close(self) -> None:
        """Stop the threads and let go of the arena. Idempotent."""
        if not self.problems:
            self.canonical.map((), {})
        self.mapped, self.codes = ArenaMap(), None
        self._use_views(None)
        self.pool.shutdown(wait=True)

    def _packed_in_part(self) -> Iterator[MissingTensor]:
        """Find packed modules of a partial plan: they can only be rebuilt from all of their tensors."""
        planned = {t.path for t in self.baked.plan.targets}
        torn = [
            (choice, target)
            for choice in self.decided.choices.values()
            for name, target, _ in self.canonical.parts(choice)
            if not (choice.direct or choice.stored[name].identity)
            and not (target in planned and target in self.canonical.whole)
        ]
        feeders = Feeders.of(self.host, self.baked) if torn else None
        for choice, target in torn:
            targets = [target for _, target, _ in self.canonical.parts(choice)]
            unsent = [info.name for info in feeders.unsent(targets)] if feeders is not None else []
            absent = self.form.sendable(unsent)
            yield MissingTensor(
                "a module whose storage is packed needs all of its tensors",
                where=f"{target} -> {choice.path} ({choice.cls})",
                expected="every tensor that feeds this module, or none",
                got=f"strategy {choice.strategy.value}: {choice.reason}",
                remedy=f"push {listed(absent) or 'the other tensors of this layer'} too, or all of "
                "model.named_parameters()",
                names=absent or (target,),
            )

    # ---- what the driver asks ----------------------------------------------------------------------------------------

    def check(self) -> Loader:
        """Raise the first problem of the plan."""
        if self.problems:
            raise self.problems[0]
        return self

    def rank_bake(self) -> RankBake:
        """Summarise the plan: the answer to a BakeJob. Raises the first problem of the plan."""
        self.check()
        baked, choices, added = self.baked, self.decided.choices, self.form.owner
        casts = {name: weight.cast for name, weight in self.form.quantised.items()}
        return RankBake(
            digest=baked.plan.digest,
            dtypes={name: dtype for name, dtype in baked.dtypes.items() if name not in added} | casts,
            codes=tuple(sorted({weight.stored.weight.dtype for weight in self.form.quantised.values()})),
            unread=tuple(name for name in baked.unread if name not in added),
            placeholders=baked.standing.placeholders,
            partners=dict(baked.standing.partners),
            followers=dict(baked.followers),
            read={name: regions for name, regions in baked.read.items() if name not in added},
            strategies=dict(Counter([choice.strategy.value for choice in choices.values()])),
            moves=len(baked.plan.moves),
        )

    def explain(self, name: str) -> tuple[dict[str, str], ...]:
        """Describe which way one canonical tensor takes: a row per move of it, or of the tensor that it is an alias of.

        A row has tensor, parameter, source, dest, module, strategy and reason. No rows for a name that the plan lacks.
        """
        aliases = {alias: info.name for info in self.baked.infos for alias in info.aliases}
        sent = aliases.get(name, name)
        wanted = {sent, *(made for made, owner in self.form.owner.items() if owner == sent)}
        return tuple(
            {
                "tensor": name if tensor == sent else tensor,
                "parameter": f"{choice.path}.{attribute}",
                "source": source,
                "dest": dest,
                "module": choice.cls,
                "strategy": choice.strategy.value,
                "reason": choice.reason,
            }
            for choice in self.decided.choices.values()
            for attribute, target, role in self.canonical.parts(choice)
            for tensor in wanted
            for source, dest in self._ways(tensor, target, role)
        )

    def _ways(self, tensor: str, target: str, role: Role) -> Iterator[tuple[str, str]]:
        """Describe (source, dest) of every way from a tensor to a target."""
        if tensor in self.computed.sources.get(target, ()):
            yield "all of it, through the engine's loader", _describe(dense(role.shape))
            return
        for move in self.canonical.moves.get(target, ()):
            if move.tensor == tensor:
                yield _describe(move.source), _describe(move.dest)

    def modules_below(self, replaced: Iterable[Replaced]) -> list[ModuleStrategy]:
        """List the modules of the plan that hang, or hung, below replaced ones."""
        below = self.modules.below(replaced)
        return [c for c in self.decided.choices.values() if id(self.decided.live[c.path]) in below]

    def require_bound(self) -> None:
        """Raise ConfigError when a module was replaced since the plan was made: nothing would reach an output of it."""
        found = self.modules.replaced(self.host.model)
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

    def map(
        self,
        manifest: Manifest,
        slots: Iterable[ArenaSlot],
        views: ArenaViews | None = None,
        seal_of: Callable[[int], Seal | None] = lambda _: None,
    ) -> None:
        """Compile the plan onto the versions of an arena. Once per arena.

        Args:
            slots: the tensors of each slot in manifest order; they must stay mapped until the next `map` or `close`.
            views: shows large weights that the engine packs where they lie; the loader closes it.
            seal_of: reads the seal of a slot, by which unchanged weights need not be quantised again.

        Raises ProtocolError for a manifest that lacks a tensor of the plan or has it in another shape.
        """
        self.check()
        unread = frozenset(self.baked.unread)
        for info in self.announced:
            spec = manifest.by_name.get(info.name)
            if info.name in unread:
                continue
            if spec is None or spec.shape != info.shape:
                raise ProtocolError(
                    "the arena's manifest is not the plan's",
                    where=info.name,
                    expected=f"shape {list(info.shape)}",
                    got="absent" if spec is None else f"shape {list(spec.shape)}",
                    remedy="push again: the daemon then makes a plan for the tensors that are sent now",
                )
        index = {spec.name: k for k, spec in enumerate(manifest.tensors)}
        index.update({name: index[owner] for name, owner in self.form.owner.items()})
        self._use_views(views)
        self._seal_of = seal_of
        with uncollected():
            self.mapped = ArenaMap(manifest, [list(slot) for slot in slots], index)
            self.codes = self._quantised_slots() if self.form.quantised or self.form.kept else None
            self.canonical.map(self.mapped.slots, index, () if self.codes is None else self.codes.made)
            for choice in self.decided.choices.values():
                names = [self.canonical.tensors_of(target) for _, target, _ in self.canonical.parts(choice)]
                self.feeds[choice.path] = frozenset(index[name] for each in names for name in each)
            bound = {id(module) for module in self.decided.live.values()}
            self.snapshot = AttributeSnapshot(self.host.model, bound)
            self._bind_tensors()

    def _quantised_slots(self) -> QuantisedSlots:
        used = frozenset(move.tensor for move in self.baked.plan.moves).union(*self.baked.computed.values())
        return QuantisedSlots(self.form, used, self.mapped.index, len(self.mapped.slots))

    def prepare(self, slot: int) -> None:
        """Make the codes of a slot fit its values, where this engine's weights are quantised. Blocks for the weights
        that changed. Called before a slot is loaded or compared with.

        Raises NonFinite and IntegrityError as `QuantisedSlots.prepare`.
        """
        if self.codes is not None:
            self.codes.prepare(slot, self.mapped.slots[slot], self._seal_of)

    def _use_views(self, views: ArenaViews | None) -> None:
        former, self._views = self._views, views
        if former is not None:
            former.close()

    def _bind_tensors(self) -> None:
        """Note where the live tensors hang and lie, and make the pairs of all slots anew."""
        self.absent: list[tuple[str, frozenset[int]]] = []
        gone: list[tuple[nn.Module, str]] = []
        places: list[tuple[str, TensorRegistry, str]] = []
        for choice in self.decided.choices.values():
            for name, target, _ in self.canonical.parts(choice) if choice.direct else ():
                module = self.decided.live[choice.path]
                registry = find_registry(module, name)
                if registry is not None:
                    places.append((f"{choice.path}.{name}", registry, name))
                elif choice.stored[name].readable:
                    sent = [self.mapped.index[name] for name in self.canonical.tensors_of(target)]
                    self.absent.append((f"{choice.path}.{name}", frozenset(sent)))
                    gone.append((module, name))
        self._direct = BoundTensors(places, gone)
        for slot in range(len(self.mapped.slots)):
            self._compile(slot)

    def _compile(self, slot: int) -> None:
        """Make the pairs and constants that are written straight into live storage."""
        choices = [c for c in self.decided.choices.values() if c.direct]
        pairs = [*self._pairs(choices, slot), *self._computed_pairs(choices, slot)]
        self.mapped.direct[slot] = _DirectCopies(pairs, batches(pairs, self.threads), list(self.constants()))
        self.mapped.readable.pop(slot, None)

    def _pairs(self, choices: Iterable[ModuleStrategy], slot: int) -> Iterator[CopyPair]:
        """Make a pair per move and live place; storage that two places share comes once."""
        seen: set[tuple[int, str]] = set()
        for choice in choices:
            for name, target, _ in self.canonical.parts(choice):
                stored, live = choice.stored[name], find_tensor(self.decided.live[choice.path], name)
                moved = stored.readable and target not in self.computed.sources
                if live is None or not moved or (live.data_ptr(), target) in seen:
                    continue
                seen.add((live.data_ptr(), target))
                for move in self.canonical.moves.get(target, ()):
                    tensor = self.mapped.index[move.tensor]
                    sent = self.canonical.sent(move, slot)
                    for at, of in stored.locate(move.dest, move.source) or ():
                        made = make_pair(live, at, sent, of, tensor, target)
                        if made is not None:
                            yield made

    def _computed_pairs(self, choices: Iterable[ModuleStrategy], slot: int) -> Iterator[CopyPair]:
        """Make pairs of the computed targets: one for each tensor that a target is computed from, of the same views."""
        values = self.computed.buffers(slot)
        for choice in choices if values else ():
            for name, target, _ in self.canonical.parts(choice):
                stored, live = choice.stored[name], find_tensor(self.decided.live[choice.path], name)
                if target not in values or live is None or not stored.readable:
                    continue
                whole = dense((values[target].numel(),))
                for at, of in stored.locate(whole, whole) or ():
                    for source in self.computed.sources[target]:
                        made = make_pair(live, at, values[target], of, self.mapped.index[source], target)
                        if made is not None:
                            yield made

    def readable_pairs(self, slot: int) -> list[CopyPair]:
        """Pairs of all tensors that can be read back, whatever the strategy, in the same order for every slot."""
        return self._readable(slot).pairs

    def _readable(self, slot: int) -> _Readable:
        mapped = self.mapped
        self.computed.values(slot)
        if slot not in mapped.readable:
            direct = mapped.direct.get(slot)
            known = () if direct is None else direct.pairs
            rest = self.decided.choices.values() if direct is None else self.rebuilt
            mapped.readable[slot] = _Readable([*known, *self._pairs(rest, slot), *self._computed_pairs(rest, slot)])
        return mapped.readable[slot]

    def compare(self, slot: int) -> tuple[list[CopyPair], list[CopyPair]]:
        """Compare the tensors that hang in the live tree now with a slot, bit for bit: all readable pairs, and those
        of them that differ. Blocks."""
        if not self._direct.in_place():
            self._rebind()
        readable = self._readable(slot)
        if readable.comparisons is None:
            readable.comparisons = comparisons(readable.pairs, self.threads)
        return readable.pairs, compare_all(self.pool, readable.comparisons)

    def constants(self) -> Iterator[tuple[str, torch.Tensor, float]]:
        """Yield (target, live view, value) of every fill that lies in readable storage."""
        for choice in self.decided.choices.values():
            for name, target, _ in self.canonical.parts(choice):
                live, stored = find_tensor(self.decided.live[choice.path], name), choice.stored[name]
                if live is None or target in self.computed.sources:
                    continue
                for fill in self.canonical.fills.get(target, ()):
                    for at, _ in stored.locate(fill.dest, fill.dest) or ():
                        view = live.detach().as_strided(at.shape, at.strides, live.storage_offset() + at.offset)
                        yield target, view, fill.value

    def _rebind(self) -> None:
        """Make the views anew when a bound tensor lies elsewhere: the old ones would write into nowhere.

        Parameters under which the engine itself swapped the storage are reported by the next load; parameters that are
        other objects now are left to the attributes level.
        """
        self._moved |= dict.fromkeys(self._direct.swapped())
        self._bind_tensors()

    # ---- apply -------------------------------------------------------------------------------------------------------

    def apply(self, slot: int, changed: Iterable[int] | None = None) -> LoadOutcome:
        """Make the live model hold the version in `slot`. Called by the rank while the engine is paused. Blocks.

        After an error the live model is undefined: apply another version over it. Post-load runs once per touched
        module, after its last shard.

        Args:
            changed: manifest indices; only the parts that these tensors feed are written. None: all.

        Raises ConfigError, before anything is written, when a module was replaced; OutOfMemory.
        """
        began = time.perf_counter()
        self.began_to_write = False
        self.require_bound()
        self.prepare(slot)
        self.computed.values(slot)
        self.began_to_write = True
        if not self._direct.in_place():
            self._rebind()
        rebound, created, self._moved = list(self._moved), list[str](), {}
        wanted = None if changed is None else set(changed)
        direct = self.mapped.direct[slot]
        work = direct.batches
        if wanted is not None:
            work = batches([p for p in direct.pairs if p.tensor in wanted], self.threads)
        with experiment_step("writing weights", type(self.host.model).__name__), torch.no_grad():
            written = copy_all(self.pool, work)
            if wanted is None:
                for _, view, value in direct.constants:
                    view.fill_(value)
        loaded = time.perf_counter()
        if self.rebuilt or self.derived:
            try:
                written += self._rebuild(slot, wanted, rebound, created)
            except BaseException:  # what did move is told by the next load
                self._moved = dict.fromkeys((*rebound, *created))
                raise
        dropped = self.caches.clear()
        done = time.perf_counter()
        return LoadOutcome(written, tuple(rebound), tuple(created), loaded - began, done - loaded, dropped)

    def _rebuild(self, slot: int, wanted: set[int] | None, rebound: list[str], created: list[str]) -> int:
        """Rebuild redo and twin modules, then the modules that derive something from touched ones.

        Adds "module.name" of what it moved to `rebound`, of what was not there before to `created`. Returns the bytes
        written.
        """
        written = 0
        self.canonical.begin(frozenset(self._direct.addresses))
        for choice in self.rebuilt:
            if wanted is not None and wanted.isdisjoint(self.feeds[choice.path]):
                continue
            with experiment_step("rebuilding a module", f"{choice.path} ({choice.cls})"):
                found, nbytes = self._rebuild_one(choice, slot)
            rebound += [f"{choice.path}.{name}" for name, what in found.items() if what is Outcome.REBOUND]
            created += [f"{choice.path}.{name}" for name, what in found.items() if what is Outcome.CREATED]
            written += nbytes
            self.mapped.readable.clear()
        touched = {p for p, feeds in self.feeds.items() if wanted is None or not wanted.isdisjoint(feeds)}
        for path, module in self.derived:
            if not touched.isdisjoint(self.sources_of[path]):
                with experiment_step("deriving state", f"{path} ({type(module).__name__})"):
                    self.host.post_load(module)
                self.mapped.readable.clear()
        self.decided.twins.forget()
        return written

    def _rebuild_one(self, choice: ModuleStrategy, slot: int) -> tuple[dict[str, Outcome], int]:
        """Rebuild one module from a version: (name -> what happened to it, bytes written).

        Redo runs post-load again, on the module's own storages, on copies, or on the arena's memory where that holds a
        tensor whole. Other strategies bring over what post-load made on a twin.
        """
        live = self.decided.live[choice.path]
        if choice.strategy not in (Strategy.REDO, Strategy.REPLACE):
            twin, k = self.twin(choice, slot)
            parameters = twin.modules[k].parameters(recurse=False)
            names = twin.cluster.places[k]
            nbytes = sum(t.numel() * t.element_size() for t in parameters)
            return graft(twin.modules[k], twin.before[k], live, names), nbytes
        views = {
            name: shown
            for name, stored in choice.stored.items()
            if self._views is not None and not stored.readable
            for shown in [self._views.view(self.canonical.in_one_piece(choice, name, slot))]
            if shown is not None
        }
        values = {**self.canonical.values(choice, slot, reuse=True, without=views), **views}
        views.clear()
        nbytes = sum(v.numel() * v.element_size() for v in values.values())
        try:
            template, swap = self.decided.twins.template.get_submodule(choice.path), choice.strategy is Strategy.REPLACE
            return redo(self.host, live, template, values, swap=swap), nbytes
        finally:
            values.clear()  # a view that is still referenced counts as kept by the step
            if self._views is not None:
                self._views.take_back()

    # ---- twins -------------------------------------------------------------------------------------------------------

    def twin(self, choice: ModuleStrategy, slot: int) -> tuple[Twin, int]:
        """Make a twin of the module's cluster with the version in `slot`, post-loaded; and the module's index in it."""
        decided = self.decided
        cluster = decided.clusters[choice.path]
        twin = decided.twins.take(decided.alike[choice.path], decided.live)
        with torch.no_grad():
            for role, into in enumerate(twin.by_role()):
                self.canonical.fill_role(cluster, role, into, slot)
        twin.post_load(self.host)
        return twin, cluster.paths.index(choice.path)

    # ---- read back ---------------------------------------------------------------------------------------------------

    def read_back(self, into: ArenaSlot, slot: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Write the live weights into a writable slot (the tensors in manifest order), as version 0. Blocks.

        Returns (the tensors whose values the live model no longer holds in canonical form (packed, cast, computed), or
        holds in a dtype that the wire dtype cannot carry exactly; those that are quantised and were read from the
        engine's checkpoint instead). This rank writes only the regions it reads. Raises ConfigError when a module was
        replaced since the plan was made.

        Args:
            slot: the number of that slot.
        """
        self.require_bound()
        pairs = self._live_pairs(into, slot)
        lost = self._unreadable(pairs)
        with torch.no_grad():
            copy_all(self.pool, batches([pair.turned() for pair in pairs], self.threads))
        stored = () if self.codes is None else self.codes.fill_originals(slot, lost)
        for name, values in () if self.codes is None else self.codes.original_values(slot):
            for move in self.baked.plan.moves:
                if move.tensor == name:
                    source, sent = move.source, into[self.mapped.index[name]]
                    made = values.as_strided(source.shape, source.strides, source.offset)
                    sent.as_strided(source.shape, source.strides, sent.storage_offset() + source.offset).copy_(made)
        lost.difference_update(stored)
        return tuple(spec.name for spec in self.mapped.manifest.tensors if spec.name in lost), stored

    def keep_originals(self, slot: int) -> None:
        """Take the codes of version 0, which `slot` holds the values of, from the live model that still serves it.

        Called before the first load, in an engine that another one's version 0 is compared with: each keeps its own.
        """
        if self.codes is None or self.codes.has_originals(slot):
            return
        pairs = self._live_pairs(self.mapped.slots[slot], slot)
        own = {tensor.untyped_storage().data_ptr() for tensor in self.codes.made[slot].values()}
        turned = [pair.turned() for pair in pairs if pair.sent.untyped_storage().data_ptr() in own]
        with torch.no_grad():
            copy_all(self.pool, batches(turned, self.threads))
        self.codes.fill_originals(slot, self._unreadable(pairs))

    def _live_pairs(self, into: ArenaSlot, slot: int) -> list[CopyPair]:
        """Pair the live model with `into` and with the codes of `slot`, which become those of version 0."""
        mapped, extra = self.mapped, len(self.mapped.slots)
        mapped.slots.append(into)
        if self.codes is not None:
            self.codes.made.append(self.codes.begin_originals(slot))
        try:
            return list(self._pairs(self.decided.choices.values(), extra))
        finally:
            mapped.slots.pop()
            if self.codes is not None:
                self.codes.made.pop()

    def _unreadable(self, pairs: Sequence[CopyPair]) -> set[str]:
        """Find the announced tensors that these pairs with the live model do not show whole."""
        mapped, names = self.mapped, [spec.name for spec in self.mapped.manifest.tensors]
        lost: set[str] = {name for sources in self.computed.sources.values() for name in sources}
        lost |= {names[p.tensor] for p in pairs if torch.promote_types(p.live.dtype, p.sent.dtype) != p.sent.dtype}
        covered = {(p.tensor, p.target) for p in pairs}
        moved = {(mapped.index[m.tensor], m.target) for m in self.baked.plan.moves}
        return lost | {names[tensor] for tensor, _ in moved - covered}


def _describe(region: Region) -> str:
    whole = "" if region != dense(region.shape, region.offset) else " dense"
    return f"{list(region.shape)} at {region.offset} strides {list(region.strides)}{whole}"
