"""Which tensors each mode sends, as they stand or computed, and under which names: baked once per structure and set of
acting adapters. Reads shapes, dtypes and addresses; no values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from bridge.errors import MissingTensor
from trainer_side.lora import lora_form, state
from trainer_side.lora.layers.dequant import FP8
from trainer_side.lora.layers.effective import effective_bias, effective_identity, effective_weight
from trainer_side.lora.layers.findings import Layer, Survey, plain_dtype, quantised
from trainer_side.lora.layers.findings import packed as is_packed
from trainer_side.lora.layers.module_tree import BaseTensor, LoraTree, WrapperKind, WrapperTensor
from trainer_side.lora.layers.read import lora_parameters
from trainer_side.lora.layers.wrapper_chain import read_chain
from trainer_side.lora.state import Watch
from trainer_side.names.naming import CanonicalMap, LiveEntry, bake_entries, identity_of
from trainer_side.names.tensor_layout import Computed

SentValues = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class EffectiveTensor:
    """A tensor of the base model whose effective value is not what lies there.

    Attributes:
        module: the outermost module that has a say in it.
        stand_in: shape and announced dtype, on meta.
        live: shape and dtype of what lies there; when these change, so must the stand-in.
        needs: what it is computed from, besides `place`.
        copies: how often adapters are added; see `effective_weight`.
        bias: it is the layer's bias, not its weight.
    """

    place: BaseTensor
    module: nn.Module
    stand_in: torch.Tensor
    live: tuple[torch.Size, torch.dtype]
    needs: tuple[WrapperTensor, ...] = ()
    copies: int | None = None
    bias: bool = False

    @property
    def items(self) -> tuple[BaseTensor | WrapperTensor, ...]:
        """Everything that it is computed from."""
        return (self.place, *self.needs)

    def compute(self, given: SentValues | None, watch: Watch, dtype: torch.dtype) -> torch.Tensor:
        """The effective value; see `effective_weight` for its dtype. Raises IntegrityError as `Watch.require`."""
        chain = read_chain(self.module)
        watch.require(chain)
        if self.bias:
            found = effective_bias(self.module, dtype, given, copies=self.copies, chain=chain)
        else:
            at, copies = _attribute(self.place), self.copies
            found = effective_weight(self.module, dtype, given, attribute=at, copies=copies, chain=chain)
        # A merge moves the stored values while they are read.
        watch.require(read_chain(self.module))
        if found is None:
            raise MissingTensor("a bias of the bound model is gone", where=self.place.clean, names=(self.place.raw,))
        return found


@dataclass(frozen=True, eq=False)
class BakedMode:
    """What a mode sends of one model in one state.

    Attributes:
        known: the names; None for an adapter, whose names are canonical.
        direct: tensors that travel as they stand.
        made: tensors that are computed.
        needs: further tensors that have to come; `forms` are their dtypes and shapes.
        plan: of an adapter.
        rivals: computed tensors over one stored tensor, and which of them are equal: scalings decide it.
    """

    known: CanonicalMap | None
    direct: tuple[BaseTensor, ...]
    made: tuple[EffectiveTensor, ...] = ()
    needs: tuple[WrapperTensor, ...] = ()
    forms: tuple[tuple[torch.dtype, torch.Size] | None, ...] = ()
    plan: lora_form.PortableLora | None = None
    rivals: tuple[tuple[tuple[EffectiveTensor, ...], tuple[int, ...]], ...] = ()

    def current(self) -> bool:
        """Whether what was baked from shapes, dtypes and ties of computed tensors still holds."""
        for made in self.made:
            live = made.place.tensor()
            if live is None or live.dtype is not made.live[1] or live.shape != made.live[0]:
                return False
        if any(_pattern(group) != pattern for group, pattern in self.rivals):
            return False
        return tuple(map(_form, self.needs)) == self.forms


def bake_base(tree: LoraTree) -> BakedMode:
    """The base model's own tensors under its own names. Raises IntegrityError where `bake_entries` does."""
    places = tuple(place for place in tree.places if place.original)
    return BakedMode(_names(tree, places, {}), places)


