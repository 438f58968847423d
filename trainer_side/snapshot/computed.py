"""Tensors that are computed while the snapshot is written: one live tensor at a time, all that is made of it at once.

Merged weights would double the trainer's memory if they were all there at the same time; so each is computed, copied
into the arena with its one rounding, digested, and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from bridge.errors import DtypeMismatch, ShapeMismatch
from bridge.model.dtypes import dtype_of
from bridge.model.regions import cut
from bridge.shm.seal import CHUNK, fold
from trainer_side.names.tensor_layout import Computed
from trainer_side.snapshot.batches import SlotViews, TensorCopy, bytes_of, copy_views
from trainer_side.snapshot.finite import is_finite


@dataclass(frozen=True)
class ComputedGroup:
    """Items that are made of the same computed tensors (`indices` into the collected sources)."""

    indices: frozenset[int]
    items: tuple[TensorCopy, ...]


def group_computed(items: Iterable[TensorCopy], computed: Mapping[int, Computed]) -> list[ComputedGroup]:
    """The items that need a computed tensor, by which ones they need."""
    found: dict[frozenset[int], list[TensorCopy]] = {}
    for item in items:
        needs = frozenset(part.index for part in item.parts if part.index in computed)
        if needs:
            found.setdefault(needs, []).append(item)
    return [ComputedGroup(needs, tuple(made_of)) for needs, made_of in found.items()]


def jobs(
    found: Iterable[ComputedGroup],
    place: SlotViews,
    sources: list[torch.Tensor],
    computed: Mapping[int, Computed],
    digests: npt.NDArray[np.uint64],
    suspect: Callable[[Iterable[int]], None],
    count: Callable[[int], None],
) -> Iterator[Callable[[], None]]:
    """Units of work, one per group; each writes its items, fills in their digests and tells what is not finite.

    A unit raises ShapeMismatch or DtypeMismatch for values that are not what was announced.
    """

    def job(group: ComputedGroup) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                made = {index: _values(computed[index], group.items) for index in group.indices}
                shown = _Overlay(sources, made)
                into, out_of = copy_views(group.items, place, shown)
                for dest, source in zip(into, out_of, strict=True):
                    dest.copy_(source)
            for item in group.items:
                raw = bytes_of(item.spec, place)
                digests[item.index] = fold(xxhash.xxh3_64_intdigest(raw[a:b].data) for a, b in cut(len(raw), CHUNK))
                if not is_finite(raw, item.spec.dtype):
                    suspect((item.index,))
                count(item.spec.nbytes)

        return run

    for group in found:
        yield job(group)


class _Overlay(list[torch.Tensor]):
    """The collected sources with computed tensors in place of their stand-ins; looks up, copies nothing."""

    def __init__(self, sources: list[torch.Tensor], made: Mapping[int, torch.Tensor]) -> None:
        super().__init__()
        self._sources, self._made = sources, made

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        made = self._made.get(index)
        return self._sources[index] if made is None else made


def _values(computed: Computed, items: Iterable[TensorCopy]) -> torch.Tensor:
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
