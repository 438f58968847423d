"""The manifest of a model version: values, no I/O.

A manifest names the tensors of one model by their canonical (checkpoint) names, in the order in which they lie in the
arena. It does not change from push to push; the bytes do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property

import msgspec
import xxhash

from bridge.errors import REPORT, DuplicateTensor, ProtocolError
from bridge.model.dtypes import itemsize

ALIGN = 256
"""Every tensor starts at a multiple of this many bytes, so that a view of any dtype is aligned."""
MAX_NBYTES = 2**62
"""Largest tensor: offsets stay inside 64 bits."""


class TensorSpec(msgspec.Struct, frozen=True):
    """One tensor: canonical name, wire dtype, global shape, byte offset inside a version.

    `aliases` are other canonical names of the same trainer storage (ties): one copy travels, and an engine that does
    not tie them may load it under each name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * itemsize(self.dtype)


class Shard(msgspec.Struct, frozen=True):
    """One piece of a tensor: global shape, offsets of the piece, its local shape (all per dimension, in elements)."""

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.global_shape) == len(self.offsets) == len(self.shape):
            raise ProtocolError(
                "a shard's dimensions differ in number",
                where="a shard",
                expected="as many offsets and sizes as the tensor has dimensions",
                got=f"{self.global_shape} {self.offsets} {self.shape}",
                remedy=REPORT,
            )
        for size, offset, length in zip(self.global_shape, self.offsets, self.shape, strict=True):
            if offset < 0 or length < 0 or offset + length > size:
                raise ProtocolError(
                    "a shard reaches outside its tensor",
                    where="a shard",
                    expected=f"inside {self.global_shape}",
                    got=f"offsets {self.offsets}, shape {self.shape}",
                    remedy=REPORT,
                )

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Manifest(msgspec.Struct, frozen=True, dict=True):
    """The ordered tensors of one model; `nbytes` is the size of one version, padding included."""

    tensors: tuple[TensorSpec, ...]
    nbytes: int

    @cached_property
    def by_name(self) -> Mapping[str, TensorSpec]:
        """Canonical name -> spec (aliases are not keys)."""
        return {spec.name: spec for spec in self.tensors}

    @cached_property
    def digest(self) -> bytes:
        """16 bytes over names, dtypes, shapes, offsets and aliases, in order."""
        return xxhash.xxh3_128_digest(msgspec.msgpack.encode(self.tensors))

    @cached_property
    def payload_nbytes(self) -> int:
        """Bytes of the tensors alone, without padding."""
        return sum(spec.nbytes for spec in self.tensors)


class TensorInfo(msgspec.Struct, frozen=True):
    """One tensor as the trainer announces it, before it has a place in an arena.

    `aliases` are other names of the same trainer storage. `shared` are those of them that a checkpoint holds as tensors
    of their own (a layer that is used twice), so that an engine has to have a place for each; the others, such as a
    head that the model's library ties, it leaves out.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


def aligned(nbytes: int, align: int = ALIGN) -> int:
    """Round `nbytes` up to a multiple of `align`."""
    return -(-nbytes // align) * align


def lay_out(tensors: Iterable[TensorInfo]) -> Manifest:
    """Give every tensor its offset, in the order given.

    Raises DuplicateTensor for a name that comes twice, ProtocolError for an impossible shape, DtypeMismatch.
    """
    specs: list[TensorSpec] = []
    seen: set[str] = set()
    offset = 0
    for info in tensors:
        for name in (info.name, *info.aliases):
            if name in seen:
                raise DuplicateTensor(
                    "the same canonical name was sent twice",
                    where=name,
                    expected="each name once",
                    got="a second time",
                    remedy="push each tensor once; named_parameters() does",
                    names=(name,),
                )
            seen.add(name)
        spec = TensorSpec(info.name, info.dtype, info.shape, offset, info.aliases)
        # a negative size would move the next offset back over the tensors before it
        if any(size < 0 for size in info.shape) or spec.nbytes > MAX_NBYTES:
            raise ProtocolError(
                "not the shape of a tensor",
                where=info.name,
                expected="sizes of 0 or more",
                got=str(info.shape),
                remedy=REPORT,
                names=(info.name,),
            )
        specs.append(spec)
        offset = aligned(offset + spec.nbytes)
    return Manifest(tuple(specs), offset)


def validate(manifest: Manifest) -> Manifest:
    """Check a manifest that came from another process: offsets in order, aligned, inside `nbytes`, names unique.

    Raises ProtocolError (bad geometry), DuplicateTensor or DtypeMismatch.
    """
    rebuilt = lay_out(TensorInfo(s.name, s.dtype, s.shape, s.aliases) for s in manifest.tensors)
    if rebuilt != manifest:
        raise ProtocolError(
            "a manifest's offsets are not the layout of its tensors",
            where="a manifest",
            expected=f"{rebuilt.nbytes} bytes laid out in order at multiples of {ALIGN}",
            got=f"{manifest.nbytes} bytes",
            remedy="run one version of weighbridge on both sides",
        )
    return manifest