def bake_merged(tree: LoraTree, survey: Survey) -> BakedMode:
    """What the live forward computes with. Raises IntegrityError where `bake_entries` does."""
    in_use = {id(w): state.copy_in_use(w) for w in tree.wrappers if w.kind is WrapperKind.SAVED}
    places = [p for p in tree.places if all(in_use[id(w)] == name for w, name in p.copies)]
    made = [one for one in (_made(place, survey) for place in places) if one is not None]
    scales = _scales_of(made)
    places = [place for place in places if id(place.tensor()) not in scales]
    by_place = {one.place: one for one in made}
    identities = {place: _identity(place, by_place.get(place)) for place in places}
    stand_ins = {place: one.stand_in for place, one in by_place.items()}
    direct = tuple(place for place in places if place not in by_place)
    return BakedMode(_names(tree, places, stand_ins, identities), direct, tuple(made), rivals=_rivals(made))


def _rivals(made: Sequence[EffectiveTensor]) -> tuple[tuple[tuple[EffectiveTensor, ...], tuple[int, ...]], ...]:
    stored: dict[Hashable, list[EffectiveTensor]] = {}
    for one in made:
        stored.setdefault(_identity(one.place, None), []).append(one)
    groups = [tuple(group) for group in stored.values() if len(group) > 1]
    return tuple((group, _pattern(group)) for group in groups)


def _pattern(group: Sequence[EffectiveTensor]) -> tuple[int, ...]:
    """Of each, the first one that is equal to it."""
    first: dict[Hashable, int] = {}
    return tuple(first.setdefault(_identity(one.place, one), k) for k, one in enumerate(group))


def bake_ends(tree: LoraTree) -> CanonicalMap:
    """The base model's names, each tied end with its own: an adapter belongs to one of them. Raises IntegrityError."""
    places = tuple(place for place in tree.places if place.original)
    return _names(tree, places, {}, {place: place.clean for place in places})


def bake_lora(tree: LoraTree, survey: Survey, ends: CanonicalMap) -> BakedMode:
    """The acting adapters alone; `ends` of `bake_ends`."""
    weights: dict[BaseTensor, list[Layer]] = {}
    for place in tree.places:
        if place.original and place.wrappers:
            layers = [survey.by_wrapper[wrapper] for wrapper in place.wrappers]
            weights[place] = [layer for layer in layers if _role(place, layer) == "weight"]
    acting: list[lora_form.Acting] = []
    needs: list[WrapperTensor] = []
    for place, layers in weights.items():
        # The outermost one answers for all that act on this weight.
        wrapper, parameters = (layers[0].wrapper, layers[0].parameters) if layers else (None, None)
        if wrapper is not None and parameters is not None and parameters.adapters:
            acting.append(lora_form.Acting(wrapper.path, wrapper.module, parameters, place.clean))
            needs += [e for layer in layers for e in layer.extras if e.adapter in layer.adapters]
    return BakedMode(None, (), (), tuple(needs), tuple(map(_form, needs)), lora_form.plan(acting, ends))


def computed(
    baked: BakedMode, given: SentValues | None, watch: Watch, only: Iterable[EffectiveTensor] | None = None
) -> list[Computed]:
    """The computed tensors of one push, from the values that were given, in the state that `watch` knows."""
    if baked.plan is not None:
        return lora_form.computed(baked.plan, given, watch)
    return [
        Computed(one.place.clean, one.stand_in, partial(one.compute, given, watch))
        for one in (baked.made if only is None else only)
    ]


def _form(item: WrapperTensor) -> tuple[torch.dtype, torch.Size] | None:
    tensor = item.tensor()
    return None if tensor is None else (tensor.dtype, tensor.shape)


