"""Find parameters and buffers of an engine that no checkpoint fills: constants of its constructor, scales of a cache
that is not quantised. A push need not bring them, and they are no weights of the module that holds them.

The engine's own loader tells: they are the targets that its own checkpoint does not reach, or, where that is not at
hand, the buffers for which the loader has no name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from bridge.model.manifest import TensorInfo
from bridge.model.regions import RankPlan, dest_coverage
from bridge.model.torch_dtypes import DTYPES
from engine_side.plan.loader_errors import LoaderRaised
from engine_side.plan.targets import collect_targets, live_storages
from engine_side.plan.trace import stand_ins, trace
from engine_side.protocol import RankHost

_WIRE = {dtype: name for name, dtype in DTYPES.items()}


def unloaded(host: RankHost, checkpoint: Path | None) -> frozenset[str]:
    """Find the paths of skeleton targets that nothing fills. Costs a trace of the loader or two; once per host."""
    if checkpoint is not None and (infos := checkpoint_tensors(checkpoint)):
        try:
            found = trace(host, stand_ins(infos))
        except LoaderRaised:
            pass  # the engine's own reader leaves out what its loader would not take
        else:
            reached = {move.target for move in found.moves}.union(found.tainted)
            holes = dest_coverage(RankPlan(found.targets.targets, found.moves, found.fills, {})).holes
            return frozenset(holes.keys() - reached)
    return frozenset(_nameless(host))


def checkpoint_tensors(folder: Path) -> tuple[TensorInfo, ...]:
    """List the tensors of a folder's safetensors that can travel; empty where there are none."""
    try:
        from safetensors import safe_open
    except ImportError:
        return ()
    out: dict[str, TensorInfo] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 safe_open is no mapping
                part = handle.get_slice(name)
                shape = tuple(part.get_shape())
                dtype = (part[:0] if shape else handle.get_tensor(name)).dtype  # no element is read
                if dtype in _WIRE:
                    out[name] = TensorInfo(name, _WIRE[dtype], shape)
    return tuple(out.values())


def _nameless(host: RankHost) -> Iterator[str]:
    """Find buffers that the loader does not take under their own path.

    One of each (class of the module, name) is tried for all.
    """
    skeleton = host.skeleton()
    targets = collect_targets(skeleton, live_storages(host.model))
    kinds: dict[tuple[type, str], list[str]] = {}
    buffers = {target.path for target in targets.targets if target.buffer}
    for place in targets.places:
        if place.target in buffers and place.path == place.target:
            kinds.setdefault((type(skeleton.get_submodule(place.module)), place.name), []).append(place.path)
    for paths in kinds.values():
        path, like = paths[0], targets.tensors[paths[0]]
        try:
            found = trace(host, {path: torch.empty(like.shape, dtype=like.dtype, device="meta")})
        except LoaderRaised:
            yield from paths
        else:
            if path not in {move.target for move in found.moves} | found.tainted.keys():
                yield from paths
