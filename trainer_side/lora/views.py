"""From what came and what a mode sends to what travels in this push."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bridge.errors import MissingTensor, UnexpectedTensor
from trainer_side.lora.modes import Baked, Made
from trainer_side.lora.sent import Sent
from trainer_side.lora.tree import Extra, Item, Place, Tree

Slot = tuple[Mapping[str, torch.Tensor | None], str]
"""Where the live tree holds a tensor: one look-up away."""


def slot_of(item: Item) -> Slot:
    """The dictionary and key under which a tensor lies now."""
    if item.buffer:
        return item.owner._buffers, item.attribute
    if item.attribute in item.owner._parameters:
        return item.owner._parameters, item.attribute
    return vars(item.owner), item.attribute


@dataclass(frozen=True, eq=False)
class Chosen:
    """What travels: the places of `named`, its pairs, and the computed ones."""

    places: tuple[Place, ...]
    named: list[tuple[str, torch.Tensor]]
    made: tuple[Made, ...]


def assemble(mode: str, baked: Baked, came: Sent, *, partial: bool) -> Chosen:
    """Raises MissingTensor, with every name, when something of the mode did not come; when `partial`, if all of it
    did not."""
    missing: list[str] = []
    places: list[Place] = []
    named: list[tuple[str, torch.Tensor]] = []
    for place in baked.direct:
        live = place.tensor()
        if live is None:
            missing.append(place.raw)
            continue
        tensor = came.given.get(id(live))
        if tensor is None:
            if partial:
                continue
            # `named_parameters()` leaves these out, so nobody can be asked for them.
            if not place.buffer and place.registered:
                missing.append(place.raw)
            tensor = live
        places.append(place)
        named.append((place.clean, tensor))
    made = tuple(one for one in baked.made if not partial or any(map(came.came, one.items)))
    if not partial:
        missing += _absent([item for one in made for item in one.items], came.came)
        missing += _absent(baked.needs, came.came)
    elif not places and not made and not any(map(came.came, baked.needs)):
        raise _beside(mode, came.names)
    if missing:
        raise _missing(mode, tuple(dict.fromkeys(missing)))
    # Ends that are equal by construction are computed once, under the name that stands for both.
    ties = {} if baked.known is None else baked.known.ties
    standing = {ties.get(one.place.clean, one.place.clean) for one in made}
    return Chosen(tuple(places), named, tuple(one for one in baked.made if one.place.clean in standing))


def refuse_plain_names(tree: Tree, baked: Baked, items: Sequence[Item], names: Sequence[str]) -> None:
    """Under the base model's name of a computed tensor both its base and its effective values could be meant."""
    computed = {one.place for one in baked.made}
    for item, name in zip(items, names, strict=True):
        if item in computed and tree.find(name) is None:
            raise UnexpectedTensor(
                "a layer's weight came under its base name while an adapter acts on it",
                where=name,
                expected=f"{item.live}, with the adapter's tensors",
                got=repr(name),
                remedy="push model.named_parameters() of the bound model",
                names=(name,),
            )


def _absent(items: Iterable[Place | Extra], came: Callable[[Item], bool]) -> list[str]:
    return [i.raw for i in items if not i.buffer and not came(i) and not (isinstance(i, Place) and not i.registered)]


def _beside(mode: str, names: tuple[str, ...]) -> MissingTensor:
    others = " or ".join(f'mode="{other}"' for other in ("merged", "base", "adapter") if other != mode)
    what = "the adapter" if mode == "adapter" else f"what {mode} mode sends"
    return MissingTensor(
        f"nothing that was sent belongs to {what}",
        where=_some(names),
        expected=_sends(mode),
        got=f"{len(names)} other tensor{'s' if len(names) > 1 else ''} of the model",
        remedy=f"push some of these, or use {others}",
        names=names,
    )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _sends(mode: str) -> str:
    if mode == "base":
        return "every base tensor"
    acting = "every tensor of the active adapters"
    return acting if mode == "adapter" else f"every base tensor and {acting}"


def _missing(mode: str, names: tuple[str, ...]) -> MissingTensor:
    return MissingTensor(
        f"tensors that {mode} mode sends did not come",
        where=_some(names),
        expected=_sends(mode),
        got=f"without {len(names)} of them",
        remedy="push all of model.named_parameters(), or say partial=True when a subset is meant",
        names=names,
    )
