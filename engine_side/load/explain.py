"""Which way one canonical tensor takes into the live model, in words."""

from __future__ import annotations

from bridge.model.regions import Move, Region, dense
from engine_side.load.sources import CanonicalTensors
from engine_side.plan.bake import Baked
from engine_side.plan.strategies import ModuleStrategy


def explain(baked: Baked, canonical: CanonicalTensors, name: str) -> tuple[dict[str, str], ...]:
    """A row per move of one canonical tensor, or of the tensor that it is an alias of: tensor, parameter, source, dest,
    module, strategy, reason. Empty for a name that is not in the plan."""
    rows: list[dict[str, str]] = []
    aliases = {alias: info.name for info in baked.infos for alias in info.aliases}
    wanted = aliases.get(name, name)
    for path, choice in canonical.decided.choices.items():
        cluster = canonical.decided.clusters[path]
        for attribute, role in canonical.places(choice):
            moves = canonical.moves.get(cluster.targets[role], ())
            rows.extend(_row(name, move, choice, attribute) for move in moves if move.tensor == wanted)
    return tuple(rows)


def _row(name: str, move: Move, choice: ModuleStrategy, attribute: str) -> dict[str, str]:
    return {
        "tensor": name,
        "parameter": f"{choice.path}.{attribute}",
        "source": _show(move.source),
        "dest": _show(move.dest),
        "module": choice.cls,
        "strategy": choice.strategy.value,
        "reason": choice.reason,
    }


def _show(region: Region) -> str:
    whole = "" if region != dense(region.shape, region.offset) else " dense"
    return f"{list(region.shape)} at {region.offset} strides {list(region.strides)}{whole}"
