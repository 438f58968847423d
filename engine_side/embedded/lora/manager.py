"""Adapters of one rank: what can be loaded, into which slot, and what lies there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bridge.dtypes import dtype_name, dtype_of
from bridge.errors import ConfigError, DtypeMismatch, MissingTensor, NotFound, ShapeMismatch, UnsupportedLora
from bridge.errors import UnexpectedTensor as Unexpected
from bridge.lora import AdapterSpec, LoraLimits, Pair, pairs
from bridge.manifest import TensorInfo
from engine_side.adapters.base import AdapterView
from engine_side.embedded.decoder import CausalLM
from engine_side.embedded.lora.context import LoraContext
from engine_side.embedded.lora.layers import BaseLayerWithLoRA, FusedMoEWithLoRA, wrap
from engine_side.embedded.lora.slots import Part, PartKey, key_of
from engine_side.embedded.lora.targets import to_wrap
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.wrappers import unwrap

_SHOWN = 8
_WARM_UP = "warm-up"


@dataclass(frozen=True)
class _Place:
    """Where one pair of an adapter goes."""

    pair: Pair
    layer: BaseLayerWithLoRA
    key: PartKey

    @property
    def part(self) -> Part:
        return self.layer.parts[self.key]


@dataclass(frozen=True)
class _Held:
    """An adapter in its slot."""

    slot: int
    rank: int
    places: tuple[_Place, ...]


def warm_up_rank(needs: Iterable[int], max_rank: int) -> int:
    """The rank of the adapter that a warm-up runs with: the smallest that every need divides (experts that are sharded
    over n ranks need a multiple of n), at least 1. Raises ConfigError when that is above `max_rank`."""
    rank = math.lcm(*needs)
    if rank > max_rank:
        raise ConfigError(
            "no adapter that the engine's sharded experts could be warmed up with fits",
            where="max_lora_rank",
            expected=f"at least {rank}",
            got=str(max_rank),
            remedy=f"start with max_lora_rank={rank} or more, or on fewer ranks",
        )
    return rank


class LoraManager:
    """Wraps the layers of `model` in place, after its post-load, and keeps their adapters. Used by the thread that runs
    the model; every rank has one and is told the same in the same order, so that all have the same slots.

    Args:
        max_loras: how many adapters are held at once.
        max_rank: the largest rank of an adapter; every slot is that large.
        targets: see `to_wrap`.
        tp: this rank's tensor-parallel state.

    Raises ConfigError (see `to_wrap`, `warm_up_rank`); the model is then as it was.
    """

    def __init__(
        self, model: CausalLM, *, max_loras: int, max_rank: int, targets: Sequence[str] | None, tp: Parallel
    ) -> None:
        self.limits = LoraLimits(max_rank, max_loras)
        self.context = LoraContext()
        self._model = model
        self._held: dict[str, _Held] = {}
        self._used: set[str] = set()
        self._warmed = False
        chosen = to_wrap(model, targets)
        sharded = tp.size if any(issubclass(_class(f.core), FusedMoEWithLoRA) for f in chosen) else 1
        self._warm_up_rank = warm_up_rank([sharded], max_rank)
        made: dict[int, BaseLayerWithLoRA] = {}
        self._layers: dict[str, BaseLayerWithLoRA] = {}
        for found in chosen:
            layer = made.get(id(found.module)) or wrap(found.module, self.context, max_loras, max_rank)
            made[id(found.module)] = self._layers[found.path] = layer
            setattr(found.parent, found.name, layer)
