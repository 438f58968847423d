"""Turn an iterable of (live name, tensor) into canonical tensors: names and ties are resolved, no bytes are moved.

The first push of a layout resolves every name; the result is kept as a `TensorLayout`. Later pushes only check, with a
few list comparisons, that names, shapes, dtypes and ties are those of the last one. No tensor is kept between pushes: a
trainer that offloads its weights gets its memory back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from bridge.errors import DtypeMismatch, DuplicateTensor, MissingTensor, UnsupportedLora
from bridge.model.dtypes import FLOATS
from bridge.model.lora_format import LoraSpec
from bridge.model.manifest import TensorInfo
from bridge.model.regions import Region, dense
from bridge.model.torch_dtypes import dtype_name
from trainer_side.names.naming import (
    CanonicalMap,
    CanonicalTensor,
    Piece,
    bake_names,
    canonical_unbound,
    is_lora_name,
    unsaved_names,
    walk,
)
from trainer_side.names.tensor_checks import (
    NamedTensors,
    NameIndex,
    addresses_of,
    check_shape,
    nothing_sent,
    read_pairs,
    require_plain,
    unknown_name,
)
from trainer_side.names.ties import NO_ADDRESS, TiesSent, check_ties, list_ties, sort_ties, tie_pattern

_DTYPE = operator.attrgetter("dtype")
_SHAPE = operator.attrgetter("shape")
_NEGATED = torch.Tensor.is_neg


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Elements `source` of the collected tensor at `index` become elements `dest` of a canonical tensor.

    Both count row-major; None for both says the whole tensor, as it is.
    """

    index: int
    source: Region | None = None
    dest: Region | None = None


@dataclass(frozen=True, eq=False)
class Computed:
    """A tensor that is computed while the snapshot is written (merged weights, LoRA factors with the scaling folded).

    Attributes:
        name: its clean live name, as `CanonicalMap.live` has it.
        stand_in: shape and dtype, on the meta device; the same object from push to push is cheapest.
        compute: called once per push with the dtype that travels, in a copying thread, under no_grad; returns the
            values in that dtype, or in the wider one that they were accumulated in (the copy then rounds, once).
    """

    name: str
    stand_in: torch.Tensor
    compute: Callable[[torch.dtype], torch.Tensor]


@dataclass(frozen=True, eq=False)
class TensorLayout:
    """The canonical tensors of a push and the collected tensors that they are made of, kept from push to push.

    Compared by identity: the same object means that nothing about names, shapes, dtypes and ties has changed.
    """

    tensors: tuple[TensorInfo, ...]
    parts: tuple[tuple[TensorPart, ...], ...]


@dataclass(frozen=True, eq=False)
class Collected:
    """The trainer's tensors of one push, referenced but not yet copied. Fills the port `Snapshot`.

    Attributes:
        layout: names and geometry.
        sources: the collected tensors, plain, in the order that `TensorPart.index` counts.
        addresses: where the first element of each lies; 0 where there is none.
        computed: index -> what is computed while the snapshot is written; its entry in `sources` is the stand-in.
        adapter: set when the tensors are those of a LoRA alone.
        merged: adapters lie in these weights.
        notes: for the receipt.
        state: of the model's LoRA layers when this was collected; see `LoraModel.changed_since`.
        storages: addresses of the storages that the tensors lie in, or are computed from.
    """

    layout: TensorLayout
    sources: list[torch.Tensor]
    addresses: list[int]
    computed: Mapping[int, Computed] = field(default_factory=dict)
    adapter: LoraSpec | None = None
    merged: bool = False
    notes: tuple[str, ...] = ()
    state: object = None
    storages: frozenset[int] = frozenset()

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The layout's: name, trainer dtype, shape and aliases; the same object as last time while the layout is."""
        return self.layout.tensors


@dataclass(frozen=True, slots=True)
class _Buffer:
    """A persistent buffer of the bound model: its clean name, and where to find the tensor it has now."""

    clean: str
    module: nn.Module
    name: str


