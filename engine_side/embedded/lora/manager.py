"""The LoRAs of one rank: checks, slots, loading, views for the read-back, and the warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bridge.errors import ConfigError, NotFound
from bridge.model.dtypes import dtype_name
from bridge.model.lora_format import LoraLimits, LoraSpec
from bridge.model.manifest import TensorInfo
from engine_side.embedded.decoder import CausalLM
from engine_side.embedded.lora.context import LoraContext
from engine_side.embedded.lora.layers import BaseLayerWithLoRA, FusedMoEWithLoRA, wrap
from engine_side.embedded.lora.placing import LoraPlace, place_pairs
from engine_side.embedded.lora.targets import to_wrap
from engine_side.embedded.parallel import Parallel
from engine_side.protocol import LoraView

_WARM_UP = "warm-up"


@dataclass(frozen=True)
class _LoadedLora:
    """A LoRA in its slot."""

    slot: int
    rank: int
    places: tuple[LoraPlace, ...]


def warm_up_rank(needs: Iterable[int], max_rank: int) -> int:
    """Return the rank of the LoRA that a warm-up runs with: the smallest that every need divides (experts that are
    sharded over n ranks need a multiple of n), at least 1. Raises ConfigError when that is above `max_rank`."""
    rank = math.lcm(*needs)
    if rank > max_rank:
        raise ConfigError(
            "the engine's sharded experts need LoRAs of a larger rank than it has room for",
            where="max_lora_rank",
            expected=f"at least {rank}",
            got=str(max_rank),
            remedy=f"start with max_lora_rank={rank} or more, or on fewer ranks",
        )
    return rank


class LoraManager:
    """Wraps the layers of `model` in place, after its post-load, and keeps their LoRAs. Used by the thread that runs
    the model. Every rank has one and makes the same calls in the same order, so that all have the same slots.

    Args:
        max_loras: how many LoRAs are held at once.
        max_rank: the largest rank of a LoRA; every slot is that large.
        targets: see `to_wrap`.
        tp: this rank's tensor-parallel state.

    Attributes:
        limits: the largest rank and the number of slots.
        layers: path in the engine -> the wrapper that stands there.

    Raises ConfigError (see `to_wrap`, `warm_up_rank`); the model is then as it was.
    """

    def __init__(
        self, model: CausalLM, *, max_loras: int, max_rank: int, targets: Sequence[str] | None, tp: Parallel
    ) -> None:
        self.limits = LoraLimits(max_rank, max_loras)
        self.context = LoraContext()
        self._model = model
        self._loaded: dict[str, _LoadedLora] = {}
        self._used: set[str] = set()
        self._warmed = False
        chosen = to_wrap(model, targets)
        needs = [tp.size for found in chosen if found.wrapper is FusedMoEWithLoRA]
        self._warm_up_rank = warm_up_rank(needs, max_rank)
        made: dict[int, BaseLayerWithLoRA] = {}  # a module that hangs in two places is wrapped once
        self.layers: dict[str, BaseLayerWithLoRA] = {}
        for found in chosen:
            layer = made.get(id(found.module)) or wrap(found.module, self.context, max_loras, max_rank)
            made[id(found.module)] = self.layers[found.path] = layer
            model.set_submodule(found.path, layer)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the loaded LoRAs, in the order in which they came."""
        return tuple(self._loaded)

    def slot(self, name: str) -> int:
        """Return the slot of a loaded LoRA, as `context.select` takes it. Raises NotFound."""
        return self._of(name).slot

    def plan(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> dict[str, str]:
        """Return tensor -> dtype that it will have in the slots. Writes nothing.

        Raises UnexpectedTensor (every module that the engine lacks, did not wrap or never calls), MissingTensor (a LoRA
        without a module), DuplicateTensor, ShapeMismatch, DtypeMismatch, UnsupportedLora (a rank above the maximum).
        """
        return {
            info.name: dtype_name(place.part.a.dtype)
            for place in self._places(tensors, spec)
            for info in (place.pair.a, place.pair.b)
        }

    def _places(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> tuple[LoraPlace, ...]:
        uncalled = {path for path, layer in self.layers.items() if self._warmed and not layer.reached}
        return place_pairs(self._model, self.layers, uncalled, tensors, spec, self.limits.max_rank)

    @torch.no_grad()
    def load(self, name: str, tensors: Mapping[str, torch.Tensor], spec: LoraSpec) -> None:
        """Write a LoRA into a free slot. The tensors are whole, in names of `lora_format`, and are not kept.

        Raises what `plan` raises, and ConfigError when no slot is free or the name was used before: keys and values
        that were cached under a name must never serve another LoRA. No other slot is touched.
        """
        infos = [TensorInfo(n, dtype_name(t.dtype, n), tuple(t.shape)) for n, t in tensors.items()]
        places = self._places(infos, spec)
        slot = self._free(name)
        self._used.add(name)
        try:
            for place in places:
                place.layer.write(slot, place.key, tensors[place.pair.a.name], tensors[place.pair.b.name])
        except BaseException:
            self._clear(slot)
            raise
        self._loaded[name] = _LoadedLora(slot, spec.rank, places)

    def _free(self, name: str) -> int:
        if name in self._used:
            raise ConfigError(
                "a LoRA's name was used before",
                where=name,
                expected="a new name for every version",
                got=f"{name!r}, " + ("which is loaded" if name in self._loaded else "which was loaded once"),
                remedy="load it under another name",
            )
        taken = {lora.slot for lora in self._loaded.values()}
        slot = next((slot for slot in range(self.limits.slots) if slot not in taken), None)
        if slot is None:
            raise ConfigError(
                "no free slot for another LoRA",
                where=name,
                expected=f"fewer than {self.limits.slots} loaded LoRAs (max_loras)",
                got=", ".join(self._loaded),
                remedy="retire one of them, or start the engine with a larger max_loras",
            )
        return slot

    def views(self, name: str) -> list[LoraView]:
        """Return where the tensors of a loaded LoRA lie on this rank. Raises NotFound."""
        lora = self._of(name)
        return [
            view
            for place in lora.places
            for view in place.part.views(lora.slot, lora.rank, (place.pair.a.name, place.pair.b.name))
        ]

    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Drop a LoRA and zero its slot. Unknown names are ignored."""
        lora = self._loaded.pop(name, None)
        if lora is not None:
            self._clear(lora.slot)

    def _clear(self, slot: int) -> None:
        for layer in self.layers.values():
            layer.clear(slot)

    def _of(self, name: str) -> _LoadedLora:
        if name not in self._loaded:
            expected, remedy = ", ".join(self._loaded) or "none is loaded", "load it first, or use one that is loaded"
            raise NotFound("no such LoRA is loaded", where=name, expected=expected, got=repr(name), remedy=remedy)
        return self._loaded[name]

    @torch.no_grad()
    def warm_up(self, run: Callable[[], object]) -> None:
        """Load a LoRA of zeros on every layer, have `run` do one forward of one token through the whole model with it,
        head included, and remove it. Called once, at start, while no LoRA is loaded.

        Layers that this forward did not call are used by the model in some other way: LoRAs would lie in their slots
        and do nothing, so `plan` refuses them from then on.
        """
        rank, slot = self._warm_up_rank, self._free(_WARM_UP)
        try:
            for layer in self.layers.values():
                for key, part in layer.parts.items():
                    a, b = part.shapes(rank)
                    layer.write(slot, key, part.a.new_zeros(a), part.b.new_zeros(b))
            with self.context.select(torch.tensor([slot])):
                run()
        finally:
            self._clear(slot)
        self._warmed = True
