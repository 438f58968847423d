"""Which tensors each mode sends, as they stand or computed, and under which names: baked once per structure and set of
acting adapters. Reads shapes, dtypes and addresses; no values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from trainer_side.lora import adapter, state
from trainer_side.lora.effective import effective_bias, effective_identity, effective_weight
from trainer_side.lora.reader import lora_parameters
from trainer_side.lora.survey import Layer, Survey, plain_dtype, quantised
from trainer_side.lora.tree import Extra, Kind, Place, Tree
from trainer_side.naming import CanonicalMap, LiveEntry, bake_entries, identity_of
from trainer_side.source import Computed

Given = Callable[[torch.Tensor], torch.Tensor]
Compute = Callable[[nn.Module, torch.dtype, Given | None], torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor of the base model whose effective value is not what lies there.

    Attributes:
        module: the outermost module that has a say in it.
        compute: of `effective`.
        stand_in: shape and announced dtype, on meta.
        live: shape and dtype of what lies there; when these change, so must the stand-in.
        needs: what it is computed from, besides `place`.
    """

    place: Place
    module: nn.Module
    compute: Compute
    stand_in: torch.Tensor
    live: tuple[torch.Size, torch.dtype]
    needs: tuple[Extra, ...]


@dataclass(frozen=True, eq=False)
class Baked:
    """What a mode sends of one model in one state.

    Attributes:
        known: the names; None for an adapter, whose names are canonical.
        direct: tensors that travel as they stand.
        made: tensors that are computed.
        needs: further tensors that have to come.
        plan: of an adapter.
    """

    known: CanonicalMap | None
    direct: tuple[Place, ...]
    made: tuple[Made, ...] = ()
    needs: tuple[Extra, ...] = ()
    plan: adapter.Plan | None = None

    def current(self) -> bool:
        """Whether what was baked from shapes and dtypes still holds."""
        for made in self.made:
            live = made.place.tensor()
            if live is None or (live.shape, live.dtype) != made.live:
                return False
        return True


def bake_base(tree: Tree) -> Baked:
    """The base model's own tensors under its own names. Raises IntegrityError where `bake_entries` does."""
    places = tuple(place for place in tree.places if place.original)
    return Baked(_names(tree, places, {}), places)


def bake_merged(tree: Tree, survey: Survey, known: Callable[[Hashable], Baked | None]) -> tuple[Hashable, Baked]:
    """What the live forward computes with. `known` is asked for what was baked for the same computed tensors and ties.

    Raises IntegrityError where `bake_entries` does.
    """
    in_use = {id(w): state.copy_in_use(w) for w in tree.wrappers if w.kind is Kind.SAVED}
    places = [p for p in tree.places if all(in_use[id(w)] == name for w, name in p.copies)]
    made = [one for one in (_made(place, survey) for place in places) if one is not None]
    by_place = {one.place: one for one in made}
    identities = {place: _identity(place, by_place.get(place)) for place in places}
    first: dict[Hashable, int] = {}
    pattern = tuple(first.setdefault(identities[place], k) for k, place in enumerate(places))
    computed = tuple((k, by_place[p].module, by_place[p].live) for k, p in enumerate(places) if p in by_place)
    key = (tuple(map(id, places)), pattern, tuple((k, id(m), live) for k, m, live in computed), _needs_of(made))
    found = known(key)
    if found is not None:
        return key, found
    stand_ins = {place: one.stand_in for place, one in by_place.items()}
    direct = tuple(place for place in places if place not in by_place)
    return key, Baked(_names(tree, places, stand_ins, identities), direct, tuple(made))


