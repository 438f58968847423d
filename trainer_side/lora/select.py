"""Select the tensors that travel in one push, from the pairs given to `push` and from what the mode sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from bridge.errors import DuplicateTensor, MissingTensor, UnexpectedTensor, some_names
from bridge.model.same_bits import same_bits
from trainer_side.lora.layers.module_tree import BaseTensor, LoraTree, TreeTensor
from trainer_side.lora.modes import BakedMode, EffectiveTensor
from trainer_side.names.tensor_checks import NameIndex, check_shape, require_plain, unknown_name

_CONTENTS = {
    "base": "every base tensor",
    "merged": "every base tensor and every tensor of the active adapters",
    "adapter": "every tensor of the active adapters",
}
"""What a mode sends."""


@dataclass(frozen=True, eq=False)
class SentTensors:
    """The tensors of one push, by the live tensor that each stands for (its `id`: one push long, the model holds it).

    Attributes:
        given: every live tensor that came, under any of its names.
        names: as they came.
    """

    given: dict[int, torch.Tensor]
    names: Sequence[str]

    def __call__(self, live: torch.Tensor) -> torch.Tensor:
        """Return the values that were sent for a live tensor, or the tensor itself."""
        return self.given.get(id(live), live)

    def has(self, item: TreeTensor) -> bool:
        """Tell whether the tensor came, under this name or that of a tied one."""
        return id(item.tensor()) in self.given


@dataclass(frozen=True, eq=False)
class SelectedTensors:
    """The tensors of one push.

    Attributes:
        places: of those that travel as they stand.
        computed: those that are computed while the snapshot is written.
    """

    places: tuple[BaseTensor, ...]
    computed: tuple[EffectiveTensor, ...]

    @cached_property
    def under_wrappers(self) -> tuple[BaseTensor, ...]:
        """The stored tensors to which a merge writes, among those that are read for this push."""
        read = (*self.places, *(one.place for one in self.computed))
        return tuple(place for place in read if place.wrappers)


def resolve_names(tree: LoraTree, names: Sequence[str]) -> list[TreeTensor]:
    """Find the live tensor of each name. Raises ConfigError (no str), UnexpectedTensor, DuplicateTensor."""
    found: list[TreeTensor] = []
    index = NameIndex()
    for name in names:
        index.require_text(name)
        item = tree.find(name) or tree.find(name, plain=True)
        if item is None:
            count = len(tree.places) + len(tree.extras)
            raise unknown_name(
                name, f"a parameter or persistent buffer of the model ({count} tensors, adapters included)"
            )
        index.add(item.raw, name)
        found.append(item)
    return found


def match_sent(items: Sequence[TreeTensor], names: Sequence[str], tensors: Sequence[torch.Tensor]) -> SentTensors:
    """Sort what was sent by the live tensor that it stands for.

    Raises ShapeMismatch, UnexpectedTensor (the live tensor is gone), DuplicateTensor (two names of one live tensor with
    different values), and what `require_plain` raises.
    """
    given: dict[int, torch.Tensor] = {}
    for item, name, tensor in zip(items, names, tensors, strict=True):
        live = item.tensor()
        if live is None:
            raise unknown_name(name, "the tensors that the bound model has now")
        if tensor is not live:
            tensor = require_plain(name, tensor)
            check_shape(name, tensor, tuple(live.shape))
        earlier = given.setdefault(id(live), tensor)  # the same memory is found to be so without a look at its bits
        if earlier is not tensor and not same_bits(require_plain(name, earlier), require_plain(name, tensor)):
            raise DuplicateTensor(
                "one tensor of the bound model came under two names with different values",
                where=f"{name} ({item.live})",
                expected="one value",
                got="two",
                remedy="push model.named_parameters()",
                names=(name,),
            )
    return SentTensors(given, names)


def select_tensors(mode: str, baked: BakedMode, sent: SentTensors, *, partial: bool) -> SelectedTensors:
    """Select what travels in this push of what the mode sends.

    Raises MissingTensor, with every name, when something of the mode did not come; when `partial`, only if all of it
    did not.
    """
    missing: list[str] = []
    places: list[BaseTensor] = []
    for place in baked.direct:
        if place.tensor() is None or not (partial or sent.has(place) or not place.registered):
            missing.append(place.raw)
        elif not partial or sent.has(place):
            places.append(place)
    computed = [one for one in baked.computed if not partial or any(map(sent.has, one.items))]
    if not partial:
        needed = [*(item for one in computed for item in one.items), *baked.needs]
        missing += [item.raw for item in needed if item.registered and not sent.has(item)]
    elif not places and not computed and not any(map(sent.has, baked.needs)):
        others = " or ".join(f'mode="{other}"' for other in ("merged", "base", "adapter") if other != mode)
        raise MissingTensor(
            f"nothing that was sent belongs to {'the adapter' if mode == 'adapter' else f'what {mode} mode sends'}",
            where=some_names(sent.names),
            expected=_CONTENTS[mode],
            got=f"{len(sent.names)} other tensor{'s' if len(sent.names) > 1 else ''} of the model",
            remedy=f"push some of these, or use {others}",
            names=tuple(sent.names),
        )
    if missing:
        names = tuple(dict.fromkeys(missing))
        raise MissingTensor(
            f"tensors that {mode} mode sends did not come",
            where=some_names(names),
            expected=_CONTENTS[mode],
            got=f"without {len(names)} of them",
            remedy="push all of model.named_parameters(), or say partial=True when a subset is meant",
            names=names,
        )
    # Ends that are equal by construction are computed once, under the name that stands for both.
    ties = {} if baked.known is None else baked.known.ties
    standing = {ties.get(one.place.clean, one.place.clean) for one in computed}
    return SelectedTensors(tuple(places), tuple(one for one in baked.computed if one.place.clean in standing))


def refuse_base_names(tree: LoraTree, baked: BakedMode, items: Sequence[TreeTensor], names: Sequence[str]) -> None:
    """Raise UnexpectedTensor for a computed tensor that came under the base model's name: both its base value and its
    effective value could be meant."""
    computed = {one.place for one in baked.computed}
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
