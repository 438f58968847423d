"""From an iterable of (live name, tensor) to canonical tensors: references, names and ties, no bytes moved yet.

The first push of a layout resolves every name; the result is kept as a `Layout`. Later pushes only check, with a few
list comparisons, that names, shapes, dtypes and ties are those of the last one. No tensor is kept between pushes: a
trainer that offloads its weights gets its memory back.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bridge.dtypes import dtype_name
from bridge.errors import (
    ConfigError,
    DtypeMismatch,
    DuplicateTensor,
    IntegrityError,
    MissingTensor,
    ShapeMismatch,
    UnexpectedTensor,
)
from bridge.manifest import TensorInfo
from bridge.plan import Region, dense
from trainer_side.naming import CanonicalMap, CanonicalTensor, Piece, bake_names, canonical_unbound, walk

Named = Iterable[tuple[str, torch.Tensor]]

_DTYPE = operator.attrgetter("dtype")
_SHAPE = operator.attrgetter("shape")


@dataclass(frozen=True, slots=True)
class Part:
    """Elements `source` of the collected tensor at `index` become elements `dest` of a canonical tensor.

    Both count row-major; None for both says the whole tensor, as it is.
    """

    index: int
    source: Region | None = None
    dest: Region | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """What stays the same from push to push: the canonical tensors and which collected tensors they are made of.

    Compared by identity: the same object means that nothing about names, shapes, dtypes and ties has changed.
    """

    tensors: tuple[TensorInfo, ...]
    parts: tuple[tuple[Part, ...], ...]


@dataclass(frozen=True, eq=False)
class Collected:
    """The trainer's tensors of one push, referenced but not yet copied. Fills the port `bridge.ports.Snapshot`.

    Attributes:
        layout: names and geometry.
        sources: the collected tensors, in the order that `Part.index` counts.
        addresses: where the first element of each lies; 0 where there is none.
    """

    layout: Layout
    sources: list[torch.Tensor]
    addresses: list[int]

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Name, trainer dtype, shape, aliases; the same object as last time when nothing about the layout changed."""
        return self.layout.tensors


@dataclass(frozen=True, slots=True)
class _Buffer:
    """A persistent buffer of the bound model: its clean name, and where to find the tensor it has now."""

    clean: str
    module: nn.Module
    name: str


@dataclass(frozen=True, slots=True)
class _Seen:
    """The fingerprint of the last collection, for the cheap check."""

    names: list[str]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    pattern: list[int]
    partial: bool
    added: tuple[_Buffer, ...]
    layout: Layout


