"""Places of a LoRA's tensors: names through the model's own table, shapes against the layers' slots."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from bridge.errors import (
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
from engine_side.embedded.lora.slots import LoraPart, PartKey

_SHOWN = 8


@dataclass(frozen=True)
class LoraPlace:
    """The layer, and its part, that one pair of a LoRA belongs to."""

    pair: LoraPair
    layer: BaseLayerWithLoRA
    key: PartKey

    @property
    def part(self) -> LoraPart:
        return self.layer.parts[self.key]


def place_pairs(
    model: CausalLM,
    layers: Mapping[str, BaseLayerWithLoRA],
    uncalled: Collection[str],
    tensors: Sequence[TensorInfo],
    spec: LoraSpec,
    max_rank: int,
) -> tuple[LoraPlace, ...]:
    """Find the places of all pairs of a LoRA. Raises what `LoraManager.plan` says.

    Args:
        layers: path in the engine -> wrapped layer.
        uncalled: those of these paths whose layer no forward calls.
    """
    if not 0 < spec.rank <= max_rank:
        raise UnsupportedLora(
            "the LoRA's rank is not one that this engine has room for",
            where="rank",
            expected=f"1 to {max_rank} (max_lora_rank)",
            got=str(spec.rank),
            remedy=f"start the engine with max_lora_rank={spec.rank} or more, or push with mode='merged'",
        )
    names = [info.name for info in tensors]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        remedy = "send every tensor of the LoRA once"
        raise DuplicateTensor("a LoRA's tensor was sent twice", where=twice, remedy=remedy, names=(twice,))
    places: list[LoraPlace] = []
    refused: dict[str, list[str]] = {}
    known: set[str] = set()
    for pair in (announced := pairs(tensors)):
        target, arguments = model.resolve(f"{pair.module}.weight")
        path = target.rpartition(".")[0]
        layer, key = layers.get(path), (arguments.get("shard_id"), arguments.get("expert_id"))
        if layer is None:
            known = known or {name for name, _ in model.named_modules()}  # one walk, only for a LoRA that is refused
            reason = "not wrapped for LoRA" if path in known else "not in this model"
        elif key not in layer.parts:
            reason = "not in this model"
        elif layer.embedding is not pair.embedding:
            reason = "an embedding, which takes lora_embedding_A and _B" if layer.embedding else "not an embedding"
        elif path in uncalled:
            reason = "never called by the engine, which uses its weight in another way"
        else:
            places.append(LoraPlace(pair, layer, key))
            continue
        refused.setdefault(reason, []).append(pair.module)
    if refused:
        raise _unplaced(refused, layers)
    if not announced:
        raise MissingTensor(
            "the LoRA binds no module",
            where="adapter",
            expected="at least one pair of A and B",
            got="no tensor",
            remedy="check the target modules of the trainer's LoRA",
        )
    for place in places:
        _check(place, spec.rank)
    return tuple(places)


def _unplaced(refused: Mapping[str, Sequence[str]], layers: Collection[str]) -> UnexpectedTensor:
    """The error for modules without a place, by reason."""
    modules = tuple(module for group in refused.values() for module in group)
    last = sorted({path.rpartition(".")[2] for path in layers})
    return UnexpectedTensor(
        "the engine has no place for parts of this LoRA",
        where=_some(modules),
        expected=f"modules among its {len(layers)} LoRA layers: {_some(last)}",
        got="; ".join(f"{reason}: {_some(group)}" for reason, group in refused.items()),
        remedy="check the names' prefix, start the engine with lora_targets that include these modules, "
        "or push with mode='merged'",
        names=modules,
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _check(place: LoraPlace, rank: int) -> None:
    """Raises ShapeMismatch or DtypeMismatch, naming the tensor."""
    pair, wanted = place.pair, place.part.shapes(rank)
    both = (tuple(pair.a.shape), tuple(pair.b.shape))
    if both != wanted:
        swapped = both == (wanted[1], wanted[0])
        turned = both == (wanted[0][::-1], wanted[1][::-1])
        raise ShapeMismatch(
            "a LoRA's A and B are exchanged" if swapped else "a LoRA's tensor has another shape",
            where=pair.a.name if both[0] != wanted[0] else pair.b.name,
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
                "a LoRA's tensor is not of a floating dtype",
                where=info.name,
                expected="a floating dtype",
                got=info.dtype,
                remedy="send the LoRA's A and B in bf16, fp16 or fp32",
                names=(info.name,),
            )
