"""Find one strategy per module, by experiments on twins.

A module is *in place* when its storage after post-load is canonical and its output follows what is written there;
*permuted* when the storage is an affine rearrangement; *redo* when post-load has to run again; *replace* when its
results have to stay where it puts them, because a kernel has noted their addresses; *twin* when it has to run on a
fresh twin, whose results are grafted.
Nothing is looked up by class or name: the storage is read back after post-load of known values, and the values that a
strategy wrote must show in the module's output as they do in a freshly loaded twin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

import numpy as np
import torch
from torch import nn

from bridge.errors import ConfigError
from bridge.model.regions import Region, dense
from engine_side.live import storage_layout
from engine_side.live.forward_caches import ForwardCaches, names_set, tensors_set_since
from engine_side.live.inplace import find_tensor
from engine_side.live.storage_layout import Stored
from engine_side.plan import probes
from engine_side.plan.bake import Baked
from engine_side.plan.binding import bind
from engine_side.plan.clusters import Cluster, Role, find_groups
from engine_side.plan.experiment_errors import experiment_step, is_out_of_memory
from engine_side.plan.loader_errors import LOADER_ERRORS
from engine_side.plan.post_load import graft, reachable, redo, require_tensor
from engine_side.plan.probes import Probe
from engine_side.plan.twins import Twin, TwinSource, device_of
from engine_side.protocol import RankHost


class Strategy(StrEnum):
    """The ways to bring new weights into a module, see the head of this file."""

    IN_PLACE = "in place"
    PERMUTED = "permuted"
    REDO = "redo"
    REPLACE = "replace"
    TWIN = "twin"


_LADDER = {
    Strategy.IN_PLACE: Strategy.REDO,
    Strategy.PERMUTED: Strategy.REDO,
    Strategy.REDO: Strategy.REPLACE,
    Strategy.REPLACE: Strategy.TWIN,
    Strategy.TWIN: None,
}


@dataclass(frozen=True)
class ModuleStrategy:
    """The strategy found for one module.

    Attributes:
        cls: class name of the live module.
        reason: why this strategy, for people.
        stored: name -> how that canonical tensor lies in the module after post-load.
        probes: the ways to call the module; none when it cannot be called alone.
        kept: attributes that its first call fills with tensors computed from its weights: forward caches.
        direct: values are written straight into the live storage (in place, permuted).
    """

    path: str
    cls: str
    strategy: Strategy
    reason: str
    stored: Mapping[str, Stored]
    probes: tuple[Probe, ...]
    kept: frozenset[str] = frozenset()

    @property
    def direct(self) -> bool:
        return self.strategy in (Strategy.IN_PLACE, Strategy.PERMUTED)


@dataclass
class StrategyTable:
    """The strategies of a plan by module path, with the live modules and clusters to which they apply.

    Attributes:
        choices: in the skeleton's order.
        alike: path -> the clusters for which the same experiment was made.
        derived: modules without weights that have a post-load step.
    """

    choices: dict[str, ModuleStrategy]
    clusters: dict[str, Cluster]
    alike: dict[str, tuple[Cluster, ...]]
    live: dict[str, nn.Module]
    derived: tuple[str, ...]
    twins: TwinSource


def decide(host: RankHost, baked: Baked) -> StrategyTable:
    """Find the strategy of every module of a plan. Once per plan; twins of one cluster at a time in memory. Blocks.

    Raises ConfigError when a live module is not what the engine's post-load makes of its skeleton, when no strategy
    serves a module, or when the engine's code fails in an experiment; OutOfMemory. All name module and class.
    """
    twins = TwinSource(host)
    groups = find_groups(twins.template, baked)
    paths = [path for group in groups for cluster in group for path in cluster.paths]
    live = bind(twins.template, host.model, paths)
    decided = StrategyTable({}, {}, {}, live, (), twins)
    found: dict[str, ModuleStrategy] = {}
    for group in groups:
        path = group[0].paths[0]
        with experiment_step("looking for a strategy", f"{path} ({type(live[path]).__name__})", group[0].nbytes):
            chosen = _Experiment(baked, group, live, twins).run()
        alike = tuple(group)
        for cluster in group:
            for path, choice in zip(cluster.paths, chosen, strict=True):
                found[path] = replace(choice, path=path)
                decided.clusters[path] = cluster
                decided.alike[path] = alike
                _check_live(live[path], found[path])
        twins.release()
    order = [path for path in baked.targets.of_module(mirrors=True) if path in found]
    decided.choices = {path: found[path] for path in order}
    with experiment_step("looking for modules with derived state", type(host.model).__name__):
        holders = {path for path, places in baked.targets.of_module().items()
                   if any(place.target not in baked.unloaded for place in places)}  # fmt: skip
        decided.derived = _derived(twins, found.keys() | holders)
    return decided


class _Experiment:
    """The experiments on one group of alike clusters."""

    def __init__(
        self, baked: Baked, group: Sequence[Cluster], live: Mapping[str, nn.Module], twins: TwinSource
    ) -> None:
        self.host, self.baked, self.group, self.live, self.twins = twins.host, baked, group, live, twins
        self.cluster = group[0]
        self.device = device_of(live[self.cluster.paths[0]])
        self.probes: list[tuple[Probe, ...]] = []
        self.kept: list[frozenset[str]] = [frozenset() for _ in self.cluster.paths]

    def run(self) -> list[ModuleStrategy]:
        """Choose a strategy for each module of the cluster. Raises ConfigError when none serves."""
        stored, plain = self._stored()
        if plain is not None and self._follows_as_is(plain):
            return [self._choice(k, Strategy.IN_PLACE, _storage_reason(names), names) for k, names in enumerate(stored)]
        if plain is not None:
            self.twins.retire(plain)
        old, new = probes.random_values(self.blank, 1), probes.random_values(self.blank, 2)
        fresh = self._loaded(new)
        unused = [names_set(module) for module in fresh.modules]
        self.probes = self._find_probes(fresh, new)
        self.kept = [tensors_set_since(module, unused[k]) for k, module in enumerate(fresh.modules)]
        want = [self._expect(k, fresh) for k in range(len(fresh.modules))]
        self.twins.retire(fresh)
        plans = [_first(names) for names in stored]
        reasons = [_storage_reason(names) for names in stored]
        while True:
            failed = self._failures(plans, stored, old, new, want)
            if not failed:
                break
            for k, why in failed.items():
                higher = _LADDER[plans[k]]
                if higher is None:
                    path = self.cluster.paths[k]
                    raise ConfigError(
                        "no strategy can update this module",
                        where=f"{path} ({type(self.live[path]).__name__})",
                        expected="an output that follows the weights after they are written or post-load is run again",
                        got=why,
                        remedy="report the class; this engine has to be restarted for new weights",
                        names=(path,),
                    )
                reasons[k] = f"{plans[k].value}: {why}"
                plans[k] = higher
        return [self._choice(k, plans[k], reasons[k], stored[k]) for k in range(len(plans))]

    @cached_property
    def blank(self) -> list[torch.Tensor]:
        """A tensor per role, in untouched memory."""
        return [torch.empty_strided(r.shape, r.strides, dtype=r.dtype, device=self.device) for r in self.cluster.roles]

    def _follows_as_is(self, twin: Twin) -> bool:
        """True when the output of modules without a post-load step follows their canonical storage, by a known form.

        Then nothing else need be tried, and a single twin is enough. The first call comes before the second values are
        written, so that a copy kept by a first call would show.
        """
        values = twin.by_role()
        probes.randomise(values, 1)
        found = self._find_probes(twin, values)
        if not all(ways and all(probe.form != "twin" for probe in ways) for ways in found):
            return False
        calls = [
            (k, module, probe, probe.inputs(self.device)) for k, module in enumerate(twin.modules) for probe in found[k]
        ]
        before = [probes.call_module(self.host, module, x) for _, module, _, x in calls]
        probes.randomise(values, 2)
        for (k, module, probe, x), earlier in zip(calls, before, strict=True):
            y = probes.call_module(self.host, module, x)
            if y is None or earlier is None or torch.equal(y, earlier):
                return False
            if probes.mismatch(probe, x, y, self._named(k, values)) is not None:
                return False
        self.probes = found
        return True

    def _find_probes(self, twin: Twin, values: Sequence[torch.Tensor]) -> list[tuple[Probe, ...]]:
        """Find the ways to call each module of a twin that holds `values`."""
        return [
            probes.find_probes(self.host, module, self._named(k, values), self._first_rows(k), self.twins.computes_in)
            for k, module in enumerate(twin.modules)
        ]

    def _choice(self, k: int, strategy: Strategy, reason: str, stored: Mapping[str, Stored]) -> ModuleStrategy:
        ways = self.probes[k]
        if not ways:
            reason += "; cannot be called alone, judged by its state"
        for name, role in self.cluster.places[k].items():
            why = self.baked.plan.computed.get(self.cluster.targets[role])
            if why is not None:
                reason += f"; {name} is computed by the engine's loader ({why})"
        cls = type(self.live[self.cluster.paths[k]]).__name__
        return ModuleStrategy(self.cluster.paths[k], cls, strategy, reason, stored, ways, self.kept[k])

    def _loaded(self, values: Sequence[torch.Tensor]) -> Twin:
        twin = self.twins.take(self.group, self.live)
        twin.fill(values)
        twin.post_load(self.host)
        return twin

    def _named(self, k: int, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: values[role] for name, role in self.cluster.places[k].items()}

    def _first_rows(self, k: int) -> dict[str, tuple[int, int]]:
        """Name -> (global row at which this rank's part of the sent tensor begins, number of its rows)."""
        out: dict[str, tuple[int, int]] = {}
        for name, role in self.cluster.places[k].items():
            shape, target = self.cluster.roles[role].shape, self.cluster.targets[role]
            move = next((m for m in self.baked.plan.moves if m.target == target), None)
            if move is not None and len(shape) == 2 and len(move.source.shape) == 2:
                width = max(math.prod(shape[1:]), 1)
                out[name] = (move.source.offset // width, move.source.shape[0])
        return out

    def _observe(self, k: int, module: nn.Module) -> dict[str, torch.Tensor] | None:
        """Collect a module's outputs, or all tensors of its state; None when part of that cannot be looked into."""
        if self.probes[k]:
            outputs: dict[str, torch.Tensor] = {}
            for probe in self.probes[k]:
                y = probes.call_module(self.host, module, probe.inputs(self.device))
                if y is None:
                    return None
                outputs[f"output by {probe.kind}"] = y
            return outputs
        tensors, opaque = reachable(module)
        return None if opaque else {name: t.detach().clone() for name, t in tensors.items()}

    def _expect(self, k: int, twin: Twin) -> dict[str, torch.Tensor] | None:
        """Observe a freshly loaded twin; tensors of its state that its weights have not made become meta tensors."""
        seen = self._observe(k, twin.modules[k])
        if seen is None or self.probes[k]:
            return seen
        made = twin.made_of_weights(k)
        return {name: t if name in made else torch.empty_like(t, device="meta") for name, t in seen.items()}

    def _failures(
        self,
        plans: Sequence[Strategy],
        stored: Sequence[Mapping[str, Stored]],
        old: Sequence[torch.Tensor],
        new: Sequence[torch.Tensor],
        want: Sequence[dict[str, torch.Tensor] | None],
    ) -> dict[int, str]:
        """Map modules to why the values that their strategy wrote do not show."""
        twin = self._loaded(old)
        before = [self._observe(k, module) for k, module in enumerate(twin.modules)]
        failed: dict[int, str] = {}
        dropped: list[torch.Tensor] = []  # until all is observed: a kernel may read there
        for k, strategy in enumerate(plans):
            try:
                self._write(twin, k, strategy, stored[k], new, dropped)
            except LOADER_ERRORS as error:
                if is_out_of_memory(error):
                    raise
                failed[k] = f"it raised {type(error).__name__}: {error}"
        for k, module in enumerate(twin.modules):
            if k in failed:
                continue
            seen, wanted = self._observe(k, module), want[k]
            why = _compare(before[k], seen, wanted, plans[k])
            if why is not None:
                failed[k] = why
        return failed

    def _write(
        self,
        twin: Twin,
        k: int,
        strategy: Strategy,
        stored: Mapping[str, Stored],
        new: Sequence[torch.Tensor],
        dropped: list[torch.Tensor],
    ) -> None:
        """Bring `new` into a post-loaded twin as a load would into the live module. `dropped`: as `redo` takes it."""
        module, values = twin.modules[k], self._named(k, new)
        template = self.twins.template.get_submodule(twin.cluster.paths[k])
        if strategy in (Strategy.IN_PLACE, Strategy.PERMUTED):
            for name, value in values.items():
                live, new_value = stored[name].side_by_side(require_tensor(module, name), value)
                live.copy_(new_value)
        elif strategy in (Strategy.REDO, Strategy.REPLACE):
            redo(self.host, module, template, values, swap=strategy is Strategy.REPLACE, dropped=dropped)
        else:
            other = self._loaded(new)
            graft(other.modules[k], other.before[k], module, self.cluster.places[k])
        ForwardCaches(module, [("", template, module)], {"": self.kept[k]}).clear()

    def _stored(self) -> tuple[list[dict[str, Stored]], Twin | None]:
        """Find the layout of each canonical tensor after post-load; and the twin, where nothing was done to it."""
        twin = self.twins.take(self.group, self.live)
        values = twin.by_role()
        noise = [_noise(value, k) for k, value in enumerate(values)]
        for value, tile in zip(values, noise, strict=True):
            probes.tile_into(value, tile)
        worked = twin.post_load(self.host)
        out: list[dict[str, Stored]] = []
        rearranged: set[tuple[int, str]] = set()
        for k, module in enumerate(twin.modules):
            names: dict[str, Stored] = {}
            for name, role in self.cluster.places[k].items():
                names[name], known = _compare_storage(find_tensor(module, name), self.cluster.roles[role], noise[role])
                if not known:
                    rearranged.add((k, name))
            out.append(names)
        if not worked and all(stored.identity for names in out for stored in names.values()):
            return out, twin
        self.twins.retire(twin)
        if rearranged:
            for (k, name), found in self._permutations(rearranged).items():
                now = out[k][name]
                out[k][name] = replace(now, held=found[0], origin=found[1]) if found else now
        return out, None

    def _permutations(self, rearranged: set[tuple[int, str]]) -> dict[tuple[int, str], tuple[Region, Region] | None]:
        bases = [storage_layout.exact_base(r.dtype) for r in self.cluster.roles]
        sizes = [blank.numel() for blank in self.blank]
        role_of = {key: self.cluster.places[key[0]][key[1]] for key in rearranged}
        passes = max(storage_layout.digits_needed(sizes[r], bases[r]) for r in role_of.values())
        shown: dict[tuple[int, str], list[torch.Tensor]] = {key: [] for key in rearranged}
        for digit in range(passes):
            values = [torch.empty_like(blank) for blank in self.blank]
            for r, value in enumerate(values):
                storage_layout.flat(value).copy_(
                    storage_layout.code(sizes[r], bases[r], digit, value.dtype, value.device)
                )
            twin = self._loaded(values)
            for key in rearranged:
                now = find_tensor(twin.modules[key[0]], key[1])
                if now is not None:
                    shown[key].append(storage_layout.flat(now).clone())
            self.twins.retire(twin)
        return {key: storage_layout.affine(shown[key], bases[role_of[key]]) for key in rearranged if shown[key]}


def _noise(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Make a tile of values of which no other order looks the same; a short tensor gets its own indices."""
    base = storage_layout.exact_base(like.dtype)
    numel = min(like.numel(), probes.PERIOD)
    if numel <= base:
        values = torch.arange(numel)
    else:
        values = torch.from_numpy(np.random.default_rng(seed).integers(0, base, numel, dtype=np.uint8))
    return values.to(like.device, like.dtype)


def _compare_storage(now: torch.Tensor | None, role: Role, tile: torch.Tensor) -> tuple[Stored, bool]:
    """Compare a module's tensor with the tile that was filled in: (its layout, False where it may be a permutation)."""
    if now is None:
        return Stored((), (), role.dtype, None, None, "post-load removed it"), True
    now = now.detach()
    lies = Stored(tuple(now.shape), tuple(now.stride()), now.dtype, None, None)
    if now.numel() != math.prod(role.shape):
        return replace(lies, why=f"post-load left {list(now.shape)} of {list(role.shape)}"), True
    if now.dtype != role.dtype:
        return replace(lies, why=f"post-load cast {role.dtype} to {now.dtype}"), True
    if not storage_layout.is_dense(now):
        return replace(lies, why="post-load left gaps between its elements"), True
    if probes.is_tiled(now, tile):
        plain = dense((now.numel(),))
        return replace(lies, held=plain, origin=plain), True
    return replace(lies, why="post-load changed its values"), False


def _first(names: Mapping[str, Stored]) -> Strategy:
    if all(s.identity for s in names.values()):
        return Strategy.IN_PLACE
    return Strategy.PERMUTED if all(s.readable for s in names.values()) else Strategy.REDO


def _storage_reason(names: Mapping[str, Stored]) -> str:
    hidden = [f"{name}: {s.why}" for name, s in names.items() if not s.readable]
    if hidden:
        return "; ".join(hidden)
    moved = [name for name, s in names.items() if not s.identity]
    return f"{', '.join(moved)} rearranged by post-load" if moved else "storage is canonical after post-load"


def _compare(
    before: dict[str, torch.Tensor] | None,
    seen: dict[str, torch.Tensor] | None,
    want: dict[str, torch.Tensor] | None,
    strategy: Strategy,
) -> str | None:
    """Say what is wrong when a module does not show the new weights; None when it does."""
    if before is None or seen is None or want is None:
        # closed state: only a strategy that builds all of it anew can be trusted
        return None if strategy is Strategy.TWIN else "its state cannot be looked into"
    if seen.keys() != want.keys():
        return f"its state differs in {', '.join(sorted(seen.keys() ^ want.keys())[:4])}"
    moved = False
    for name, reference in want.items():
        if reference.device.type == "meta":
            continue
        why = probes.deviation(seen[name], reference, probes.twin_tolerance(reference))
        if why is not None:
            return f"{name} does not follow: {why}"
        earlier = before.get(name)
        moved |= earlier is None or earlier.shape != reference.shape or not torch.equal(earlier, reference)
    return None if moved or not want else "nothing that can be seen depends on its weights"


def _check_live(live: nn.Module, choice: ModuleStrategy) -> None:
    """Raise ConfigError when a live module does not look as its twin did after post-load: no conclusion would hold."""
    for name, stored in choice.stored.items():
        now = find_tensor(live, name)
        if now is None and not stored.shape and not stored.readable:
            continue
        same = now is not None and now.dtype == stored.dtype and tuple(now.shape) == stored.shape
        if same and now is not None and (not stored.readable or tuple(now.stride()) == stored.strides):
            continue
        got = "absent" if now is None else f"{now.dtype} {list(now.shape)} strides {list(now.stride())}"
        raise ConfigError(
            "a live parameter is not what the engine's post-load makes of it",
            where=f"{choice.path}.{name} ({type(live).__name__})",
            expected=f"{stored.dtype} {list(stored.shape)} strides {list(stored.strides)}",
            got=got,
            remedy="attach after the engine has loaded, and with the configuration it was loaded with",
            names=(f"{choice.path}.{name}",),
        )


def _derived(twins: TwinSource, owners: frozenset[str] | set[str]) -> tuple[str, ...]:
    """List modules without weights of their own that have a post-load step: it derives something from others."""
    out: list[str] = []
    for path, module in twins.take_skeleton().named_modules():
        if path in owners:
            continue
        try:
            has = twins.host.post_load(module)
        except LOADER_ERRORS as error:
            if is_out_of_memory(error):
                raise
            has = True
        if has:
            out.append(path)
    twins.forget()
    return tuple(out)
