"""Verify that the live model is the version in the arena. One method per level; none of them writes weights.

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

import torch

from bridge.model.receipt import Failure, LevelResult
from bridge.model.same_bits import same_bits
from bridge.shm.memcpy import uncollected
from engine_side.live.bindings import Replaced, diff
from engine_side.live.inplace import find_tensor
from engine_side.load.loader import Loader, LoadOutcome
from engine_side.plan import probes
from engine_side.plan.experiment_errors import experiment_step
from engine_side.plan.post_load import reachable
from engine_side.plan.probes import Probe
from engine_side.plan.strategies import ModuleStrategy
from engine_side.plan.twins import device_of
from engine_side.verify.derived_state import DerivedState

SHOWN = 16
"""Failures listed per level; the note says how many more there are."""


class Verifier:
    """The levels of one mapped Loader.

    Remembers from push to push whether every module was probed once since the plan was made.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._probed = False
        self._derived = DerivedState(loader)
        self._proven: set[str] = set()
        """Modules whose output passed its probe in this run: it is the new version's, so it cannot be the former's."""
        self._moved: set[str] = set()
        """Parameters whose storage loads have swapped since the snapshot: not every load runs the attributes level."""
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
        """Run the named levels of this rank against `slot`, in order; other levels are left out.

        Args:
            outcome: the load that went before; None for a check without one.
            previous: slot of the version before; None leaves "change" out.
            changed: manifest indices whose bits differ between the two; None when unknown, then all are compared.
        """
        out, loader = list[LevelResult](), self.loader
        if outcome is None:  # a load has prepared its slot
            loader.prepare(slot)
        self._proven.clear()
        if outcome is not None:
            self._moved.update(outcome.rebound, outcome.created)
        if "coverage" in levels:
            out.append(self.coverage())
        watched = "attributes" in levels or "read-back" in levels
        replaced = loader.modules.replaced(loader.host.model) if watched else []
        if "attributes" in levels:
            out.append(self.attributes(replaced))
        if "read-back" in levels:
            out.append(self.read_back(slot, replaced))
        if "probe" in levels:
            out.append(self.probe(slot, every=not self._probed))
            self._probed |= out[-1].ok
        if "change" in levels and previous is not None:
            out.append(self.change(slot, previous, changed))
        self._proven.clear()
        return tuple(out)

    def only_skipped(self, levels: Iterable[LevelResult], changed: Collection[int] | None) -> bool:
        """True when something failed, and only tensors that a load of `changed` skipped as unchanged.

        Then something else modified them since the last push. A fault of the load itself must not be healed in silence.
        """
        bad = [(level.level, failure) for level in levels if not level.ok for failure in level.failures]
        if changed is None or not bad:
            return False
        written, index = set(changed), self.loader.mapped.index
        for level, failure in bad:
            if failure.parameter in self.loader.decided.choices and not failure.tensor:
                skipped = written.isdisjoint(self.loader.feeds[failure.parameter])
            else:
                tensor = index.get(failure.tensor or failure.name)
                skipped = tensor is not None and tensor not in written
            if level not in ("read-back", "probe") or not skipped:
                return False
        return True

    def canary_only(self) -> tuple[str, ...]:
        """Modules that neither read-back nor a probe can check."""
        return tuple(
            choice.path
            for choice in self.loader.rebuilt
            if not choice.probes and reachable(self.loader.decided.live[choice.path])[1]
        )

    # ---- levels ------------------------------------------------------------------------------------------------------

    def coverage(self) -> LevelResult:
        """Prove that every element is written exactly once.

        Raises ConfigError when a module was replaced since the plan was made: then this is no plan of this engine, and
        nothing may be written by it.
        """
        self.loader.require_bound()
        baked = self.loader.baked
        sizes = {t.path: t.numel for t in baked.plan.targets}
        wrong = [] if baked.partial else [(p, f"{n} never written") for p, n in baked.coverage.holes.items()]
        wrong += [(path, f"{n} written more than once") for path, n in baked.coverage.overlaps.items()]
        failures = [Failure(p, f"{sizes[p]} elements written once", got, parameter=p) for p, got in wrong]
        return _result("coverage", len(sizes), failures)

    def attributes(self, replaced: Sequence[Replaced] = ()) -> LevelResult:
        """Compare with the last snapshot that held; storage may have moved where loads since then moved it."""
        before = self.loader.snapshot
        if replaced:
            failures = [Failure(each.path, each.expected, each.got, parameter=each.path) for each in replaced]
            return _result("attributes", len(before.entries), failures)
        if before.unchanged():
            self._moved.clear()
            return _result("attributes", len(before.entries), [])
        after, moved = before.retake(), set[int]()
        for full in self._moved:
            path, _, name = full.rpartition(".")
            moved.add(id(find_tensor(self.loader.decided.live[path], name)))
        rows = zip(after.bound.places, after.bound.tensors, strict=True)
        found = diff(before, after, [path for (path, _, _), tensor in rows if id(tensor) in moved])
        if not found:
            self.loader.snapshot = after
            self._moved.clear()
        failures = [Failure(d.path, f"{d.what} {d.before}", d.after, parameter=d.path) for d in found]
        return _result("attributes", len(before.entries), failures)

    def read_back(self, slot: int, replaced: Sequence[Replaced] = ()) -> LevelResult:
        """Compare the tensors that hang in the live tree now, and constants (vocabulary padding), bit for bit.

        A tensor whose module is no longer there is a failure.
        """
        loader = self.loader
        with experiment_step("reading weights back", type(loader.host.model).__name__):
            readable, wrong = loader.compare(slot)
        names = [spec.name for spec in loader.mapped.manifest.tensors]
        expected, got = "the module that was attached, in the live tree", "it was replaced"
        failures = [
            Failure.between(names[k], choice.path, expected, got)
            for choice in (loader.modules_below(replaced) if replaced else ())
            for k in sorted(loader.feeds[choice.path])
        ]
        failures += [
            Failure.between(names[k], path, "a live tensor", "gone")
            for path, feeds in loader.absent
            for k in sorted(feeds)
        ]
        for pair in wrong:
            difference = pair.first_difference() if len(failures) < SHOWN else None
            expected, got = "the arena's bits", "other bits"
            if difference is not None:
                expected, got = f"{difference[1]!r} at element {difference[0]} of this part", f"{difference[2]!r}"
            failures.append(Failure.between(names[pair.tensor], pair.target, expected, got))
        failures += [
            Failure(target, f"{value} in padding", "another value", parameter=target)
            for target, view, value in loader.mapped.direct[slot].constants
            if not bool((view == view.new_full((), value)).all())
        ]
        return _result("read-back", len({pair.tensor for pair in readable}), failures)

    def probe(self, slot: int, *, every: bool = False) -> LevelResult:
        """Call the modules whose storage does not show their weights (`every`: all that can be called)."""
        wanted, failures = self.loader.rebuilt, list[Failure]()
        if every:
            wanted = [c for c in self.loader.decided.choices.values() if not c.direct or c.probes]
        if not wanted and not self.loader.derived:
            return _result("probe", 0, [], "nothing is packed: read-back shows every weight")
        replaced = self.loader.modules.replaced(self.loader.host.model)
        lost = {choice.path for choice in self.loader.modules_below(replaced)}
        with uncollected(), self._remembering():
            for choice in wanted:
                with experiment_step("probing a module", f"{choice.path} ({choice.cls})"):
                    why = "the module was replaced" if choice.path in lost else self._probe_one(choice, slot)
                if why is None:
                    self._proven.add(choice.path)
                else:
                    expected = f"the output of the arena's weights ({choice.cls})"
                    failures.append(Failure(choice.path, expected, why, parameter=choice.path))
            for path, cls, why in self._derived.wrong(slot):
                failures.append(Failure(path, f"the state that the arena's weights give ({cls})", why, parameter=path))
        return _result("probe", len(wanted) + len(self._derived.paths), failures)

    def change(self, slot: int, previous: int, changed: Collection[int] | None = None) -> LevelResult:
        """Check that nothing that changed in the trainer still shows the version before."""
        names = [spec.name for spec in self.loader.mapped.manifest.tensors]
        wanted = set(range(len(names))) if changed is None else set(changed)
        still = self._unmoved_tensors(slot, previous, wanted) if wanted else []
        expected, got = "bits of the new version", "still those of the version before"
        failures = [Failure(names[k], expected, got, tensor=names[k]) for k in still]
        if self.loader.rebuilt:
            with self._remembering():
                for choice in self.loader.rebuilt:
                    if choice.path in self._proven or wanted.isdisjoint(self.loader.feeds[choice.path]):
                        continue
                    for probe in choice.probes:
                        with experiment_step("comparing with the former version", f"{choice.path} ({choice.cls})"):
                            why = self._unmoved_output(choice, probe, slot, previous)
                        if why is not None:
                            expected = f"an output unlike the previous version's ({choice.cls})"
                            failures.append(Failure(choice.path, expected, why, parameter=choice.path))
        return _result("change", len(wanted), failures)

    # ---- how ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        """Share inputs, products and twins between modules inside the block.

        Not longer, also after an error: the arena holds something else at the next push.
        """
        try:
            yield
        finally:
            self.loader.decided.twins.forget()
            self._inputs.clear()
            self._products.clear()

    def _unmoved_tensors(self, slot: int, previous: int, wanted: set[int]) -> list[int]:
        """Manifest indices of tensors that changed in the arena, of which no readable part changed in the engine."""
        self.loader.prepare(previous)
        now, before = self.loader.readable_pairs(slot), self.loader.readable_pairs(previous)
        moved: set[int] = set()
        still: set[int] = set()
        for new, old in zip(now, before, strict=True):
            tensor = new.tensor
            if tensor in moved or tensor not in wanted:
                continue
            if not old.same_bits():
                moved.add(tensor)
            elif not same_bits(new.sent.to(new.live), old.sent.to(old.live)):
                still.add(tensor)
        return sorted(still - moved)

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
        """Compare a module's output with that of the arena's weights: a text that says how it differs, or None.

        Where it cannot be called its state is compared with a twin's; state that cannot be looked into is left to the
        canary.
        """
        if not choice.probes:
            here, opaque = reachable(self.loader.decided.live[choice.path])
            twin, k = self.loader.rebuilder.twin(choice, slot)
            return None if opaque else probes.state_deviation(here, twin.made_of_weights(k))
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
        return probes.call_module(self.loader.host, module, self._input(probe, choice))

    def _reference(self, choice: ModuleStrategy, probe: Probe, slot: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Compute (output, tolerance) of the arena's weights; None where the module cannot be called."""
        x, canonical = self._input(probe, choice), self.loader.canonical
        if probe.form == "twin":
            twin, k = self.loader.rebuilder.twin(choice, slot)
            y = probes.call_module(self.loader.host, twin.modules[k], x)
            return None if y is None else (y, probes.twin_tolerance(y))
        blocks = canonical.blocks(choice, probe.weight, slot) if probe.form == "linear" else ()
        values = canonical.values(choice, slot, without=(probe.weight,) if blocks else ())
        if values or not blocks:
            return probe.reference(x, values, blocks)
        # one product for all modules that hold the same matrix of the arena and nothing else
        key = (probe, x.device, tuple((block.data_ptr(), block.shape, block.stride()) for block in blocks))
        if key not in self._products:
            self._products[key] = probe.reference(x, values, blocks)
        return self._products[key]

    def _input(self, probe: Probe, choice: ModuleStrategy) -> torch.Tensor:
        """The rows or ids of a probe, made once for all modules that are alike."""
        key = (probe, device_of(self.loader.decided.live[choice.path]))
        if key not in self._inputs:
            self._inputs[key] = probe.inputs(key[1])
        return self._inputs[key]


def _result(level: str, checked: int, failures: Sequence[Failure], note: str = "") -> LevelResult:
    shown = tuple(failures[:SHOWN])
    note = f"{len(failures) - SHOWN} more" if len(failures) > SHOWN else note
    return LevelResult(level, not failures, checked, shown, note)