@dataclass(frozen=True, slots=True)
class _Seen:
    """The fingerprint of the last collection, for the cheap check. `kept`: positions of what was not left out; None:
    all."""

    names: list[str]
    kept: list[int] | None
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    pattern: list[int]
    partial: bool
    added: tuple[_Buffer, ...]
    computed: list[str]
    ties: TiesSent
    layout: TensorLayout


class WeightSource:
    """Turns what the trainer hands to `push` into canonical tensors. Not thread safe; holds no tensor between calls.

    Args:
        model: the bound model; None takes names as canonical, wrappers' segments removed.
        known: the model's names, when they were read in another way than by `bake_names`.

    Raises ConfigError or IntegrityError where `bake_names` does.
    """

    def __init__(self, model: nn.Module | None = None, known: CanonicalMap | None = None) -> None:
        self.model = model
        self.map: CanonicalMap | None = bake_names(model) if model is not None and known is None else known
        self._unsaved = frozenset[str]() if model is None else unsaved_names(model)
        self._buffers = [] if model is None or self.map is None else _buffers(model, self.map)
        self._ties = () if self.map is None else list_ties(self.map)
        self._seen: _Seen | None = None

    @property
    def expected(self) -> tuple[TensorInfo, ...] | None:
        """List what a full push of the bound model announces; None when no model is bound."""
        return None if self.map is None else self.map.infos

    def collect(self, named: NamedTensors, *, partial: bool = False, computed: Sequence[Computed] = ()) -> Collected:
        """Exhaust the iterable and resolve its names. Moves no bytes; about a microsecond per tensor when the names,
        shapes, dtypes and ties are those of the last push.

        Args:
            named: (name, tensor) pairs; persistent buffers of the bound model are added unless `partial`.
            partial: a subset is meant.
            computed: tensors that come besides, under clean names.

        Names of the bound model that did not come are not missed here: compare `Collected.tensors` with `expected`.

        Raises:
            MissingTensor: nothing came, or only some of the live tensors that a checkpoint tensor is made of.
            DuplicateTensor: a name came twice, or two different tensors under names that the bound model tied.
            UnexpectedTensor, ShapeMismatch: not a name, or not the shape, of the bound model.
            DtypeMismatch, IntegrityError, ConfigError: as `require_plain`; ConfigError also for what is no pair.
        """
        names, tensors = read_pairs(named)
        if not names and not computed:
            raise nothing_sent()
        extra = [c.name for c in computed]
        seen = self._seen
        if seen is not None and seen.partial == partial and seen.names == names and seen.computed == extra:
            came = tensors if seen.kept is None else [tensors[k] for k in seen.kept]
            sources = came + [_current(buffer) for buffer in seen.added] + [c.stand_in for c in computed]
            addresses, first = _unchanged(seen, sources), len(sources) - len(computed)
            if addresses is not None:
                if self.model is not None:
                    check_ties(self.model, seen.ties, sources)
                return Collected(seen.layout, sources, addresses, dict(enumerate(computed, first)))
        return self._resolve(names, tensors, partial, computed)

    def _resolve(
        self, names: list[str], tensors: list[torch.Tensor], partial: bool, computed: Sequence[Computed]
    ) -> Collected:
        given, kept = names, self._saved(names)
        if kept is not None:
            names, tensors = [names[k] for k in kept], [tensors[k] for k in kept]
        clean = NameIndex()
        for name in names:
            clean.require_text(name)
            clean.add(_resolve_name(self.map, name), name)
        added = () if partial else tuple(b for b in self._buffers if b.clean not in clean.index)
        sources = [require_plain(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
        for buffer in added:
            clean.add(buffer.clean, buffer.clean)
            sources.append(require_plain(buffer.clean, _current(buffer)))
        for item in computed:
            clean.add(item.name, item.name)
            sources.append(item.stand_in)
        addresses = addresses_of(sources) or []
        pattern = tie_pattern(sources, addresses)
        dtypes = [t.dtype for t in sources]
        if self.map is None or self.model is None:
            layout, ties = _unbound_layout(clean.index, sources, pattern), TiesSent()
        else:
            for name, k in clean.index.items():
                live = self.map.live.get(self.map.ties.get(name, name)) or self.map.by_name.get(name)
                if live is not None:
                    check_shape(name, sources[k], live.shape)
            came = _travelling(self.map, clean.index)
            ties = sort_ties(self._ties, clean.index, came, pattern)
            check_ties(self.model, ties, sources)
            layout = _bound_layout(self.map, came, sources, pattern)
        last = self._seen
        if last is not None and last.dtypes == dtypes and vars(last.layout) == vars(layout):
            layout = last.layout
        extra = [item.name for item in computed]
        self._seen = _Seen(
            given, kept, [t.shape for t in sources], dtypes, pattern, partial, added, extra, ties, layout
        )
        return Collected(layout, sources, addresses, dict(enumerate(computed, len(sources) - len(computed))))

    def _saved(self, names: Sequence[str]) -> list[int] | None:
        """List the positions of all names but those of non-persistent buffers, which never travel; None: there are no
        such names."""
        kept = [k for k, name in enumerate(names) if not (isinstance(name, str) and self._is_unsaved(name))]
        return kept if len(kept) < len(names) else None

    def _is_unsaved(self, name: str) -> bool:
        known = self.map
        return known is not None and canonical_unbound(name) in self._unsaved and known.resolve(name) is None


def _resolve_name(known: CanonicalMap | None, given: str) -> str:
    """Return the clean live name, or the checkpoint name, of a tensor that was pushed as `given`.

    Raises UnexpectedTensor for a name that is not the bound model's, UnsupportedLora for a LoRA parameter when no model
    is bound.
    """
    if known is None:
        if is_lora_name(given):
            raise UnsupportedLora(
                "LoRA parameters cannot be pushed without their model",
                where=given,
                expected="a bound model: scaling, active adapters and merge state are not in the tensors",
                got="a name of a LoRA layer, and no model bound",
                remedy="bind the model once (b.bind(peft_model), or model=peft_model) and push again",
                names=(given,),
            )
        return canonical_unbound(given)
    clean = known.resolve(given)
    if clean is not None:
        return clean
    raise unknown_name(
        given, f"a parameter, persistent buffer or checkpoint name of the model ({len(known.live)} tensors)"
    )


def _travelling(known: CanonicalMap, index: Mapping[str, int]) -> dict[str, int]:
    """Live name -> position of the tensor that travels for it: of tied names the kept one's if it came."""
    found: dict[str, int] = {}
    for clean, k in index.items():
        live = known.ties.get(clean, clean)
        if live not in found or live == clean:
            found[live] = k
    return found


def _unchanged(seen: _Seen, sources: list[torch.Tensor]) -> list[int] | None:
    """Return the addresses of plain tensors that have the shapes, dtypes and ties of last time; else None."""
    if not set(map(type, sources)) <= {torch.Tensor, nn.Parameter} or any(map(_NEGATED, sources)):
        return None
    if not all(map(operator.is_, map(_DTYPE, sources), seen.dtypes)):
        return None
    if not all(map(operator.eq, map(_SHAPE, sources), seen.shapes)):
        return None
    # A tensor on meta, or sparse, has no address.
    addresses = addresses_of(sources)
    return addresses if addresses is not None and tie_pattern(sources, addresses) == seen.pattern else None


def _unbound_layout(index: Mapping[str, int], sources: Sequence[torch.Tensor], pattern: Sequence[int]) -> TensorLayout:
    names: dict[int, list[str]] = {}
    for name, k in index.items():
        names.setdefault(k if pattern[k] == NO_ADDRESS else pattern[k], []).append(name)
    tensors, parts = [], []
    for k, (name, *aliases) in names.items():
        t = sources[k]
        tensors.append(TensorInfo(name, dtype_name(t.dtype, name), tuple(t.shape), tuple(aliases), tuple(aliases)))
        parts.append((TensorPart(k),))
    return TensorLayout(tuple(tensors), tuple(parts))


def _bound_layout(
    known: CanonicalMap, came: Mapping[str, int], sources: Sequence[torch.Tensor], pattern: Sequence[int]
) -> TensorLayout:
    """The canonical tensors whose live tensors came, in the model's order."""
    found: dict[object, tuple[TensorInfo, tuple[TensorPart, ...]]] = {}
    for tensor in known.tensors:
        made_of = _parts_of(known, tensor, came)
        if made_of is None:
            continue
        dtype = _common_dtype(tensor, {dtype_name(sources[p.index].dtype, tensor.name) for p in made_of})
        # The iterable may tie what the model does not: the same elements under a second name travel once.
        key: object = tensor.name
        if all(pattern[p.index] >= 0 for p in made_of):
            key = tensor.shape, tuple((pattern[p.index], p.source, p.dest) for p in made_of)
        info = TensorInfo(tensor.name, dtype, tensor.shape, tensor.aliases, tensor.shared)
        if key in found:
            earlier, made_of = found[key]
            aliases = (*earlier.aliases, tensor.name, *tensor.aliases)
            shared = (*earlier.shared, tensor.name, *tensor.shared)
            info = TensorInfo(earlier.name, earlier.dtype, earlier.shape, aliases, shared)
        found[key] = info, made_of
    return TensorLayout(tuple(info for info, _ in found.values()), tuple(made_of for _, made_of in found.values()))


def _common_dtype(tensor: CanonicalTensor, sent: set[str]) -> str:
    """Choose the dtype in which a canonical tensor is announced: that of its parts, else the model's."""
    if len(sent) == 1:
        return next(iter(sent))
    if not sent <= FLOATS:
        raise DtypeMismatch(
            "a checkpoint tensor is made of live tensors of which some hold values and some codes",
            where=tensor.name,
            expected="parts of one dtype, or of floating dtypes",
            got=", ".join(sorted(sent)),
            remedy="push all parts as values, or all as codes together with their scales",
            names=(tensor.name,),
        )
    return dtype_name(tensor.dtype, tensor.name)


def _parts_of(known: CanonicalMap, tensor: CanonicalTensor, came: Mapping[str, int]) -> tuple[TensorPart, ...] | None:
    """List the parts of a canonical tensor in this push; None when nothing of it came."""
    live = [piece.live for piece in tensor.pieces]
    absent = sorted({name for name in live if name not in came})
    direct = came.get(tensor.name) if tensor.name not in live else None
    if direct is not None:
        if len(absent) < len(set(live)):
            raise DuplicateTensor(
                "a tensor was sent under its checkpoint name and as the live tensors that it is made of",
                where=tensor.name,
                expected="one of the two",
                got=f"{tensor.name} and {', '.join(sorted(set(live) - set(absent)))}",
                remedy="push model.named_parameters(), or checkpoint tensors, not both",
                names=(tensor.name,),
            )
        return (TensorPart(direct),)
    if not absent:
        whole = dense(tensor.shape)
        alike = known.live[live[0]].shape == tensor.shape
        if alike and tensor.pieces == (Piece(live[0], whole, whole),):
            return (TensorPart(came[live[0]]),)
        return tuple(TensorPart(came[p.live], p.source, p.dest) for p in tensor.pieces)
    if len(absent) == len(set(live)):
        return None
    raise MissingTensor(
        "a checkpoint tensor is made of several live tensors, and only some came",
        where=tensor.name,
        expected=", ".join(sorted(set(live))),
        got=f"without {', '.join(absent)}",
        remedy="push all of them together",
        names=tuple(absent),
    )


def _buffers(model: nn.Module, known: CanonicalMap) -> list[_Buffer]:
    found: dict[str, _Buffer] = {}
    for _, clean, module in walk(model):
        for name in module._buffers:
            live = known.live.get(clean + name)
            if live is not None and live.buffer:
                found[clean + name] = _Buffer(clean + name, module, name)
    return list(found.values())


def _current(buffer: _Buffer) -> torch.Tensor:
    """The tensor that a buffer holds now. Raises MissingTensor when the model dropped it since it was bound."""
    tensor = buffer.module._buffers.get(buffer.name)
    if tensor is None:
        raise MissingTensor(
            "a persistent buffer of the bound model is gone",
            where=buffer.clean,
            expected="the buffers that the model had when it was bound",
            got="None in its place",
            remedy="bind the model again after changing its buffers",
            names=(buffer.clean,),
        )
    return tensor
