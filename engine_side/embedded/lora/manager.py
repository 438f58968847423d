"""The LoRAs of one rank: the layers that take them, places of their tensors, slots, loading, views for the read-back,
and the warm-up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bridge.errors import (
    ConfigError,
    DtypeMismatch,
    DuplicateTensor,
    MissingTensor,
    NotFound,
    ShapeMismatch,
    UnexpectedTensor,
    UnsupportedLora,
)
from bridge.model.lora_format import LoraLimits, LoraPair, LoraSpec, pairs
from bridge.model.manifest import TensorInfo
from bridge.model.torch_dtypes import dtype_name, dtype_of
from engine_side.embedded.decoder import CausalLM
from engine_side.embedded.lora.layers import BaseLayerWithLoRA, wrap, wrapper_of
from engine_side.embedded.lora.slots import LoraContext, LoraPart
from engine_side.embedded.moe import FusedMoE
from engine_side.embedded.wrappers import unwrap
from engine_side.protocol import LoraView

log = logging.getLogger(__name__)
_SHOWN = 8
_WARM_UP = "warm-up"


def to_wrap(model: CausalLM, targets: Sequence[str] | None) -> dict[str, nn.Module]:
    """Choose the layers that get LoRA slots, over the whole tree and before anything is changed: path -> module, with
    the wrappers that it has already, in the order of the tree.

    Args:
        targets: names of modules, in a checkpoint's words or the engine's, by their last dotted segments; None takes
            every layer that can be wrapped.

    Raises ConfigError for a target that matches nothing, or matches something that cannot be wrapped. With no targets,
    layers that cannot be wrapped are warned of, once per class.
    """
    candidates = dict(_walk(model))
    if targets is None:
        _warn({path: core for path, module in candidates.items() if wrapper_of(core := unwrap(module)) is None})
        return {path: module for path, module in candidates.items() if wrapper_of(module) is not None}
    chosen: dict[str, nn.Module] = {}
    missing = set(targets)
    for path, module in candidates.items():
        core = unwrap(module)
        experts = model.experts if isinstance(core, FusedMoE) else ()
        names = [path, *model.parts_of(path), *(f"{path}.0.{part}" for part in experts)]
        hits = [target for target in targets if any(_ends_with(name, target) for name in names)]
        missing.difference_update(hits)
        if hits and wrapper_of(core) is None:
            raise ConfigError(
                "a module of lora_targets cannot carry LoRA",
                where=f"{path} ({type(core).__name__})",
                expected="a linear layer, an embedding, a head or a layer's experts",
                got=f"matched by the target {hits[0]!r}",
                remedy="take it out of lora_targets",
                names=(path,),
            )
        if hits:
            chosen[path] = module
    if missing:
        wrong = tuple(target for target in targets if target in missing)
        raise ConfigError(
            "a LoRA target matches no module of this model",
            where="lora_targets",
            expected=", ".join(sorted({path.rpartition(".")[2] for path in candidates})),
            got=", ".join(map(repr, wrong)),
            remedy="name modules by whole dotted segments, as in the checkpoint",
            names=wrong,
        )
    return chosen


def _walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module below `model` with its first path, not looking into layers that can be wrapped or into wrappers."""
    for name, child in model.named_children():
        yield f"{prefix}{name}", child
        if wrapper_of(child) is None:
            yield from _walk(unwrap(child), f"{prefix}{name}.")


def _ends_with(name: str, target: str) -> bool:
    """Whole dotted segments; experts carry a number, which targets leave out or not."""
    segments, wanted = name.split("."), target.split(".")
    return segments[-len(wanted) :] == wanted or [s for s in segments if not s.isdecimal()][-len(wanted) :] == wanted


def _warn(unwrappable: Mapping[str, nn.Module]) -> None:
    classes: dict[type[nn.Module], list[str]] = {}
    for path, core in unwrappable.items():
        # Checkpoints have matrices for this module: somebody could have meant it to carry LoRA.
        held = [param for param in core._parameters.values() if param is not None]
        if any(param.dim() > 1 for param in held) or (held and hasattr(core, "quant_method")):
            classes.setdefault(type(core), []).append(path)
    for cls, paths in classes.items():
        log.warning("no LoRA on %s: %d layers cannot carry it, such as %s", cls.__name__, len(paths), paths[0])


@dataclass(frozen=True)
class _LoadedLora:
    """A LoRA in its slot: the part of a layer that each of its pairs belongs to."""

    slot: int
    places: Sequence[tuple[LoraPair, LoraPart]]


