"""Bake once, apply many: a sealed version in the local arena becomes live weights.

`Loader(host, tensors)` bakes and finds strategies; `map` compiles the plan onto an arena's slots into pairs of views;
`apply` then copies. The steady state walks no module tree and matches no name: it checks that bound tensors lie where
they lay, runs precomputed work lists on threads, and repeats post-load for the modules that need it. One thread at a
time; blocks; no collectives of its own (an engine's post-load may have some, so all ranks apply together).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import nn

from bridge.errors import ConfigError, ProtocolError, UnexpectedTensor
from bridge.model.manifest import Manifest, TensorInfo, lay_out
from bridge.protocol.rank_jobs import RankBake
from bridge.shm.arena import Seal
from bridge.shm.memcpy import uncollected
from engine_side.live.bindings import AttributeSnapshot, BoundModules, BoundTensors, Replaced
from engine_side.live.forward_caches import ForwardCaches
from engine_side.live.inplace import Outcome, TensorRegistry, find_registry
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
)
from engine_side.load.explanation import explain_tensor
from engine_side.load.live_pairs import live_constants, live_pairs
from engine_side.load.rebuild import Rebuilder
from engine_side.load.sources import ArenaSlot, CanonicalTensors
from engine_side.plan.bake import Baked, bake
from engine_side.plan.binding import bind, side_by_side
from engine_side.plan.experiment_errors import experiment_step
from engine_side.plan.refusals import explained_problems, split_packed_modules
from engine_side.plan.strategies import ModuleStrategy, StrategyTable, decide
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
        found = tuple(explained_problems(host, self.baked, self.form.kept.keys()))
        undecided = unknown_allowed and all(isinstance(problem, UnexpectedTensor) for problem in found)
        self.problems = () if undecided else found
        self.mapped = ArenaMap()
        self.codes: QuantisedSlots | None = None
        self._seal_of: Callable[[int], Seal | None] = lambda _: None
        self.began_to_write = False
        """The last `apply` came as far as live storage, whether or not it ended."""
        if self.problems:
            return
        with uncollected():
            self.decided: StrategyTable = decide(host, self.baked)
        self.computed = ComputedTargets(host, self.baked, self.decided)
        self.canonical = CanonicalTensors(self.baked, self.decided, self.computed, self.pool, self.threads)
        self.rebuilder = Rebuilder(host, self.canonical)
        if partial:
            split = split_packed_modules(host, self.baked, self.decided, self.canonical.parts, self.form.sendable)
            self.problems = tuple(split)
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
            self.rebuilder.use(None)
        self.mapped, self.codes = ArenaMap(), None
        self.pool.shutdown(wait=True)

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
            placeholders=baked.unplaced.placeholders,
            partners=dict(baked.unplaced.partners),
            followers=dict(baked.followers),
            read={name: regions for name, regions in baked.read.items() if name not in added},
            strategies=dict(Counter([choice.strategy.value for choice in choices.values()])),
            moves=len(baked.plan.moves),
        )

    def explain(self, name: str) -> tuple[dict[str, str], ...]:
        """Describe which way one canonical tensor takes, as `explain_tensor`."""
        return explain_tensor(name, self.baked, self.form, self.canonical)

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
        self.rebuilder.use(views)
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
        """Make what this rank derives from the values of a slot fit them: codes of quantised weights, values that the
        engine's loader computes. Blocks for what changed. Called before a slot is loaded or compared with.

        Raises NonFinite and IntegrityError as `QuantisedSlots.prepare`; ConfigError as `ComputedTargets.values`.
        """
        if self.codes is not None:
            self.codes.prepare(slot, self.mapped.slots[slot], self._seal_of)
        if self.computed.sources:
            self.computed.values(slot)

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
        pairs = live_pairs(self.canonical, choices, slot)
        constants = list(live_constants(self.canonical))
        self.mapped.direct[slot] = _DirectCopies(pairs, batches(pairs, self.threads), constants)
        self.mapped.readable.pop(slot, None)

    def readable_pairs(self, slot: int) -> list[CopyPair]:
        """List the pairs of all tensors that can be read back, whatever the strategy; in one order for every slot."""
        return self._readable(slot).pairs

    def _readable(self, slot: int) -> _Readable:
        mapped = self.mapped
        if slot not in mapped.readable:
            direct = mapped.direct.get(slot)
            known = () if direct is None else direct.pairs
            rest = self.decided.choices.values() if direct is None else self.rebuilt
            mapped.readable[slot] = _Readable([*known, *live_pairs(self.canonical, rest, slot)])
        return mapped.readable[slot]

    def compare(self, slot: int) -> tuple[list[CopyPair], list[CopyPair]]:
        """Compare the tensors that hang in the live tree now with a slot, bit for bit: all readable pairs, and those
        of them that differ. Called after `prepare`. Blocks."""
        if not self._direct.in_place():
            self._rebind()
        readable = self._readable(slot)
        if readable.comparisons is None:
            readable.comparisons = comparisons(readable.pairs, self.threads)
        return readable.pairs, compare_all(self.pool, readable.comparisons)

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
        self.prepare(slot)
        self.require_bound()
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
                found, nbytes = self.rebuilder.rebuild(choice, slot)
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