class WeightSource:
    """Turns what the trainer hands to `push` into canonical tensors. Not thread safe; holds no tensor between calls.

    Args:
        model: the bound model; None takes names as canonical, wrappers' segments removed.

    Raises ConfigError or IntegrityError where `bake_names` does.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model
        self.map: CanonicalMap | None = None if model is None else bake_names(model)
        self._buffers = [] if model is None or self.map is None else _buffers(model, self.map)
        self._seen: _Seen | None = None

    @property
    def expected(self) -> tuple[TensorInfo, ...] | None:
        """What a full push of the bound model announces; None when no model is bound."""
        return None if self.map is None else self.map.infos

    def collect(self, named: Named, *, partial: bool = False) -> Collected:
        """Exhaust the iterable and resolve it; moves no bytes, about a microsecond per tensor when nothing changed.

        With a bound model its persistent buffers are added, unless `partial`. Names of the model that do not come are
        not missed here: compare `Collected.tensors` with `expected`.

        Raises MissingTensor (nothing came, or only some of the live tensors that a checkpoint tensor is made of),
        DuplicateTensor, UnexpectedTensor (a name that is not the bound model's), ShapeMismatch (not the bound model's
        shape), DtypeMismatch (cannot travel), IntegrityError (no values: meta), ConfigError (not (name, tensor) pairs,
        or a sharded DTensor).
        """
        names, tensors = _exhaust(named)
        seen = self._seen
        if seen is not None and seen.partial == partial and seen.names == names:
            sources = tensors + [_current(buffer) for buffer in seen.added]
            addresses = _unchanged(seen, sources)
            if addresses is not None:
                return Collected(seen.layout, sources, addresses)
        return self._resolve(names, tensors, partial)

    def _resolve(self, names: list[str], tensors: list[torch.Tensor], partial: bool) -> Collected:
        clean = _Names(self.map)
        for name in names:
            clean.add(name)
        added = () if partial else tuple(b for b in self._buffers if b.clean not in clean.index)
        for buffer in added:
            clean.add(buffer.clean)
        sources = [
            _plain(name, tensor)
            for name, tensor in zip(
                [*names, *(b.clean for b in added)], [*tensors, *(_current(b) for b in added)], strict=True
            )
        ]
        addresses = _addresses(sources) or []
        pattern = _tie_pattern(sources, addresses)
        layout = (
            _unbound_layout(clean, sources, pattern)
            if self.map is None
            else _bound_layout(self.map, clean, sources, pattern)
        )
        if self._seen is not None and (layout.tensors, layout.parts) == (
            self._seen.layout.tensors,
            self._seen.layout.parts,
        ):
            layout = self._seen.layout
        shapes, dtypes = [t.shape for t in sources], [t.dtype for t in sources]
        self._seen = _Seen(names, shapes, dtypes, pattern, partial, added, layout)
        return Collected(layout, sources, addresses)


class _Names:
    """Clean names in the order they came, each once."""

    def __init__(self, known: CanonicalMap | None) -> None:
        self.known = known
        self.index: dict[str, int] = {}
        self._given: list[str] = []

    def add(self, given: str) -> None:
        if not isinstance(given, str):
            raise _not_pairs(f"item {len(self._given)}", f"a name of type {type(given).__name__}")
        clean = canonical_unbound(given) if self.known is None else self._live(self.known, given)
        if clean in self.index:
            earlier = self._given[self.index[clean]]
            raise DuplicateTensor(
                "the same tensor was sent twice",
                where=clean,
                expected="each name once",
                got=repr(given) if given == earlier else f"{earlier!r} and {given!r}",
                remedy="push one iterable over one model",
                names=(clean,),
            )
        self.index[clean] = len(self._given)
        self._given.append(given)

    @staticmethod
    def _live(known: CanonicalMap, given: str) -> str:
        clean = known.resolve(given)
        if clean is not None:
            return clean
        if given in known.by_name:
            return known.by_name[given].name
        raise UnexpectedTensor(
            "the bound model has no tensor of this name",
            where=given,
            expected=f"a parameter, persistent buffer or checkpoint name of the model ({len(known.live)} tensors)",
            got=repr(given),
            remedy="push the tensors of the bound model, or bind the model that these belong to",
            names=(given,),
        )


def _exhaust(named: Named) -> tuple[list[str], list[torch.Tensor]]:
    """Names and tensors of the iterable. Raises MissingTensor when nothing came, ConfigError for other things."""
    if isinstance(named, Mapping):
        named = named.items()
    names: list[str] = []
    tensors: list[torch.Tensor] = []
    try:
        stream = iter(named)
    except TypeError as error:
        raise _not_pairs("the argument of push", str(error)) from error
    # Two plain lists: thousands of kept tuples would set the garbage collector off in every push.
    for item in stream:
        try:
            name, tensor = item
        except (TypeError, ValueError) as error:
            raise _not_pairs(f"item {len(names)}", f"{type(item).__name__}: {error}") from error
        names.append(name)
        tensors.append(tensor)
    if not names:
        raise MissingTensor(
            "nothing was sent: the iterable is empty",
            where="the iterable given to push",
            expected="at least one (name, tensor) pair",
            got="none",
            remedy="a generator can be used only once: call model.named_parameters() again for each push",
        )
    return names, tensors


def _not_pairs(where: str, got: str) -> ConfigError:
    return ConfigError(
        "push takes an iterable of (name, tensor) pairs",
        where=where,
        expected="pairs of str and torch.Tensor",
        got=got,
        remedy="push model.named_parameters()",
    )


def _unchanged(seen: _Seen, sources: list[torch.Tensor]) -> list[int] | None:
    """The cheap check: plain tensors of the same shapes, dtypes and ties as last time. Returns their addresses."""
    if not set(map(type, sources)) <= {torch.Tensor, nn.Parameter}:
        return None
    if not all(map(operator.is_, map(_DTYPE, sources), seen.dtypes)):
        return None
    if not all(map(operator.eq, map(_SHAPE, sources), seen.shapes)):
        return None
    # A tensor on meta, or sparse, has no address.
    addresses = _addresses(sources)
    return addresses if addresses is not None and _tie_pattern(sources, addresses) == seen.pattern else None


def _addresses(sources: Sequence[torch.Tensor]) -> list[int] | None:
    try:
        return [t.data_ptr() for t in sources]
    except RuntimeError:
        return None


_NO_ADDRESS = -1
"""In a tie pattern: nothing to compare (no elements), or no values (meta), which the slow path tells apart."""


def _tie_pattern(sources: Sequence[torch.Tensor], addresses: Sequence[int]) -> list[int]:
    """Per tensor, the index of the first one that is the same elements of the same storage."""
    first: dict[Any, int] = {}
    keep = first.setdefault
    pattern = [keep(address, k) if address else _NO_ADDRESS for k, address in enumerate(addresses)]
    if len(first) == len(addresses):
        return pattern
    for k, head in enumerate(pattern):
        if head not in (k, _NO_ADDRESS):
            t = sources[k]
            same = (addresses[k], t.shape, t.stride(), t.dtype, t.device)
            h = sources[head]
            pattern[k] = head if same == (addresses[head], h.shape, h.stride(), h.dtype, h.device) else keep(same, k)
    return pattern


def _unbound_layout(names: _Names, sources: Sequence[torch.Tensor], pattern: Sequence[int]) -> Layout:
    aliases: dict[int, list[str]] = {}
    for name, k in names.index.items():
        if pattern[k] not in (k, _NO_ADDRESS):
            aliases.setdefault(pattern[k], []).append(name)
    tensors, parts = [], []
    for name, k in names.index.items():
        if pattern[k] in (k, _NO_ADDRESS):
            t = sources[k]
            tensors.append(TensorInfo(name, dtype_name(t.dtype, name), tuple(t.shape), tuple(aliases.get(k, ()))))
            parts.append((Part(k),))
    return Layout(tuple(tensors), tuple(parts))


def _bound_layout(
    known: CanonicalMap, names: _Names, sources: Sequence[torch.Tensor], pattern: Sequence[int]
) -> Layout:
    """The canonical tensors whose live tensors came, in the model's order."""
    came: dict[str, int] = {}
    for clean, k in names.index.items():
        live = known.ties.get(clean, clean)
        if live not in came or live == clean:
            came[live] = k
    _check_shapes(known, came, sources)
    infos: dict[object, TensorInfo] = {}
    parts: dict[object, tuple[Part, ...]] = {}
    for tensor in known.tensors:
        made_of = _parts_of(known, tensor, came)
        if made_of is None:
            continue
        dtype = _common_dtype(tensor, [sources[p.index] for p in made_of])
        # The iterable may tie what the model does not: the same elements under a second name travel once.
        key = tuple((pattern[p.index] if pattern[p.index] >= 0 else p.index, p.source, p.dest) for p in made_of)
        identity: object = (key, tensor.shape) if all(pattern[p.index] >= 0 for p in made_of) else tensor.name
        earlier = infos.get(identity)
        if earlier is None:
            infos[identity] = TensorInfo(tensor.name, dtype_name(dtype, tensor.name), tensor.shape, tensor.aliases)
            parts[identity] = made_of
        else:
            aliases = (*earlier.aliases, tensor.name, *tensor.aliases)
            infos[identity] = TensorInfo(earlier.name, earlier.dtype, earlier.shape, aliases)
    return Layout(tuple(infos.values()), tuple(parts.values()))


