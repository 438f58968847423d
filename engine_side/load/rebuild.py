"""Rebuild the modules whose storage cannot be written directly: by their post-load step, or from a twin of theirs."""

from __future__ import annotations

import torch

from engine_side.live.inplace import Outcome
from engine_side.load.arena_views import ArenaViews
from engine_side.load.sources import CanonicalTensors
from engine_side.plan.post_load import graft, redo
from engine_side.plan.strategies import ModuleStrategy, Strategy
from engine_side.plan.twins import Twin
from engine_side.protocol import RankHost


class Rebuilder:
    """Rebuilds modules of one plan, one at a time. `canonical` makes their tensors from a version."""

    def __init__(self, host: RankHost, canonical: CanonicalTensors) -> None:
        self._host, self._canonical = host, canonical
        self._decided = canonical.decided
        self._views: ArenaViews | None = None

    def use(self, views: ArenaViews | None) -> None:
        """Lend large weights from these views from now on, and close the ones before."""
        former, self._views = self._views, views
        if former is not None:
            former.close()

    def rebuild(self, choice: ModuleStrategy, slot: int) -> tuple[dict[str, Outcome], int]:
        """Rebuild one module from a version: (name -> what happened to it, bytes written).

        Redo runs post-load again, on the module's own storages, on copies, or on the arena's memory where that holds a
        tensor whole. Other strategies bring over what post-load made on a twin.
        """
        live = self._decided.live[choice.path]
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
            for shown in [self._views.view(self._canonical.in_one_piece(choice, name, slot))]
            if shown is not None
        }
        values = {**self._canonical.values(choice, slot, reuse=True, without=views), **views}
        views.clear()
        nbytes = sum(v.numel() * v.element_size() for v in values.values())
        try:
            template = self._decided.twins.template.get_submodule(choice.path)
            return redo(self._host, live, template, values, swap=choice.strategy is Strategy.REPLACE), nbytes
        finally:
            values.clear()  # a view that is still referenced counts as kept by the step
            if self._views is not None:
                self._views.take_back()

    def twin(self, choice: ModuleStrategy, slot: int) -> tuple[Twin, int]:
        """Make a twin of the module's cluster with the version in `slot`, post-loaded; and the module's index in it."""
        decided = self._decided
        cluster = decided.clusters[choice.path]
        twin = decided.twins.take(decided.alike[choice.path], decided.live)
        with torch.no_grad():
            for role, into in enumerate(twin.by_role()):
                self._canonical.fill_role(cluster, role, into, slot)
        twin.post_load(self._host)
        return twin, cluster.paths.index(choice.path)
