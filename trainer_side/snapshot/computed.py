"""Write tensors that are computed while the snapshot is written: one live tensor at a time, and all that is made of it.

Merged weights would double the trainer's memory if they were all there at the same time; so each is computed, copied
into the arena with its one rounding, digested, and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from bridge.errors import DtypeMismatch, ShapeMismatch
from bridge.model.regions import cut
from bridge.model.torch_dtypes import dtype_of
from bridge.shm.seal import CHUNK, fold
from trainer_side.names.tensor_layout import Collected, Computed
from trainer_side.snapshot.batches import SlotViews, TensorCopy, UnitWritten, copy_views
from trainer_side.snapshot.finite import is_finite

Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class ComputedGroup:
    """Tensors of the manifest that are made of the same computed tensors (`indices` into the collected sources)."""

    indices: frozenset[int]
    items: tuple[TensorCopy, ...]


def group_computed(items: Iterable[TensorCopy], computed: Mapping[int, Computed]) -> list[ComputedGroup]:
    """Group the items that need a computed tensor by which ones they need."""
    found: dict[frozenset[int], list[TensorCopy]] = {}
    for item in items:
        needs = frozenset(part.index for part in item.parts if part.index in computed)
        if needs:
            found.setdefault(needs, []).append(item)
    return [ComputedGroup(needs, tuple(made_of)) for needs, made_of in found.items()]


def write_group(group: ComputedGroup, place: SlotViews, collected: Collected, digests: Digests) -> UnitWritten:
    """Compute one group, and write its items. One unit of work of a copying thread.

    Raises ShapeMismatch or DtypeMismatch for values that are not what was announced.
    """
    with torch.no_grad():
        values = {index: _compute(collected.computed[index], group.items) for index in group.indices}
    sources = {p.index: collected.sources[p.index] for item in group.items for p in item.parts} | values
    return write_items(group.items, place, sources, digests)


def write_items(
    items: Sequence[TensorCopy],
    place: SlotViews,
    sources: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
    digests: Digests,
) -> UnitWritten:
    """Write whole items, whatever the order of their elements in the trainer, digest and check them."""
    with torch.no_grad():
        torch._foreach_copy_(*copy_views(items, place, sources))
    bad: list[int] = []
    for item in items:
        raw, finite, chunks = place.bytes_of(item.spec), True, []
        for start, end in cut(len(raw), CHUNK):
            chunks.append(xxhash.xxh3_64_intdigest(raw[start:end].data))
            finite = finite and is_finite(raw[start:end], item.spec.dtype)
        digests[item.index] = fold(chunks)
        bad += [] if finite else [item.index]
    return UnitWritten(sum(item.spec.nbytes for item in items), bad)


def _compute(computed: Computed, items: Iterable[TensorCopy]) -> torch.Tensor:
    """Run one computation, for the dtype that its items travel in: the widest where they differ."""
    dtypes = {item.spec.dtype for item in items}
    wire = max((dtype_of(name) for name in dtypes), key=lambda dtype: dtype.itemsize)
    if not wire.is_floating_point:
        raise DtypeMismatch(
            "a computed weight cannot be stored as integers",
            where=computed.name,
            expected="a floating dtype in the engine",
            got=", ".join(sorted(dtypes)),
            remedy="push the base weights in their own format (mode='base') and the adapter beside them",
            names=(computed.name,),
        )
    values = computed.compute(wire)
    if values.shape != computed.stand_in.shape:
        raise ShapeMismatch(
            "a computed tensor does not have the shape that was announced",
            where=computed.name,
            expected=str(list(computed.stand_in.shape)),
            got=str(list(values.shape)),
            remedy="bind the model again if its layers were resized",
            names=(computed.name,),
        )
    return values.detach()