def _parts_of(known: CanonicalMap, tensor: CanonicalTensor, came: Mapping[str, int]) -> tuple[Part, ...] | None:
    """What a canonical tensor is made of in this push; None when nothing of it came."""
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
        return (Part(direct),)
    if not absent:
        whole = dense(tensor.shape)
        alike = known.live[live[0]].shape == tensor.shape
        if alike and tensor.pieces == (Piece(live[0], whole, whole),):
            return (Part(came[live[0]]),)
        return tuple(Part(came[p.live], p.source, p.dest) for p in tensor.pieces)
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


def _common_dtype(tensor: CanonicalTensor, sources: Sequence[torch.Tensor]) -> torch.dtype:
    dtypes = {t.dtype for t in sources}
    if len(dtypes) == 1:
        return dtypes.pop()
    return tensor.dtype


def _check_shapes(known: CanonicalMap, came: Mapping[str, int], sources: Sequence[torch.Tensor]) -> None:
    for name, k in came.items():
        place = known.live.get(name) or known.by_name.get(name)
        if place is not None and tuple(sources[k].shape) != place.shape:
            raise ShapeMismatch(
                "a tensor does not have the bound model's shape",
                where=name,
                expected=str(list(place.shape)),
                got=str(list(sources[k].shape)),
                remedy="bind the model whose tensors are pushed, again if its layers were resized",
                names=(name,),
            )


def _plain(name: str, tensor: object) -> torch.Tensor:
    """The tensor itself, checked to have values that can be copied; a replicated DTensor becomes its local tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise _not_pairs(name, type(tensor).__name__)
    tensor = _local(name, tensor)
    if tensor.is_meta:
        raise IntegrityError(
            "a tensor on the meta device has no values to send",
            where=name,
            expected="a tensor with storage",
            got=f"device meta, shape {list(tensor.shape)}",
            remedy="materialise the model (load its weights) before the push",
            names=(name,),
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise DtypeMismatch(
            "only dense tensors travel",
            where=name,
            expected=str(torch.strided),
            got=f"{tensor.layout}, quantized {tensor.is_quantized}",
            remedy="send the dense values (tensor.to_dense(), tensor.dequantize())",
            names=(name,),
        )
    return tensor


def _local(name: str, tensor: torch.Tensor) -> torch.Tensor:
    library = sys.modules.get("torch.distributed.tensor")
    if library is None or not isinstance(tensor, library.DTensor):
        return tensor
    placements = tensor.placements
    if all(placement.is_replicate() for placement in placements):
        local: torch.Tensor = tensor.to_local()
        return local
    raise ConfigError(
        "sharded tensors cannot be pushed yet",
        where=name,
        expected="a plain tensor, or a DTensor that is replicated on every dimension of its mesh",
        got=f"a DTensor placed {placements}",
        remedy="push tensor.full_tensor() until sharded pushes are supported",
        names=(name,),
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
            remedy="bind the model again after changing its buffers",
            names=(buffer.clean,),
        )
    return tensor
