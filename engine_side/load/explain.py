"""Describe in words which way one canonical tensor takes into the live model."""

from __future__ import annotations

from bridge.model.regions import Region, dense
from engine_side.load.sources import CanonicalTensors
from engine_side.plan.bake import Baked


def explain(baked: Baked, canonical: CanonicalTensors, name: str) -> tuple[dict[str, str], ...]:
    """List a row per move of one canonical tensor, or of the tensor that it is an alias of.

    A row has tensor, parameter, source, dest, module, strategy and reason. No rows for a name that the plan lacks.
    """
    aliases = {alias: info.name for info in baked.infos for alias in info.aliases}
    wanted = aliases.get(name, name)
    return tuple(
        {
            "tensor": name,
            "parameter": f"{choice.path}.{attribute}",
            "source": _describe(move.source),
            "dest": _describe(move.dest),
            "module": choice.cls,
            "strategy": choice.strategy.value,
            "reason": choice.reason,
        }
        for choice in canonical.decided.choices.values()
        for attribute, target, _ in canonical.parts(choice)
        for move in canonical.moves.get(target, ())
        if move.tensor == wanted
    )


def _describe(region: Region) -> str:
    whole = "" if region != dense(region.shape, region.offset) else " dense"
    return f"{list(region.shape)} at {region.offset} strides {list(region.strides)}{whole}"
