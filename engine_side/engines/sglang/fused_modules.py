"""Find which modules of a checkpoint end in one fused parameter of the engine, by tracing the engine's own loader."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from bridge.model.manifest import TensorInfo
from engine_side.plan import bake
from engine_side.plan.loader_errors import LoaderRaised
from engine_side.plan.unfilled import checkpoint_tensors
from engine_side.protocol import RankHost


class FusedModules:
    """The modules of the checkpoint that the engine was started from; none if that folder is not at hand. Traced once,
    when it is first asked."""

    def __init__(self, host: RankHost, checkpoint: Path | None) -> None:
        self._host = host
        self._checkpoint = checkpoint

    def shape(self, module: str) -> tuple[int, int] | None:
        """Return (outputs, inputs) of a module's weight; None for a module that is not in the checkpoint."""
        return self._shapes.get(module)

    def fused_with(self, module: str) -> Mapping[str, tuple[int, int]]:
        """Return the shapes of the modules that share a parameter with this one, itself included."""
        return {name: self._shapes[name] for name in self._groups.get(module, ())}

    @cached_property
    def _infos(self) -> tuple[TensorInfo, ...]:
        return () if self._checkpoint is None else checkpoint_tensors(self._checkpoint)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, int]]:
        found = [i for i in self._infos if len(i.shape) == 2 and i.name.endswith(".weight")]
        return {i.name.removesuffix(".weight"): (i.shape[0], i.shape[1]) for i in found}

    @cached_property
    def _groups(self) -> dict[str, tuple[str, ...]]:
        try:
            found = bake.trace(self._host, bake.stand_ins(self._infos)) if self._infos else None
        except LoaderRaised:
            return {}
        landed: dict[str, dict[str, None]] = {}
        for move in found.moves if found is not None else ():
            module = move.tensor.removesuffix(".weight")
            if module in self._shapes:
                landed.setdefault(move.target, {})[module] = None
        return {name: tuple(names) for names in landed.values() for name in names}
