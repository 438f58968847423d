"""Bake the tensors that each mode sends, as they stand or computed, and their names.

Done once per structure and set of acting adapters; reads shapes, dtypes and addresses, no values.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import nn

from trainer_side.lora import lora_form
from trainer_side.lora.findings import Layer, Survey, plain_dtype, quantised
from trainer_side.lora.findings import packed as is_packed
from trainer_side.lora.layers.dequant import FP8
from trainer_side.lora.layers.effective import effective_bias, effective_identity, effective_weight
from trainer_side.lora.layers.factors import logical_shape
from trainer_side.lora.layers.module_tree import BaseTensor, LoraTree, TreeTensor, WrapperKind, WrapperTensor
from trainer_side.lora.layers.read import lora_parameters
from trainer_side.lora.layers.values import LoraParameters, SentValues
from trainer_side.lora.state import LoraState, changed_meanwhile
from trainer_side.names.naming import CanonicalMap, LiveEntry, bake_entries, identity_of
from trainer_side.names.tensor_layout import Computed


@dataclass(frozen=True, eq=False)
class EffectiveTensor:
    """A tensor of the base model whose effective value is computed from it and its layer's adapters.

    Attributes:
        module: the outermost wrapper that acts on it.
        stand_in: shape and announced dtype, on meta.
        live: shape and dtype of the stored tensor; when these change, so must the stand-in.
        needs: the adapters' tensors that it is computed from.
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
    def items(self) -> tuple[TreeTensor, ...]:
        """List everything that it is computed from."""
        return (self.place, *self.needs)

    @property
    def identity(self) -> Hashable:
        """Equal for two tensors that are equal by construction."""
        return effective_identity(self.module, self.place.attribute, copies=self.copies)

    @property
    def packed(self) -> bool:
        """True for a weight that is stored in another form than its values: what else its module holds, but its bias,
        belongs to that form (scales, zero points), and stays with it."""
        return not self.bias and lora_parameters(self.module).quant_state is not None

    def compute(self, given: SentValues, began: LoraState, dtype: torch.dtype) -> torch.Tensor:
        """Compute the effective value, in the dtype that `effective_weight` gives.

        Raises IntegrityError when the layer is set to something else than in the state `began`.
        """
        chain, copies = began.read_chain(self.module), self.copies
        if not self.bias:
            at = _attribute(self.place)
            return effective_weight(self.module, dtype, given, attribute=at, copies=copies, chain=chain)
        bias = effective_bias(self.module, dtype, given, copies=copies, chain=chain)
        if bias is None:  # taken away since the push began
            raise changed_meanwhile()
        return bias


@dataclass(frozen=True, eq=False)
class BakedMode:
    """The tensors that a mode sends of one model in one state.

    Attributes:
        known: the names; None for a LoRA alone, whose names are canonical.
        direct: tensors that travel as they stand.
        computed: tensors that are computed.
        needs: further tensors that have to come; `forms` are their dtypes and shapes.
        portable: of a LoRA alone.
        shared: computed tensors over one stored tensor, and which of them are equal: scalings decide it.
    """

    known: CanonicalMap | None
    direct: tuple[BaseTensor, ...]
    computed: tuple[EffectiveTensor, ...] = ()
    needs: tuple[WrapperTensor, ...] = ()
    forms: tuple[object, ...] = ()
    portable: lora_form.PortableLora | None = None
    shared: tuple[tuple[tuple[EffectiveTensor, ...], tuple[int, ...]], ...] = ()

    def current(self) -> bool:
        """Tell whether what was baked from shapes, dtypes and ties of computed tensors still holds."""
        for one in self.computed:
            live = one.place.tensor()
            if live is None or live.dtype is not one.live[1] or live.shape != one.live[0]:
                return False
        return all(_pattern(group) == pattern for group, pattern in self.shared) and _forms(self.needs) == self.forms

    def list_computed(self, given: SentValues, began: LoraState, only: Iterable[EffectiveTensor]) -> list[Computed]:
        """List the computed tensors of one push, from the values that were given, in the state in which it began."""
        if self.portable is not None:
            return lora_form.list_computed(self.portable, given, began)
        return [Computed(one.place.clean, one.stand_in, partial(one.compute, given, began)) for one in only]


def bake_base(tree: LoraTree) -> BakedMode:
    """Bake the base model's own tensors under its own names. Raises IntegrityError as `bake_entries`."""
    places = tuple(place for place in tree.places if place.original)
    return BakedMode(_names(tree, {place: _stored_identity(place) for place in places}), places)


def bake_merged(tree: LoraTree, survey: Survey, state: LoraState) -> BakedMode:
    """Bake the tensors that the live forward computes with. Raises IntegrityError as `bake_entries`."""
    in_use = {id(w): state.copy_in_use(w) for w in tree.wrappers if w.kind is WrapperKind.SAVED}
    places = [p for p in tree.places if all(in_use[id(w)] == name for w, name in p.copies)]
    computed = [one for one in (_effective(place, survey) for place in places) if one is not None]
    by_place = {one.place: one for one in computed}
    owners = {id(one.place.owner) for one in computed if one.packed}
    places = [p for p in places if p in by_place or p.attribute == "bias" or id(p.owner) not in owners]
    identities = {p: by_place[p].identity if p in by_place else _stored_identity(p) for p in places}
    stored: dict[Hashable, list[EffectiveTensor]] = {}
    for one in computed:
        stored.setdefault(_stored_identity(one.place), []).append(one)
    return BakedMode(
        _names(tree, identities, {place: one.stand_in for place, one in by_place.items()}),
        tuple(place for place in places if place not in by_place),
        tuple(computed),
        shared=tuple((tuple(group), _pattern(group)) for group in stored.values() if len(group) > 1),
    )


