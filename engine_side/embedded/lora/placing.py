"""Which slots an adapter's tensors belong in: names through the model's own table, shapes against the layers'."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from bridge.errors import (
    BridgeError,
    DtypeMismatch,
    DuplicateTensor,
    MissingTensor,
    ShapeMismatch,
    UnexpectedTensor,
    UnsupportedLora,
)
from bridge.model.dtypes import dtype_of
from bridge.model.lora_format import LoraPair, LoraSpec, pairs
from bridge.model.manifest import TensorInfo
from engine_side.embedded.decoder import CausalLM
from engine_side.embedded.lora.layers import BaseLayerWithLoRA
from engine_side.embedded.lora.slots import Part, PartKey, key_of

_SHOWN = 8


@dataclass(frozen=True)
class Place:
    """Where one pair of an adapter goes."""

    pair: LoraPair
    layer: BaseLayerWithLoRA
    key: PartKey

    @property
    def part(self) -> Part:
        return self.layer.parts[self.key]


def places(
    model: CausalLM,
    layers: Mapping[str, BaseLayerWithLoRA],
    silent: Collection[str],
    tensors: Sequence[TensorInfo],
    spec: LoraSpec,
    max_rank: int,
) -> tuple[Place, ...]:
    """The places of all pairs of an adapter.

    Args:
        layers: path in the engine -> wrapped layer.
        silent: those of them that the engine never calls.

    Raises what `LoraManager.plan` says.
    """
    if not 0 < spec.rank <= max_rank:
        raise UnsupportedLora(
            "the adapter's rank is not one that this engine has room for",
            where="rank",
            expected=f"1 to {max_rank} (max_lora_rank)",
            got=str(spec.rank),
            remedy=f"start the engine with max_lora_rank={spec.rank} or more, or push with mode='merged'",
        )
    _distinct(tensors)
    found: list[Place] = []
    refused: dict[str, list[LoraPair]] = {}
    announced = pairs(tensors)

    @cache
    def known() -> frozenset[str]:  # one walk, and only for an adapter that is refused
        return frozenset(name for name, _ in model.named_modules())

    for pair in announced:
        place = _place(model, layers, silent, pair, known)
        if isinstance(place, Place):
            found.append(place)
        else:
            refused.setdefault(place, []).append(pair)
    if refused:
        raise _refusal(refused, layers)
    if not announced:
        raise MissingTensor(
            "the adapter binds no module", where="adapter", expected="at least one pair of A and B", got="no tensor"
        )
    for place in found:
        _check(place, spec.rank)
    return tuple(found)


def _distinct(tensors: Sequence[TensorInfo]) -> None:
    seen: set[str] = set()
    for info in tensors:
        if info.name in seen:
            raise DuplicateTensor("an adapter's tensor was sent twice", where=info.name, names=(info.name,))
        seen.add(info.name)


def _place(
    model: CausalLM,
    layers: Mapping[str, BaseLayerWithLoRA],
    silent: Collection[str],
    pair: LoraPair,
    known: Callable[[], Collection[str]],
) -> Place | str:
    """The place of a pair, or why it has none; `known` are the paths of all modules."""
    target, arguments = model.resolve(f"{pair.module}.weight")
    path = target.rpartition(".")[0]
    layer, key = layers.get(path), key_of(arguments)
    if layer is None:
        return "not wrapped for LoRA" if path in known() else "not in this model"
    if key not in layer.parts:
        return "not in this model"
    if layer.embedding is not pair.embedding:
        return "an embedding, which takes lora_embedding_A and _B" if layer.embedding else "not an embedding"
    if path in silent:
        return "never called by the engine, which uses its weight in another way"
    return Place(pair, layer, key)


def _refusal(refused: Mapping[str, Sequence[LoraPair]], layers: Mapping[str, BaseLayerWithLoRA]) -> BridgeError:
    modules = [pair.module for pairs in refused.values() for pair in pairs]
    got = "; ".join(f"{reason}: {_some([pair.module for pair in pairs])}" for reason, pairs in refused.items())
    return UnexpectedTensor(
        "the engine has no place for parts of this adapter",
        where=_some(modules),
        expected=f"modules among its {len(layers)} LoRA layers: {_some(sorted({_last(path) for path in layers}))}",
        got=got,
        remedy="check the names' prefix, start the engine with lora_targets that include these modules, "
        "or push with mode='merged'",
        names=tuple(modules),
    )


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _check(place: Place, rank: int) -> None:
    """Raises ShapeMismatch or DtypeMismatch, naming the tensor."""
    pair, wanted = place.pair, place.part.shapes(rank)
    both = (tuple(pair.a.shape), tuple(pair.b.shape))
    if both != wanted:
        swapped = both == (wanted[1], wanted[0])
        turned = both == (wanted[0][::-1], wanted[1][::-1])
        wrong = pair.a if both[0] != wanted[0] else pair.b
        raise ShapeMismatch(
            "an adapter's A and B are exchanged" if swapped else "an adapter's tensor has another shape",
            where=wrong.name,
            expected=f"A {list(wanted[0])}, B {list(wanted[1])} at rank {rank}",
            got=f"A {list(both[0])}, B {list(both[1])}",
            remedy="send A as [rank, inputs] and B as [outputs, rank]"
            + (", not transposed" if turned else "")
            + ", all pairs padded to one rank",
            names=(pair.a.name, pair.b.name),
        )
    for info in (pair.a, pair.b):
        if not dtype_of(info.dtype).is_floating_point:
            raise DtypeMismatch(
                "an adapter's tensor is not of a floating dtype", where=info.name, expected="a floating dtype",
                got=info.dtype, names=(info.name,),
            )  # fmt: skip
