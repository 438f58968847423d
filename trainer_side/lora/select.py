"""What the caller of `push` gave: which tensor of the live model each name means, and whose values count.

From what came and what a mode sends to what travels in this push.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bridge.errors import DuplicateTensor, MissingTensor, ShapeMismatch, UnexpectedTensor
from bridge.model.same_bits import same_bits
from trainer_side.lora.layers.module_tree import BaseTensor, LoraTree, TreeTensor, WrapperTensor
from trainer_side.lora.modes import BakedMode, EffectiveTensor
from trainer_side.names.tensor_checks import not_pairs, require_plain


@dataclass(frozen=True, eq=False)
class Sent:
    """The tensors of one push, by the live tensor that each stands for (its `id`: one push long, the model holds it).

    Attributes:
        given: every live tensor that came, under any of its names.
        changed: those whose values were not given as the live tensor's own memory.
        names: as they came.
    """

    given: dict[int, torch.Tensor]
    changed: dict[int, torch.Tensor]
    names: tuple[str, ...]

    def __call__(self, live: torch.Tensor) -> torch.Tensor:
        """The values that count for a live tensor."""
        return self.changed.get(id(live), live)

    def came(self, item: TreeTensor) -> bool:
        """Whether the tensor came, under this name or that of a tied one."""
        return id(item.tensor()) in self.given


def items_of(tree: LoraTree, names: Sequence[str]) -> list[TreeTensor]:
    """What each name means. Raises ConfigError (no text), UnexpectedTensor, DuplicateTensor."""
    found: list[TreeTensor] = []
    seen: dict[TreeTensor, str] = {}
    for name in names:
        if not isinstance(name, str):
            raise not_pairs(f"item {len(found)}", f"a name of type {type(name).__name__}")
        item = tree.find(name) or tree.find_plain(name)
        if item is None:
            raise _unknown(tree, name)
        if item in seen:
            raise DuplicateTensor(
                "the same tensor was sent twice",
                where=item.live,
                expected="each name once",
                got=f"{seen[item]!r} and {name!r}",
                remedy="push one iterable over one model",
                names=(item.live,),
            )
        seen[item] = name
        found.append(item)
    return found


def sent(items: Sequence[TreeTensor], names: Sequence[str], tensors: Sequence[torch.Tensor]) -> Sent:
    """Sort what came by live tensor.

    Raises ShapeMismatch, DuplicateTensor (one live tensor, two names, different values), and what `tensors.require_plain` does.
    """
    given: dict[int, torch.Tensor] = {}
    changed: dict[int, torch.Tensor] = {}
    for item, name, tensor in zip(items, names, tensors, strict=True):
        live = item.tensor()
        if live is None:
            raise UnexpectedTensor("the live model no longer has this tensor", where=name, names=(name,))
        key = id(live)
        if tensor is not live:
            tensor = _checked(item, name, tensor, live)
            if not _same_memory(tensor, live):
                changed[key] = tensor
        earlier = given.get(key)
        if earlier is not None and earlier is not tensor and not _same_memory(earlier, tensor):
            _require_equal(item, name, require_plain(name, earlier), require_plain(name, tensor))
        given[key] = tensor
    return Sent(given, changed, tuple(names))


def _checked(item: TreeTensor, name: str, tensor: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    tensor = require_plain(name, tensor)
    if tensor.shape != live.shape:
        raise ShapeMismatch(
            "a tensor does not have the bound model's shape",
            where=name,
            expected=str(list(live.shape)),
            got=str(list(tensor.shape)),
            remedy="push the tensors of the bound model",
            names=(name,),
        )
    return tensor


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.stride() != b.stride() or a.is_meta or b.is_meta:
        return False
    return a.data_ptr() == b.data_ptr() and a.numel() > 0


def _require_equal(item: TreeTensor, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    if not same_bits(a, b):
        raise DuplicateTensor(
            "one tensor of the bound model came under two names with different values",
            where=f"{name} ({item.live})",
            expected="one value",
            got="two",
            remedy="push model.named_parameters()",
            names=(name,),
        )


def _unknown(tree: LoraTree, name: str) -> UnexpectedTensor:
    count = len(tree.places) + sum(isinstance(e, WrapperTensor) for e in tree.extras)
    return UnexpectedTensor(
        "the bound model has no tensor of this name",
        where=name,
        expected=f"a parameter or persistent buffer of the model ({count} tensors, adapters included)",
        got=repr(name),
        remedy="push the tensors of the bound model, or bind the model that these belong to",
        names=(name,),
    )


TensorSlot = tuple[Mapping[str, torch.Tensor | None], str]
"""Where the live tree holds a tensor: one look-up away."""


def slot_of(item: TreeTensor) -> TensorSlot:
    """The dictionary and key under which a tensor lies now."""
    if item.buffer:
        return item.owner._buffers, item.attribute
    if item.attribute in item.owner._parameters:
        return item.owner._parameters, item.attribute
    return vars(item.owner), item.attribute


@dataclass(frozen=True, eq=False)
class Chosen:
    """What travels: the places of `named`, its pairs, and the computed ones."""

    places: tuple[BaseTensor, ...]
    named: list[tuple[str, torch.Tensor]]
    made: tuple[EffectiveTensor, ...]


def assemble(mode: str, baked: BakedMode, came: Sent, *, partial: bool) -> Chosen:
    """Raises MissingTensor, with every name, when something of the mode did not come; when `partial`, if all of it
    did not."""
    missing: list[str] = []
    places: list[BaseTensor] = []
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


def refuse_plain_names(tree: LoraTree, baked: BakedMode, items: Sequence[TreeTensor], names: Sequence[str]) -> None:
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


def _absent(items: Iterable[BaseTensor | WrapperTensor], came: Callable[[TreeTensor], bool]) -> list[str]:
    return [
        i.raw for i in items if not i.buffer and not came(i) and not (isinstance(i, BaseTensor) and not i.registered)
    ]


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
