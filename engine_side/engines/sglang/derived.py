"""What a model of SGLang computes from its weights once they are loaded, and keeps in modules that have none of their
own (the absorbed projections of latent attention).

That step, `post_load_weights`, belongs to the whole model and knows its layers by itself. Which modules it leaves
something in is found by running it on a skeleton.
"""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import nn

from engine_side.plan.loader_errors import LOADER_ERRORS
from engine_side.plan.twins import ModuleState

_STEP = "post_load_weights"
_WHOLE = ("",)


class Derived:
    """Over one host's live model and its skeletons."""

    def __init__(self) -> None:
        self._holders: tuple[str, ...] | None = None
        self._known: WeakKeyDictionary[nn.Module, tuple[ref[nn.Module], str]] = WeakKeyDictionary()
        self._roots: WeakSet[nn.Module] = WeakSet()

    def learn(self, skeleton: nn.Module) -> None:
        """Remember the modules of a fresh skeleton that the step is about."""
        if not callable(getattr(skeleton, _STEP, None)):
            return
        if self._holders is None:
            self._holders = _holders(skeleton)
        self._know(skeleton, self._holders)

    def renew(self, module: nn.Module, live: nn.Module) -> bool:
        """Run the step for what `module` keeps, a module of `live` or of a skeleton; False where it keeps nothing. The
        step writes into the storages that are there."""
        if self._holders is not None and live not in self._roots:
            self._know(live, self._holders)
        root, path = self._known.get(module, (None, ""))
        owner = None if root is None else root()
        if owner is None:
            return False
        step: Any = getattr(owner, _STEP)
        if path and "weight_names" in inspect.signature(step).parameters:
            step(weight_names=[f"{path}.{name}" for name, _ in module.named_parameters()])
        else:
            step()
        return True

    def _know(self, root: nn.Module, paths: tuple[str, ...]) -> None:
        self._roots.add(root)
        for path in paths:
            self._known[root.get_submodule(path)] = (ref(root), path)


def _holders(root: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that the step leaves something in; the whole model where a skeleton cannot show it."""
    before = {path: ModuleState.of(module).entries for path, module in root.named_modules()}
    try:
        getattr(root, _STEP)()
    except LOADER_ERRORS:
        return _WHOLE
    found = []
    for path, module in root.named_modules():
        after = ModuleState.of(module).entries
        if after.keys() != before[path].keys() or any(after[key] is not before[path][key] for key in after):
            found.append(path)
    for path in found:  # a skeleton is as before the step
        own = {name: value for (owner, name), value in before[path].items() if not owner}
        state = root.get_submodule(path).__dict__
        for name in [name for owner, name in ModuleState.of(root.get_submodule(path)).entries if not owner]:
            if name in own:
                state[name] = own[name]
            else:
                del state[name]
    return tuple(found)
