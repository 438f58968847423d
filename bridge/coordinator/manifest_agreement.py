"""Manifest agreement: combine the engines' plans into one manifest, and compare sealed versions by digest. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bridge.coordinator.unused_tensors import ALL_USED, Unused
from bridge.errors import SAME_MODEL, DtypeMismatch, ShapeMismatch
from bridge.model.dtypes import CODES, FLOATS, INTEGERS
from bridge.model.manifest import Manifest, TensorInfo, lay_out
from bridge.model.regions import Region, dense, source_coverage
from bridge.protocol.coordinator_messages import PlanRequest
from bridge.protocol.rank_jobs import RankBake


def serves(planned: tuple[TensorInfo, ...], partial: bool, request: PlanRequest, unsent: Sequence[str] = ()) -> bool:
    """Decide whether an existing plan can carry this request.

    The same announcement can, unless that plan was made for a subset and the whole model is meant now; so can a subset
    of it, when a subset is meant: in the same dtypes, or in floats for floats, which the snapshot converts. Any other
    dtype means something else, and only the engines know whether they can take that. A subset of quantised weights is
    asked about anew too: only the engines know which scales belong to which weights, and none may come without the
    others. So is one of a model that has tensors of which they were not told: they may tie these to others.

    Args:
        planned, partial, unsent: those of the request that the plan was made for.
    """
    if not request.partial:
        return planned == request.tensors and not partial
    if not {info.name for info in planned}.union(unsent).issuperset(request.unsent):
        return False
    if any(info.dtype in CODES for info in planned):
        return planned == request.tensors
    known = {info.name: info for info in planned}
    return all(info.name in known and _alike(info, known[info.name]) for info in request.tensors)


def _alike(one: TensorInfo, other: TensorInfo) -> bool:
    return one.shape == other.shape and (one.dtype == other.dtype or {one.dtype, other.dtype} <= FLOATS)


def agree(request: PlanRequest, baked: Mapping[str, Sequence[RankBake]], unused: Unused = ALL_USED) -> Manifest:
    """The manifest that all plans agree on: per tensor the dtype that every rank shares, else the trainer's own. What
    no engine uses is not in it: a tower takes neither time nor shared memory where nobody reads it.

    Raises ShapeMismatch for a tensor that an engine reads only in part, DtypeMismatch for integers that the engines
    hold in different dtypes.
    """
    for engine, ranks in baked.items():
        _all_whole(engine, request, ranks)
    tensors: dict[str, TensorInfo] = {}
    for info in request.tensors:
        if info.name in unused.everywhere:
            continue
        dtypes = {rank.dtypes[info.name] for ranks in baked.values() for rank in ranks if info.name in rank.dtypes}
        if len(dtypes) > 1 and info.dtype in INTEGERS:
            raise DtypeMismatch(
                "the engines hold these integers in different dtypes, and a snapshot can be checked for one only",
                where=info.name,
                expected="one dtype in all engines",
                got=", ".join(sorted(dtypes)),
                remedy="drive these engines by bridges of their own",
                names=(info.name,),
            )
        dtype = dtypes.pop() if len(dtypes) == 1 else info.dtype
        tensors[info.name] = TensorInfo(info.name, dtype, info.shape, info.aliases)
    for name, partner in unused.partners.items():  # compared as they would land
        if name in tensors and partner in tensors:
            held = tensors[name]
            tensors[name] = TensorInfo(held.name, tensors[partner].dtype, held.shape, held.aliases)
    return lay_out(tensors.values())


def _all_whole(engine: str, request: PlanRequest, ranks: Sequence[RankBake]) -> None:
    """Every element of a tensor that is read must be read by some rank: experts and pipeline stages split tensors."""
    partly = [info for info in request.tensors if any(info.name in rank.read for rank in ranks)]
    regions: list[tuple[str, Region]] = []
    for rank in ranks:
        absent = set(rank.unread)
        for info in partly:
            if info.name in rank.read:
                regions.extend((info.name, region) for region in rank.read[info.name])
            elif info.name not in absent:
                regions.append((info.name, dense(info.shape)))
    holes = source_coverage({info.name: math.prod(info.shape) for info in partly}, regions)
    for info in partly:
        if info.name in holes:
            raise ShapeMismatch(
                "the engine reads only a part of this tensor",
                where=f"{info.name} -> {engine}",
                expected="a tensor that the engine's ranks use whole",
                got=f"shape {list(info.shape)}, {holes[info.name]} of {math.prod(info.shape)} elements unused",
                remedy=SAME_MODEL,
                names=(info.name,),
            )


def holds(old: Manifest, new: Manifest) -> bool:
    """Decide whether a version of `old` gives every tensor that `new` writes."""
    return all(spec.name in old.by_name and old.by_name[spec.name].shape == spec.shape for spec in new.tensors)