def bake_adapter(tree: Tree, survey: Survey) -> Baked:
    """The acting adapters alone. Raises IntegrityError where `bake_entries` does."""
    places = tuple(place for place in tree.places if place.original)
    # Of tied ends each keeps its name: an adapter belongs to one of them.
    known = _names(tree, places, {}, {place: place.clean for place in places})
    acting, needs = [], []
    for layer in survey.layers:
        if layer.wrapper.kind is Kind.LORA and layer.acts and layer.parameters is not None:
            weight = next((p for p in places if _role(p, layer) == "weight"), None)
            acting.append(adapter.Acting(layer.wrapper.path, layer.wrapper.module, weight.clean if weight else ""))
            needs += [e for e in layer.extras if e.adapter in layer.adapters]
    return Baked(None, (), needs=tuple(needs), plan=adapter.plan(acting, known))


def computed(baked: Baked, given: Given | None, only: Iterable[Made] | None = None) -> list[Computed]:
    """The computed tensors of one push, from the values that were given."""
    if baked.plan is not None:
        return adapter.computed(baked.plan, given)
    return [
        Computed(one.place.clean, one.stand_in, partial(_run, one, given))
        for one in (baked.made if only is None else only)
    ]


def _run(one: Made, given: Given | None, dtype: torch.dtype) -> torch.Tensor:
    found = one.compute(one.module, dtype, given)
    return one.stand_in.new_empty(0) if found is None else found


def _names(
    tree: Tree,
    places: Sequence[Place],
    stand_ins: Mapping[Place, torch.Tensor],
    identities: Mapping[Place, Hashable] | None = None,
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


def _identity(place: Place, made: Made | None) -> Hashable:
    if made is not None:
        return effective_identity(made.module, place.attribute)
    tensor = place.tensor()
    return place.clean if tensor is None else identity_of(place.clean, tensor)


def _made(place: Place, survey: Survey) -> Made | None:
    """How a tensor's effective value is computed; None when it is what lies there."""
    if place.buffer:
        return None
    packed = quantised(place)
    if packed is not None:
        return _weight(place, packed, (), True)
    claims = [(layer, _role(place, layer)) for layer in map(survey.by_wrapper.get, place.wrappers) if layer is not None]
    claims = [(layer, role) for layer, role in claims if role is not None]
    if not claims:
        return None
    outer, role = claims[0]
    needs = tuple(e for layer, _ in claims for e in layer.extras if e.adapter in layer.adapters)
    acts = any(layer.acts for layer, _ in claims)
    if role == "bias":
        if not any(layer.acts and layer.has_bias for layer, _ in claims):
            return None
        return _bias(place, outer.wrapper.module, needs)
    tensor = place.tensor()
    is_packed = tensor is not None and not tensor.is_floating_point()
    return _weight(place, outer.wrapper.module, needs, is_packed) if acts or is_packed else None


def _weight(place: Place, module: nn.Module, needs: tuple[Extra, ...], packed: bool) -> Made | None:
    tensor = place.tensor()
    if tensor is None:
        return None
    if packed:
        parameters = lora_parameters(module)
        dtype = plain_dtype(parameters)
        with torch.no_grad():
            shape = effective_weight(module, dtype).shape
        stand_in = torch.empty(shape, dtype=dtype, device="meta")
    else:
        stand_in = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return Made(place, module, effective_weight, stand_in, (tensor.shape, tensor.dtype), needs)


def _bias(place: Place, module: nn.Module, needs: tuple[Extra, ...]) -> Made | None:
    tensor = place.tensor()
    if tensor is None:
        return None
    stand_in = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return Made(place, module, effective_bias, stand_in, (tensor.shape, tensor.dtype), needs)


def _role(place: Place, layer: Layer) -> str | None:
    """What a tensor is to a wrapper around its module: the weight that it changes, the bias, or nothing."""
    wrapper, parameters = layer.wrapper, layer.parameters
    if place.buffer or parameters is None or wrapper not in place.wrappers:
        return None
    if wrapper.attribute is not None:
        return "weight" if place.attribute == wrapper.attribute else None
    tensor = place.tensor()
    if tensor is parameters.weight:
        return "weight"
    return "bias" if tensor is not None and tensor is parameters.bias else None


def _needs_of(made: Sequence[Made]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(id, one.needs)) for one in made)