class LoraManager:
    """Wraps the layers of `model` in place, after its post-load, and keeps their LoRAs. Used by the thread that runs
    the model. Every rank has one and makes the same calls in the same order, so that all have the same slots.

    Args:
        max_loras: how many LoRAs are held at once.
        max_rank: the largest rank of a LoRA; every slot is that large.
        targets: see `to_wrap`.

    Attributes:
        limits: the largest rank and the number of slots.
        layers: path in the engine -> the wrapper that stands there.

    Raises ConfigError (see `to_wrap`), also where the warm-up needs a larger rank; the model is then as it was.
    """

    def __init__(self, model: CausalLM, *, max_loras: int, max_rank: int, targets: Sequence[str] | None) -> None:
        self.limits = LoraLimits(max_rank, max_loras)
        self.context = LoraContext()
        self._model = model
        self._loaded: dict[str, _LoadedLora] = {}
        self._used: set[str] = set()
        self._warmed = False
        chosen = to_wrap(model, targets)
        experts = [core for core in map(unwrap, chosen.values()) if isinstance(core, FusedMoE)]
        self._warm_up_rank = experts[0].tp.size if experts else 1  # those sharded over n ranks need a multiple of n
        if self._warm_up_rank > max_rank:
            raise ConfigError(
                "the engine's sharded experts need LoRAs of a larger rank than it has room for",
                where="max_lora_rank",
                expected=f"at least {self._warm_up_rank}",
                got=str(max_rank),
                remedy=f"start with max_lora_rank={self._warm_up_rank} or more, or on fewer ranks",
            )
        made: dict[int, BaseLayerWithLoRA] = {}  # a module that hangs in two places is wrapped once
        self.layers: dict[str, BaseLayerWithLoRA] = {}
        for path, module in chosen.items():
            layer = made.get(id(module)) or wrap(module, self.context, max_loras, max_rank)
            made[id(module)] = self.layers[path] = layer
            model.set_submodule(path, layer)

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
        places = self._places(tensors, spec.rank)
        return {info.name: dtype_name(part.a.dtype) for pair, part in places for info in (pair.a, pair.b)}

    def _places(self, tensors: Sequence[TensorInfo], rank: int) -> list[tuple[LoraPair, LoraPart]]:
        """Find the part of a layer that each pair of a LoRA belongs to. Raises what `plan` says."""
        if not 0 < rank <= self.limits.max_rank:
            raise UnsupportedLora(
                "the LoRA's rank is not one that this engine has room for",
                where="rank",
                expected=f"1 to {self.limits.max_rank} (max_lora_rank)",
                got=str(rank),
                remedy=f"start the engine with max_lora_rank={rank} or more, or push with mode='merged'",
            )
        names = [info.name for info in tensors]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            remedy = "send every tensor of the LoRA once"
            raise DuplicateTensor(
                "a LoRA's tensor was sent twice",
                where=twice,
                expected="each name once",
                got="a second time",
                remedy=remedy,
                names=(twice,),
            )
        places: list[tuple[LoraPair, LoraPart]] = []
        refused: dict[str, list[str]] = {}
        for pair in (announced := pairs(tensors)):
            found = self._place(pair)
            if isinstance(found, LoraPart):
                places.append((pair, found))
            else:
                refused.setdefault(found, []).append(pair.module)
        if refused:
            raise _unplaced(refused, self.layers)
        if not announced:
            raise MissingTensor(
                "the LoRA binds no module",
                where="adapter",
                expected="at least one pair of A and B",
                got="no tensor",
                remedy="check the target modules of the trainer's LoRA",
            )
        for pair, part in places:
            _check(pair, part, rank)
        return places

    def _place(self, pair: LoraPair) -> LoraPart | str:
        """Return the part that a pair belongs to, or the reason why it has none."""
        target, arguments = self._model.resolve(f"{pair.module}.weight")
        path = target.rpartition(".")[0]
        layer = self.layers.get(path)
        if layer is None:
            try:
                self._model.get_submodule(path)
            except AttributeError:
                return "not in this model"
            return "not wrapped for LoRA"
        part = layer.parts.get((arguments.get("shard_id"), arguments.get("expert_id")))
        if part is None:
            return "not in this model"
        if layer.embedding is not pair.embedding:
            return "an embedding, which takes lora_embedding_A and _B" if layer.embedding else "not an embedding"
        if self._warmed and not layer.reached:
            return "never called by the engine, which uses its weight in another way"
        return part

    @torch.no_grad()
    def load(self, name: str, tensors: Mapping[str, torch.Tensor], spec: LoraSpec) -> None:
        """Write a LoRA into a free slot. The tensors are whole, in names of `lora_format`, and are not kept.

        Raises what `plan` raises, and ConfigError when no slot is free or the name was used before: keys and values
        that were cached under a name must never serve another LoRA. No other slot is touched.
        """
        infos = [TensorInfo(n, dtype_name(t.dtype, n), tuple(t.shape)) for n, t in tensors.items()]
        places = self._places(infos, spec.rank)
        slot = self._free(name)
        self._used.add(name)
        try:
            for pair, part in places:
                part.write(slot, tensors[pair.a.name], tensors[pair.b.name])
        except BaseException:
            self._clear(slot)
            raise
        self._loaded[name] = _LoadedLora(slot, places)

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
        return [view for pair, part in lora.places for view in part.views(lora.slot, (pair.a.name, pair.b.name))]

    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Drop a LoRA and zero its slot. Unknown names are ignored."""
        lora = self._loaded.pop(name, None)
        if lora is not None:
            self._clear(lora.slot)

    def _clear(self, slot: int) -> None:
        for layer in self.layers.values():
            for part in layer.parts.values():
                part.clear(slot)

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
                for part in layer.parts.values():
                    a, b = part.shapes(rank)
                    part.write(slot, part.a.new_zeros(a), part.b.new_zeros(b))
            with self.context.select(torch.tensor([slot])):
                run()
        finally:
            self._clear(slot)
        self._warmed = True


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


def _check(pair: LoraPair, part: LoraPart, rank: int) -> None:
    """Raises ShapeMismatch or DtypeMismatch, naming the tensor."""
    wanted = part.shapes(rank)
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
