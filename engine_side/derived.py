"""What a module without weights of its own has computed from those that hang below it (an attention layer's absorbed
projections): built anew on a fresh skeleton from the arena's weights, and compared with what the live module holds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from engine_side import probes
from engine_side.loader import Loader
from engine_side.strategies import Choice, Strategy
from engine_side.twins import materialise, reachable, tensor_of


class DerivedState:
    """Over one mapped Loader; knows which of its derived modules can be built alone."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        template = loader.decided.twins.template
        self._below = {path: _below(loader, template.get_submodule(path)) for path, _ in loader.derived}

    @property
    def paths(self) -> tuple[str, ...]:
        """The modules that are looked at."""
        return tuple(path for path, choices in self._below.items() if choices)

    def wrong(self, slot: int) -> Iterator[tuple[str, str, str]]:
        """(path, class, why) of every derived module that does not hold what the arena's weights give. Builds one
        skeleton; gives memory to the modules below one derived module at a time."""
        if not self.paths:
            return
        skeleton = self._loader.host.skeleton()
        for path, live in self._loader.derived:
            if self._below[path]:
                why = self._compare(skeleton, path, live, slot)
                if why is not None:
                    yield path, type(live).__name__, why

    def _compare(self, skeleton: nn.Module, path: str, live: nn.Module, slot: int) -> str | None:
        module, host = skeleton.get_submodule(path), self._loader.host
        materialise(module, live, {}, {}, [])
        with torch.no_grad():
            for choice in self._below[path]:
                below = skeleton.get_submodule(choice.path)
                materialise(below, self._loader.decided.live[choice.path], {}, {}, [])
                for name, value in self._loader.values(choice, slot).items():
                    tensor_of(below, name).detach().copy_(value)
            for choice in self._below[path]:
                host.post_load(skeleton.get_submodule(choice.path))
            before = reachable(module)[0]
            host.post_load(module)
        made = {
            name: tensor
            for name, tensor in reachable(module)[0].items()
            if tensor is not before.get(name) and tensor.device.type != "meta"
        }
        return probes.state_deviation(reachable(live)[0], made)


def _below(loader: Loader, module: nn.Module) -> tuple[Choice, ...]:
    """The choices of the modules below `module`; none where one of them can only be filled by the engine's loader."""
    inside = {id(m) for m in module.modules()}
    template, choices = loader.decided.twins.template, loader.decided.choices
    found = tuple(c for path, c in choices.items() if id(template.get_submodule(path)) in inside)
    return () if any(choice.strategy is Strategy.NATIVE for choice in found) else found
