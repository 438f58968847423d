"""Is the live model the version in the arena? One function per level, each on its own, none of which writes weights.

    coverage    every engine element is written exactly once by this plan
    attributes  parameters are the same objects in the same place, with the same attributes and aliases
    read-back   live storage, mapped back to canonical order, has the arena's bits (after the plan's cast)
    probe       modules answer a few rows as the arena's weights say; needed where storage is packed, and once after
                baking everywhere, because bits in a storage do not prove that the output reads that storage
    change      where the trainer's bits changed, what the engine shows is no longer the version before

Called by the rank's job dispatcher while the engine is paused. Blocks; no collectives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from bridge.model.receipt import Failure, LevelResult
from bridge.model.regions import dest_coverage
from bridge.shm.memcpy import uncollected
from engine_side.live.inplace import AttributeSnapshot, diff
from engine_side.live.storage_layout import bits
from engine_side.load.copies import Chunk, CopyPair, chunks, differing, first_difference, run_all, same_bits
from engine_side.load.loader import Loader, LoadOutcome
from engine_side.plan import probes
from engine_side.plan.experiment_errors import experiment_step
from engine_side.plan.probes import Probe
from engine_side.plan.strategies import ModuleStrategy
from engine_side.plan.twins import device_of, reachable
from engine_side.verify.derived_state import DerivedState

RANK_LEVELS = ("coverage", "attributes", "read-back", "probe", "change")
"""The levels of `bridge.model.receipt.LEVELS` that one rank decides alone, in the order in which they run."""
SHOWN = 16
"""Failures listed per level; `got` of the last says how many more there are."""


class Verifier:
    """The levels of one mapped Loader. Holds what one push leaves for the next: proven plan digests, whether every
    module was probed once since the plan was made."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._covered: dict[bytes, LevelResult] = {}
        self._probed = False
        self._chunks: dict[int, tuple[object, list[list[Chunk]]]] = {}
        self._pairs: dict[int, tuple[object, object, list[tuple[CopyPair, CopyPair]]]] = {}
        self._packed = [choice for choice in loader.decided.choices.values() if not choice.direct]
        self._derived = DerivedState(loader)
        self._proven: set[str] = set()
        """Modules whose output was weighed in this run: it is the new version's, so it cannot be the former's."""
        self._inputs: dict[tuple[Probe, torch.device], torch.Tensor] = {}
        self._products: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(
        self,
        levels: Collection[str],
        slot: int,
        *,
        outcome: LoadOutcome | None = None,
        previous: int | None = None,
        changed: Collection[int] | None = None,
    ) -> tuple[LevelResult, ...]:
        """The named levels of this rank against `slot`, in order; levels that are not this rank's are left out.

        `outcome` is the load that went before (None: a check without one), `previous` the slot of the version before
        and `changed` the manifest indices whose bits differ between the two (None: unknown, all are looked at).
        """
        out: list[LevelResult] = []
        self._proven.clear()
        if "coverage" in levels:
            out.append(self.coverage())
        if "attributes" in levels:
            out.append(self.attributes(outcome))
        if "read-back" in levels:
            out.append(self.read_back(slot))
        if "probe" in levels:
            out.append(self.probe(slot, every=not self._probed))
            self._probed |= out[-1].ok
        if "change" in levels and previous is not None:
            out.append(self.change(slot, previous, changed))
        self._proven.clear()
        return tuple(out)

    def only_skipped(self, levels: Iterable[LevelResult], changed: Collection[int] | None) -> bool:
        """Something failed, and nothing that a load of `changed` wrote had a part in it: a fault of the load itself
        must not be healed in silence."""
        if changed is None:
            return False
        bad = [(level.level, failure.name) for level in levels if not level.ok for failure in level.failures]
        index = self.loader.mapped.index
        written = set(changed)

        def skipped(name: str) -> bool:
            if name in self.loader.decided.choices:
                return written.isdisjoint(self.loader.feeds(name))
            tensor = index.get(name.partition(" -> ")[0])
            return tensor is not None and tensor not in written

        return bool(bad) and all(level in ("read-back", "probe") and skipped(name) for level, name in bad)

    def canary_only(self) -> tuple[str, ...]:
        """Modules that neither read-back nor a probe can judge."""
        return tuple(
            choice.path
            for choice in self._packed
            if not choice.probes and reachable(self.loader.decided.live[choice.path])[1]
        )

    # ---- levels ------------------------------------------------------------------------------------------------------

    def coverage(self) -> LevelResult:
        """Proven anew for every plan digest, remembered for the same. Raises ConfigError when a module was replaced
        since the plan was made: then this is no plan of this engine, and nothing may be written by it."""
        self.loader.require_bound()
        plan = self.loader.baked.plan
        key = plan.digest
        if key not in self._covered:
            found = dest_coverage(plan)
            holes = {} if self.loader.baked.partial else found.holes
            sizes = {t.path: t.numel for t in plan.targets}
            failures = [
                Failure(path, f"{sizes[path]} elements written once", f"{n} never written") for path, n in holes.items()
            ]
            failures += [
                Failure(path, f"{sizes[path]} elements written once", f"{n} written more than once")
                for path, n in found.overlaps.items()
            ]
            self._covered[key] = _result("coverage", len(plan.targets), failures)
        return self._covered[key]

    def attributes(self, outcome: LoadOutcome | None = None) -> LevelResult:
        """Compare with the snapshot taken when the plan was mapped; what `outcome` says was rebound may have moved."""
        before = self.loader.snapshot
        replaced = self.loader.replaced()
        if replaced:
            failures = [Failure(each.path, each.expected, each.got) for each in replaced]
            return _result("attributes", len(before.entries), failures)
        if before.unchanged():
            return _result("attributes", len(before.entries), [])
        after = before.retake()
        allowed = self._live_paths(() if outcome is None else (*outcome.rebound, *outcome.created))
        found = diff(before, after, allowed)
        failures = [Failure(d.path, f"{d.what} {d.before}", d.after) for d in found]
        if not found:
            self.loader.snapshot = after
        return _result("attributes", len(before.entries), failures)

    def read_back(self, slot: int) -> LevelResult:
        """Bit for bit; constants (vocabulary padding) included. What is compared are the tensors that hang in the live
        tree now; a tensor whose module is no longer there is a failure."""
        loader = self.loader
        loader.rebind_if_moved()
        readable = loader.readable_pairs(slot)
        cached = self._chunks.get(slot)
        if cached is None or cached[0] is not readable:
            pairs = [p for items in readable.values() for p in items]
            self._chunks[slot] = cached = (readable, chunks(pairs, loader.threads))
        bad: list[list[Chunk]] = [[] for _ in cached[1]]
        run_all(loader.pool, [partial(_compare_into, found, work) for found, work in zip(bad, cached[1], strict=True)])
        names = [spec.name for spec in loader.mapped.manifest.tensors]
        wrong = {id(c.pair): c.pair for found in bad for c in found}
        failures = self._unread(names)
        for item in wrong.values():
            difference = first_difference(item) if len(failures) < SHOWN else None
            expected, got = ("the arena's bits", "other bits")
            if difference is not None:
                at, want, have = difference
                expected, got = f"{want!r} at element {at} of this part", f"{have!r}"
            failures.append(Failure(f"{names[item.tensor]} -> {item.target}", expected, got))
        constants = loader.mapped.direct[slot].constants
        failures += [
            Failure(target, f"{value} in padding", "another value")
            for target, view, value in constants
            if not bool((view == view.new_full((), value)).all())
        ]
        return _result("read-back", len({p.tensor for items in readable.values() for p in items}), failures)

    def probe(self, slot: int, *, every: bool = False) -> LevelResult:
        """Call the modules whose storage does not show their weights (`every`: all that can be called)."""
        failures: list[Failure] = []
        lost = {choice.path for choice in self.loader.lost(self.loader.replaced())}
        wanted = self._packed
        if every:
            wanted = [c for c in self.loader.decided.choices.values() if not c.direct or c.probes]
        with uncollected(), self._remembering():
            for choice in wanted:
                with experiment_step("probing a module", f"{choice.path} ({choice.cls})"):
                    why = "the module was replaced" if choice.path in lost else self._probe_one(choice, slot)
                if why is None:
                    self._proven.add(choice.path)
                else:
                    failures.append(Failure(choice.path, f"the output of the arena's weights ({choice.cls})", why))
            for path, cls, why in self._derived.wrong(slot):
                failures.append(Failure(path, f"what the arena's weights give ({cls})", why))
        note = "" if wanted or self._derived.paths else "nothing is packed: read-back shows every weight"
        return _result("probe", len(wanted) + len(self._derived.paths), failures, note)

    def change(self, slot: int, previous: int, changed: Collection[int] | None = None) -> LevelResult:
        """What changed in the trainer must not still show the version before."""
        wanted = set(range(len(self.loader.mapped.manifest.tensors))) if changed is None else set(changed)
        failures = self._unmoved_storage(slot, previous, wanted)
        with self._remembering():
            for choice in self._packed:
                if choice.path in self._proven or wanted.isdisjoint(self.loader.feeds(choice.path)):
                    continue
                for probe in choice.probes:
                    with experiment_step("comparing a module with its former version", f"{choice.path} ({choice.cls})"):
                        why = self._unmoved_output(choice, probe, slot, previous)
                    if why is not None:
                        said = f"an output unlike the previous version's ({choice.cls})"
                        failures.append(Failure(choice.path, said, why))
        return _result("change", len(wanted), failures)

    def _unread(self, names: Sequence[str]) -> list[Failure]:
        """The tensors of modules that were replaced, and the parameters that are gone."""
        replaced = self.loader.replaced()
        failures = [
            Failure(f"{names[k]} -> {choice.path}", "the module that was attached, in the live tree", "it was replaced")
            for choice in self.loader.lost(replaced)
            for k in sorted(self.loader.feeds(choice.path))
        ]
        return failures + [
            Failure(f"{names[k]} -> {path}", "a live tensor", "gone")
            for path, feeds in self.loader.gone()
            for k in sorted(feeds)
        ]

    # ---- how ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        """Inside, what one module was judged by serves others too; not longer: the arena holds something else at the
        next push, also after an error."""
        try:
            yield
        finally:
            self.loader.decided.twins.forget()
            self._inputs.clear()
            self._products.clear()

    def _unmoved_storage(self, slot: int, previous: int, wanted: set[int]) -> list[Failure]:
        if not wanted:
            return []
        names = [spec.name for spec in self.loader.mapped.manifest.tensors]
        moved: set[int] = set()
        still: set[int] = set()
        for new, old in self._both(slot, previous):
            tensor = new.tensor
            if tensor in moved or tensor not in wanted:
                continue
            if not same_bits(old):
                moved.add(tensor)
            elif not torch.equal(_as_live(new.sent, new.live), _as_live(old.sent, old.live)):
                still.add(tensor)
        return [
            Failure(names[k], "bits of the new version", "still those of the version before")
            for k in sorted(still - moved)
        ]

    def _both(self, slot: int, previous: int) -> list[tuple[CopyPair, CopyPair]]:
        """The readable pairs of two slots side by side."""
        now, before = self.loader.readable_pairs(slot), self.loader.readable_pairs(previous)
        cached = self._pairs.get(slot)
        if cached is None or cached[0] is not now or cached[1] is not before:
            both = [together for path, items in now.items() for together in zip(items, before[path], strict=True)]
            self._pairs[slot] = cached = (now, before, both)
        return cached[2]

    def _unmoved_output(self, choice: ModuleStrategy, probe: Probe, slot: int, previous: int) -> str | None:
        seen = self._output(choice, probe)
        new, old = self._reference(choice, probe, slot), self._reference(choice, probe, previous)
        if seen is None or new is None or old is None:
            return "it cannot be called any more"
        if probes.deviation(new[0].to(seen.dtype), old[0], old[1]) is None:
            return None  # the change is smaller than what an output of this dtype can show
        still = probes.deviation(seen, *old) is None
        return "the output is still that of the version before" if still else None

    def _probe_one(self, choice: ModuleStrategy, slot: int) -> str | None:
        if not choice.probes:
            return self._compare_state(choice, slot)
        for probe in choice.probes:
            seen, want = self._output(choice, probe), self._reference(choice, probe, slot)
            if seen is None or want is None:
                return "it cannot be called any more"
            why = probes.deviation(seen, *want)
            if why is not None:
                return why
        return None

    def _output(self, choice: ModuleStrategy, probe: Probe) -> torch.Tensor | None:
        module = self.loader.decided.live[choice.path]
        return probes.call(self.loader.host, module, self._input(probe, choice))

    def _reference(self, choice: ModuleStrategy, probe: Probe, slot: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(output, tolerance) of the arena's weights."""
        x = self._input(probe, choice)
        if probe.form != "twin":
            blocks = self.loader.canonical.blocks(choice, probe.weight, slot) if probe.form == "linear" else ()
            return self._product(choice, probe, slot, x, blocks)
        twin, k = self.loader.twin(choice, slot)
        y = probes.call(self.loader.host, twin.modules[k], x)
        return None if y is None else (y, probes.twin_tolerance(y))

    def _product(
        self, choice: ModuleStrategy, probe: Probe, slot: int, x: torch.Tensor, blocks: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference of a probe that has a form; one for modules that hold the same matrix of the arena alone."""
        values = self.loader.canonical.values(choice, slot, without=(probe.weight,) if blocks else ())
        if values or not blocks:
            return probe.reference(x, values, blocks)
        key = (probe, x.device, tuple((block.data_ptr(), block.shape, block.stride()) for block in blocks))
        if key not in self._products:
            self._products[key] = probe.reference(x, values, blocks)
        return self._products[key]

    def _input(self, probe: Probe, choice: ModuleStrategy) -> torch.Tensor:
        """What a probe feeds in, made once for all modules that are alike."""
        key = (probe, self._device(choice))
        if key not in self._inputs:
            self._inputs[key] = probe.inputs(key[1])
        return self._inputs[key]

    def _compare_state(self, choice: ModuleStrategy, slot: int) -> str | None:
        """A module that cannot be called: everything it holds against a twin's. Closed state is the canary's."""
        here, opaque = reachable(self.loader.decided.live[choice.path])
        twin, k = self.loader.twin(choice, slot)
        there, _ = reachable(twin.modules[k])
        return None if opaque else probes.state_deviation(here, there)

    def _device(self, choice: ModuleStrategy) -> torch.device:
        return device_of(self.loader.decided.live[choice.path])

    def _live_paths(self, names: Iterable[str]) -> set[str]:
        """ "module.name" in skeleton paths -> the paths under which the live model shows the same modules."""
        by_id: dict[int, list[str]] = {}
        for path, module in self.loader.host.model.named_modules(remove_duplicate=False):
            by_id.setdefault(id(module), []).append(path)
        out: set[str] = set()
        for full in names:
            module_path, _, name = full.rpartition(".")
            live = self.loader.decided.live[module_path]
            out.update(f"{path}.{name}" if path else name for path in by_id.get(id(live), ()))
        return out | _aliases(self.loader.snapshot, out)


def _compare_into(found: list[Chunk], work: Sequence[Chunk]) -> None:
    found.extend(differing(work))


def _aliases(snapshot: AttributeSnapshot, paths: Iterable[str]) -> set[str]:
    return {alias for path in paths if path in snapshot.entries for alias in snapshot.entries[path].aliases}


def _as_live(sent: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    return bits(sent.to(device=live.device, dtype=live.dtype).contiguous())


def _result(level: str, checked: int, failures: Sequence[Failure], note: str = "") -> LevelResult:
    shown = tuple(failures[:SHOWN])
    note = f"{len(failures) - SHOWN} more" if len(failures) > SHOWN else note
    return LevelResult(level, not failures, checked, shown, note)