def bake_ends(tree: LoraTree, unpacked: Mapping[BaseTensor, torch.Tensor]) -> CanonicalMap:
    """Bake the base model's names, each tied end with its own: an adapter belongs to one of them.

    `unpacked` of `unpacked_shapes`.
    """
    return _names(tree, {place: place.clean for place in tree.places if place.original}, unpacked)


def unpacked_shapes(tree: LoraTree, survey: Survey) -> dict[BaseTensor, torch.Tensor]:
    """Stand in, on meta, for packed weights under acting adapters: in the shape that these fit."""
    found: dict[BaseTensor, torch.Tensor] = {}
    for place, _, parameters in _acting_layers(tree, survey):
        if is_packed(parameters) and parameters.kind in ("linear", "embedding"):
            shape = logical_shape(parameters)
            found[place] = torch.empty(shape, dtype=plain_dtype(parameters), device="meta")
    return found


def bake_lora(tree: LoraTree, survey: Survey, ends: CanonicalMap) -> BakedMode:
    """Bake the acting adapters alone; `ends` of `bake_ends`."""
    acting: list[lora_form.ActingLayer] = []
    needs: list[WrapperTensor] = []
    for place, layers, parameters in _acting_layers(tree, survey):
        acting.append(lora_form.ActingLayer(layers[0].wrapper, parameters, place.clean))
        needs += [need for layer in layers for need in layer.needs]
    return BakedMode(None, (), (), tuple(needs), _forms(needs), lora_form.plan_pairs(acting, ends))


def _acting_layers(tree: LoraTree, survey: Survey) -> Iterator[tuple[BaseTensor, list[Layer], LoraParameters]]:
    """List the weights on which adapters act: its wrappers, the outermost first, and what that one reads."""
    for place in tree.places:
        layers = [survey.by_wrapper[wrapper] for wrapper in place.wrappers] if place.original else []
        layers = [layer for layer in layers if _role(place, layer) == "weight"]
        # The outermost wrapper's reading holds all that act on this weight.
        parameters = layers[0].parameters if layers else None
        if parameters is not None and parameters.loras:
            yield place, layers, parameters


def _forms(needs: Sequence[WrapperTensor]) -> tuple[object, ...]:
    return tuple(None if (t := item.tensor()) is None else (t.dtype, t.shape) for item in needs)


def _pattern(group: Sequence[EffectiveTensor]) -> tuple[int, ...]:
    """Return for each tensor the first one that is equal to it."""
    first: dict[Hashable, int] = {}
    return tuple(first.setdefault(one.identity, k) for k, one in enumerate(group))


def _names(
    tree: LoraTree,
    identities: Mapping[BaseTensor, Hashable],
    stand_ins: Mapping[BaseTensor, torch.Tensor] = MappingProxyType({}),
) -> CanonicalMap:
    """Bake the names of the tensors in `identities`, whose values are equal for tied ones; some have another shape than
    they are stored in."""
    entries = []
    for place, identity in identities.items():
        live = stand_ins[place] if place in stand_ins else place.tensor()
        if live is not None:
            entries.append(LiveEntry(place.raw, place.clean, live, place.buffer, identity))
    return bake_entries(tree.inner, entries)


def _stored_identity(place: BaseTensor) -> Hashable:
    tensor = place.tensor()
    return place.clean if tensor is None else identity_of(place.clean, tensor)


def _effective(place: BaseTensor, survey: Survey) -> EffectiveTensor | None:
    """Find how a tensor's effective value is computed; None when it is the stored one."""
    tensor = place.tensor()
    if place.buffer or tensor is None:
        return None
    layers = [survey.by_wrapper[wrapper] for wrapper in place.wrappers]
    claims = [(layer, role) for layer in layers if (role := _role(place, layer)) is not None]
    acting = [layer for layer, _ in claims if layer.acts]
    module, copies, bias, packs = quantised(place), None, False, True
    if module is None:
        if not claims:
            return None
        outer, bias = claims[0][0], claims[0][1] == "bias"
        module, copies = outer.wrapper.module, outer.wrapper.copies
        packs = not bias and outer.parameters is not None and is_packed(outer.parameters)
        # PEFT's token layer around a linear one loses the bias.
        moves = [one for one in acting if not bias or one.biases or one.wrapper.kind is WrapperKind.TOKENS]
        if not moves and not packs:
            return None
        packs = packs or (not bias and tensor.dtype in FP8)
    shape, dtype = tensor.shape, tensor.dtype
    if packs:
        dtype = plain_dtype(lora_parameters(module))
        shape = effective_weight(module, dtype, attribute=_attribute(place), copies=copies).shape
    stand_in = torch.empty(shape, dtype=dtype, device="meta")
    needs = tuple(need for layer in acting for need in layer.needs)
    return EffectiveTensor(place, module, stand_in, (tensor.shape, tensor.dtype), needs, copies, bias)


def _attribute(place: BaseTensor) -> str | None:
    """Name the parameter that is meant where wrappers act on several; a packed weight has another name than its own."""
    return place.attribute if any(wrapper.attribute == place.attribute for wrapper in place.wrappers) else None


def _role(place: BaseTensor, layer: Layer) -> str | None:
    """Tell what a tensor is to a wrapper around its module: the "weight" that it changes, the "bias", or None."""
    wrapper, parameters = layer.wrapper, layer.parameters
    if wrapper.kind is WrapperKind.SAVED or place.buffer or parameters is None or wrapper not in place.wrappers:
        return None
    if wrapper.attribute is not None:
        return "weight" if place.attribute == wrapper.attribute else None
    tensor = place.tensor()
    if tensor is parameters.weight:
        return "weight"
    return "bias" if tensor is not None and tensor is parameters.bias else None
