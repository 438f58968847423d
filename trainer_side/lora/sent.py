"""What the caller of `push` gave: which tensor of the live model each name means, and whose values count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bridge.errors import DuplicateTensor, ShapeMismatch, UnexpectedTensor
from trainer_side.lora.tree import Extra, Item, Tree
from trainer_side.tensors import not_pairs, plain
from trainer_side.ties import same_bits


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

    def came(self, item: Item) -> bool:
        """Whether the tensor came, under this name or that of a tied one."""
        return id(item.tensor()) in self.given


def items_of(tree: Tree, names: Sequence[str]) -> list[Item]:
    """What each name means. Raises ConfigError (no text), UnexpectedTensor, DuplicateTensor."""
    found: list[Item] = []
    seen: dict[Item, str] = {}
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


def sent(items: Sequence[Item], names: Sequence[str], tensors: Sequence[torch.Tensor]) -> Sent:
    """Sort what came by live tensor.

    Raises ShapeMismatch, DuplicateTensor (one live tensor, two names, different values), and what `tensors.plain` does.
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
            _require_equal(item, name, plain(name, earlier), plain(name, tensor))
        given[key] = tensor
    return Sent(given, changed, tuple(names))


def _checked(item: Item, name: str, tensor: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    tensor = plain(name, tensor)
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


def _require_equal(item: Item, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    if not same_bits(a, b):
        raise DuplicateTensor(
            "one tensor of the bound model came under two names with different values",
            where=f"{name} ({item.live})",
            expected="one value",
            got="two",
            remedy="push model.named_parameters()",
            names=(name,),
        )


def _unknown(tree: Tree, name: str) -> UnexpectedTensor:
    count = len(tree.places) + sum(isinstance(e, Extra) for e in tree.extras)
    return UnexpectedTensor(
        "the bound model has no tensor of this name",
        where=name,
        expected=f"a parameter or persistent buffer of the model ({count} tensors, adapters included)",
        got=repr(name),
        remedy="push the tensors of the bound model, or bind the model that these belong to",
        names=(name,),
    )
