"""Verify derived state: tensors that a module without weights has computed from the weights below or beside it.

Such as the absorbed projections of an attention layer. The state is built anew, on a fresh skeleton from the arena's
weights, and compared with that of the live module.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from engine_side.load.loader import Loader
from engine_side.plan import probes
from engine_side.plan.experiment_errors import experiment_step, is_out_of_memory
from engine_side.plan.loader_errors import LOADER_ERRORS
from engine_side.plan.post_load import reachable, require_tensor
from engine_side.plan.strategies import ModuleStrategy
from engine_side.plan.twins import materialise


class DerivedState:
    """The derived modules of one mapped Loader; knows which of them can be built alone, and from which modules."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._from = {path: self._below(path) for path, _ in loader.derived}
        """Path -> the modules whose weights it is built from; empty where it is not checked."""
        self._below_known = frozenset(path for path, choices in self._from.items() if choices)
        self._tried = set(self._below_known)
        for path in self._from.keys() - self._tried:
            # It may hold its sources where no module tree shows them; the first check shows whether it does.
            self._from[path] = tuple(map(loader.decided.choices.__getitem__, loader.sources_of[path]))

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the modules that are checked."""
        return tuple(path for path, choices in self._from.items() if choices)

    def wrong(self, slot: int) -> Iterator[tuple[str, str, str]]:
        """Yield (path, class, why) of every derived module whose state does not follow from the arena's weights.

        Builds a skeleton, and another one where two modules derive from the same weights.
        """
        if not self.paths:
            return
        skeleton, used = self._loader.host.skeleton(), set[str]()
        for path, live in self._loader.derived:
            sources = {choice.path for choice in self._from[path]}
            if not sources:
                continue
            if not used.isdisjoint(sources):  # they have been through their post-load step
                skeleton, used = self._loader.host.skeleton(), set()
            used |= sources
            with experiment_step("building derived state on a skeleton", f"{path} ({type(live).__name__})"):
                try:
                    made = self._build(skeleton, path, live, slot)
                except LOADER_ERRORS as error:
                    if path in self._tried or is_out_of_memory(error):
                        raise
                    made = {}
            if not made:
                self._forget_its_like(path, live)
                continue
            self._tried.add(path)
            why = probes.state_deviation(reachable(live)[0], made)
            if why is not None:
                yield path, type(live).__name__, why

    def _build(self, skeleton: nn.Module, path: str, live: nn.Module, slot: int) -> dict[str, torch.Tensor]:
        """Run the step on the arena's weights and return the tensors that it makes."""
        module, host = skeleton.get_submodule(path), self._loader.host
        materialise(module, live, {}, {}, [])
        with torch.no_grad():
            for choice in self._from[path]:
                source = skeleton.get_submodule(choice.path)
                materialise(source, self._loader.decided.live[choice.path], {}, {}, [])
                for name, value in self._loader.canonical.values(choice, slot).items():
                    require_tensor(source, name).detach().copy_(value)
            for choice in self._from[path]:
                host.post_load(skeleton.get_submodule(choice.path))
            before = reachable(module)[0]
            host.post_load(module)
        made = {
            name: tensor
            for name, tensor in reachable(module)[0].items()
            if tensor is not before.get(name) and tensor.device.type != "meta"
        }
        if path in self._below_known:
            return made
        # a tensor that was there before may as well be a constant, of which a skeleton knows nothing
        return {name: tensor for name, tensor in made.items() if name not in before}

    def _forget_its_like(self, path: str, live: nn.Module) -> None:
        """Stop checking modules of a class of which one keeps nothing.

        Many engines have a step that only sets flags in every layer, and building all around each of them would cost as
        much as the load.
        """
        if path in self._tried:
            return
        for other, module in self._loader.derived:
            if other not in self._tried and type(module) is type(live):
                self._from[other] = ()

    def _below(self, path: str) -> tuple[ModuleStrategy, ...]:
        template = self._loader.decided.twins.template
        inside = {id(m) for m in template.get_submodule(path).modules()}
        choices = self._loader.decided.choices
        return tuple(choices[path] for path in choices if id(template.get_submodule(path)) in inside)
