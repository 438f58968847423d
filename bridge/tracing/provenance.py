"""Log which write supplied which elements of a storage; behind the recorder.

Regions count elements of a storage. The last write to an element supplies it; a write says that its elements are those
of a sent tensor, a constant, or a value that cannot be followed, and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from bridge.model.regions import Region, follow

NOT_SENT = "reads a value that no sent tensor supplies"
NOT_AFFINE = "a view too irregular to describe as regions"


@dataclass(slots=True)
class Provenance:
    """The sources of a tensor's elements.

    Attributes:
        pieces: (source name, region of the tensor read row-major, region of the source); the regions of a piece have
            the same shape, and the pieces are disjoint.
        fills: (region of the tensor read row-major, constant) pairs.
        taint: why some element cannot be followed, or None.
    """

    pieces: list[tuple[str, Region, Region]]
    fills: list[tuple[Region, float]]
    taint: str | None


@dataclass(slots=True)
class LoggedWrite:
    """One entry of a storage's log: `held` holds elements `origin` of source `name` (sent as `dtype`, cast on
    the way to each of `via`), or `value`, or a tainted value. All of `held` lies in [low, high)."""

    held: Region
    name: str | None = None
    origin: Region | None = None
    dtype: torch.dtype | None = None
    via: frozenset[torch.dtype] = frozenset()
    value: float | None = None
    taint: str | None = None
    low: int = field(init=False)
    high: int = field(init=False)

    def __post_init__(self) -> None:
        self.low, self.high = self.held.offset, self.held.offset + extent(self.held)


@dataclass(slots=True)
class StorageLog:
    """The writes into one storage. `keep` holds it alive, so that its address is not used again."""

    keep: torch.UntypedStorage
    dtype: torch.dtype
    log: list[LoggedWrite] = field(default_factory=list)
    targets: list[tuple[str, Region]] = field(default_factory=list)


ResolvedWrites = list[tuple[LoggedWrite | None, Region, Region]]
"""(the last write, region of its origin, companion region); None where nothing was written."""


def resolve(log: list[LoggedWrite], view: Region, other: Region) -> ResolvedWrites:
    """Find the last write to each element of a view. The companion `other` is split alongside."""
    found: ResolvedWrites = []
    open_parts = [(view, other)] if view.numel else []
    for write in reversed(log):
        rest: list[tuple[Region, Region]] = []
        for part, beside in open_parts:
            if write.high <= part.offset or part.offset + extent(part) <= write.low:
                rest.append((part, beside))
                continue
            split = follow(part, beside, write.held, write.origin or write.held)
            if split is None:
                found.append((LoggedWrite(beside, taint=NOT_AFFINE), beside, beside))
                continue
            found += [(write, origin, held) for origin, held in split.inside]
            rest += split.outside
        open_parts = rest
        if not open_parts:
            break
    found += [(None, part, beside) for part, beside in open_parts]
    return found


def entry_for(write: LoggedWrite | None, origin: Region, held: Region, dtype: torch.dtype) -> LoggedWrite:
    """Make the log entry for a copy: `held` now shows the elements that `write` held, as `dtype`."""
    if write is None:
        return LoggedWrite(held, taint=NOT_SENT)
    if write.name is None:
        return LoggedWrite(held, value=write.value, taint=write.taint)
    via = write.via if dtype == write.dtype or dtype in write.via else write.via | {dtype}
    return LoggedWrite(held, name=write.name, origin=origin, dtype=write.dtype, via=via)


def why_not(write: LoggedWrite | None, final: torch.dtype) -> str | None:
    """Say why a value that came this way into a tensor of dtype `final` is not the sent value; None when it is."""
    if write is None:
        return NOT_SENT
    for dtype in write.via:
        # One cast from the sent dtype to the final one must give the same bits as this chain of casts.
        if write.dtype is not None and dtype != final and not exact(write.dtype, dtype):
            return f"rounds through {dtype} on its way from {write.dtype} to {final}"
    return write.taint


@lru_cache(maxsize=1024)
def exact(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """True when every value of dtype `narrow` is a value of dtype `wide`."""
    if narrow == wide or narrow == torch.bool:
        return True
    if narrow.is_complex or wide.is_complex or wide == torch.bool:
        return False
    if not wide.is_floating_point:
        if narrow.is_floating_point:
            return False
        small, large = torch.iinfo(narrow), torch.iinfo(wide)
        return large.min <= small.min and small.max <= large.max
    fine = torch.finfo(wide)
    if not narrow.is_floating_point:
        return torch.iinfo(narrow).max <= 2 / fine.eps
    coarse = torch.finfo(narrow)
    return fine.eps <= coarse.eps and fine.max >= coarse.max and fine.tiny * fine.eps <= coarse.tiny * coarse.eps


def extent(region: Region) -> int:
    """Measure from a region's first element to one past its last, in elements of the storage."""
    return 1 + sum((n - 1) * s for n, s in zip(region.shape, region.strides, strict=True))


def region_of(tensor: torch.Tensor) -> Region:
    return Region(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


def window(region: Region, axis: int, start: int, length: int) -> Region:
    """Cut a region as `torch.narrow` cuts a tensor."""
    shape = (*region.shape[:axis], length, *region.shape[axis + 1 :])
    return Region(region.offset + start * region.strides[axis], shape, region.strides)


def storage_key(tensor: torch.Tensor) -> int:
    """Identify a tensor's storage by its address; logged storages are kept alive, so it stays theirs."""
    address: int = tensor.untyped_storage()._cdata
    return address


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a nest of arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