def _names(
    tree: LoraTree,
    places: Sequence[BaseTensor],
    stand_ins: Mapping[BaseTensor, torch.Tensor],
    identities: Mapping[BaseTensor, Hashable] | None = None,
) -> CanonicalMap:
    entries = []
    for place in places:
        tensor = stand_ins.get(place)
        live = place.tensor() if tensor is None else tensor
        if live is None:
            continue
        identity = identity_of(place.clean, live) if identities is None else identities[place]
        entries.append(LiveEntry(place.raw, place.clean, live, place.buffer, identity))
    return bake_entries(tree.inner, entries)


def _identity(place: BaseTensor, made: EffectiveTensor | None) -> Hashable:
    if made is not None:
        return effective_identity(made.module, place.attribute, copies=made.copies)
    tensor = place.tensor()
    return place.clean if tensor is None else identity_of(place.clean, tensor)


def _made(place: BaseTensor, survey: Survey) -> EffectiveTensor | None:
    """How a tensor's effective value is computed; None when it is what lies there."""
    tensor = place.tensor()
    if place.buffer or tensor is None:
        return None
    plain = quantised(place)
    if plain is not None:
        return _of(place, tensor, plain, packed=True)
    layers = [survey.by_wrapper[wrapper] for wrapper in place.wrappers]
    claims = [(layer, role) for layer in layers if (role := _role(place, layer)) is not None]
    if not claims:
        return None
    (outer, role), acting = claims[0], [layer for layer, _ in claims if layer.acts]
    needs = tuple(e for layer in acting for e in layer.extras if e.adapter in layer.adapters)
    if role == "bias":
        # PEFT's token layer around a linear one loses the bias.
        if not any(layer.has_bias or layer.wrapper.kind is WrapperKind.TOKENS for layer in acting):
            return None
        return _of(place, tensor, outer.wrapper.module, needs, outer.wrapper.copies, bias=True)
    stays = outer.parameters is None or not is_packed(outer.parameters)
    if not acting and stays:
        return None
    scaled = tensor.dtype in FP8
    return _of(place, tensor, outer.wrapper.module, needs, outer.wrapper.copies, packed=scaled or not stays)


def _of(
    place: BaseTensor,
    tensor: torch.Tensor,
    module: nn.Module,
    needs: tuple[WrapperTensor, ...] = (),
    copies: int | None = None,
    *,
    packed: bool = False,
    bias: bool = False,
) -> EffectiveTensor:
    shape, dtype = tensor.shape, tensor.dtype
    if packed:
        dtype = plain_dtype(lora_parameters(module))
        shape = effective_weight(module, dtype, attribute=_attribute(place), copies=copies).shape
    return EffectiveTensor(
        place, module, torch.empty(shape, dtype=dtype, device="meta"), (tensor.shape, tensor.dtype), needs, copies, bias
    )


def _attribute(place: BaseTensor) -> str | None:
    """Which parameter is meant where wrappers act on several; a packed weight goes by another name than its own."""
    return place.attribute if any(wrapper.attribute == place.attribute for wrapper in place.wrappers) else None


def _scales_of(made: Iterable[EffectiveTensor]) -> set[int]:
    """The scales of fp8 weights that travel as their values."""
    found = (lora_parameters(one.module).quant_state for one in made if one.live[1] in FP8)
    return {id(scale) for scale in found if isinstance(scale, torch.Tensor)}


def _role(place: BaseTensor, layer: Layer) -> str | None:
    """What a tensor is to a wrapper around its module: the weight that it changes, the bias, or nothing."""
    wrapper, parameters = layer.wrapper, layer.parameters
    if wrapper.kind is WrapperKind.SAVED:
        return None
    if place.buffer or parameters is None or wrapper not in place.wrappers:
        return None
    if wrapper.attribute is not None:
        return "weight" if place.attribute == wrapper.attribute else None
    tensor = place.tensor()
    if tensor is parameters.weight:
        return "weight"
    return "bias" if tensor is not None and tensor is parameters.bias else None
