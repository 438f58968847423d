"""Renew the tensors that an SGLang model derives from its weights and keeps in modules without weights of their own,
such as the absorbed projections of latent attention.

The step that derives them, `post_load_weights`, belongs to the whole model. The modules that it writes to are found by
running it on a skeleton.
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


class DerivedWeights:
    """The modules of one host's live model, and of its skeletons, that the model's post-load step writes to."""

    def __init__(self) -> None:
        self._holders: tuple[str, ...] | None = None
        self._known: WeakKeyDictionary[nn.Module, tuple[ref[nn.Module], str]] = WeakKeyDictionary()
        self._roots: WeakSet[nn.Module] = WeakSet()

    def learn(self, skeleton: nn.Module) -> None:
        """Find, or remember, the modules of a fresh skeleton that the step writes to."""
        if not callable(getattr(skeleton, _STEP, None)):
            return
        if self._holders is None:
            self._holders = _holders(skeleton)
        self._know(skeleton, self._holders)

    def renew(self, module: nn.Module, live: nn.Module) -> bool:
        """Run the step for one module of `live` or of a skeleton, after its weights were written; it writes into the
        existing storages. Returns False for a module that the step does not write to."""
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
    """Return the paths of the modules that the step writes to; the whole model if it fails on a skeleton."""
    modules = list(root.named_modules())
    before = {path: (ModuleState.of(module).entries, dict(vars(module))) for path, module in modules}
    try:
        getattr(root, _STEP)()
    except LOADER_ERRORS:
        return _WHOLE
    found = []
    for path, module in modules:
        after, (entries, attributes) = ModuleState.of(module).entries, before[path]
        if after.keys() != entries.keys() or any(after[key] is not entries[key] for key in after):
            found.append(path)
            vars(module).clear()  # a skeleton stays as before the step
            vars(module).update(attributes)
    return tuple(found)
