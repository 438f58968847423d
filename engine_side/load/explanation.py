"""Explain which way one canonical tensor takes into the live model: what `weighbridge explain` prints."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.model.regions import Region, dense
from engine_side.load.sources import CanonicalTensors
from engine_side.plan.bake import Baked
from engine_side.plan.clusters import Role
from engine_side.quantise.checkpoint_form import CheckpointForm


def explain_tensor(
    name: str, baked: Baked, form: CheckpointForm, canonical: CanonicalTensors
) -> tuple[dict[str, str], ...]:
    """Describe the moves of one tensor, or of the one that it is an alias of: a row each.

    A row has tensor, parameter, source, dest, module, strategy and reason. No rows for a name that the plan lacks.
    """
    aliases = {alias: info.name for info in baked.infos for alias in info.aliases}
    sent = aliases.get(name, name)
    wanted = {sent, *(made for made, owner in form.owner.items() if owner == sent)}
    return tuple(
        {
            "tensor": name if tensor == sent else tensor,
            "parameter": f"{choice.path}.{attribute}",
            "source": source,
            "dest": dest,
            "module": choice.cls,
            "strategy": choice.strategy.value,
            "reason": choice.reason,
        }
        for choice in canonical.decided.choices.values()
        for attribute, target, role in canonical.parts(choice)
        for tensor in wanted
        for source, dest in _ways(canonical, tensor, target, role)
    )


def _ways(canonical: CanonicalTensors, tensor: str, target: str, role: Role) -> Iterator[tuple[str, str]]:
    """Describe (source, dest) of every way from a tensor to a target."""
    if tensor in canonical.computed.sources.get(target, ()):
        yield "all of it, through the engine's loader", _describe(dense(role.shape))
        return
    for move in canonical.moves.get(target, ()):
        if move.tensor == tensor:
            yield _describe(move.source), _describe(move.dest)


def _describe(region: Region) -> str:
    whole = "" if region != dense(region.shape, region.offset) else " dense"
    return f"{list(region.shape)} at {region.offset} strides {list(region.strides)}{whole}"
