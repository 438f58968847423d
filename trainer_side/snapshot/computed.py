"""Write tensors that are computed while the snapshot is written: one live tensor at a time, and all that is made of it.

Merged weights would double the trainer's memory if they were all there at the same time; so each is computed, copied
into the arena with its one rounding, digested, and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from bridge.errors import DtypeMismatch, ShapeMismatch
from bridge.model.dtypes import dtype_of
from bridge.model.regions import cut
from bridge.shm.seal import CHUNK, fold
from trainer_side.names.tensor_layout import Collected, Computed
from trainer_side.snapshot.batches import SlotViews, TensorCopy, WriteTally, copy_views
from trainer_side.snapshot.finite import is_finite


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


def write_group(
    group: ComputedGroup,
    place: SlotViews,
    collected: Collected,
    digests: npt.NDArray[np.uint64],
    tally: WriteTally,
) -> None:
    """Compute one group, write its items and fill in their digests. One unit of work of a copying thread.

    Raises ShapeMismatch or DtypeMismatch for values that are not what was announced.
    """
    with torch.no_grad():
        values = {index: _compute(collected.computed[index], group.items) for index in group.indices}
        sources = {p.index: collected.sources[p.index] for item in group.items for p in item.parts} | values
        into, out_of = copy_views(group.items, place, sources)
        for dest, source in zip(into, out_of, strict=True):
            dest.copy_(source)
    bad = []
    for item in group.items:
        raw = place.bytes_of(item.spec)
        digests[item.index] = fold(xxhash.xxh3_64_intdigest(raw[a:b].data) for a, b in cut(len(raw), CHUNK))
        if not is_finite(raw, item.spec.dtype):
            bad.append(item.index)
    tally.add(sum(item.spec.nbytes for item in group.items), bad)


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
