"""Trace an engine's own loader: run it on a meta skeleton with meta stand-ins, and record where every element goes.

Nothing here touches a live weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from bridge.errors import OutOfMemory
from bridge.model.manifest import TensorInfo
from bridge.model.regions import Fill, Move, Region, follow
from bridge.model.torch_dtypes import dtype_of
from bridge.tracing.provenance import storage_key
from bridge.tracing.recorder import Recorder
from engine_side.live.inplace import unregistered_tensors
from engine_side.live.storage_layout import is_dense
from engine_side.plan import loader_errors
from engine_side.plan.experiment_errors import experiment_step
from engine_side.plan.targets import Targets, collect_targets, live_storages
from engine_side.protocol import RankHost


@dataclass(frozen=True)
class Trace:
    """The record of one run of a loader.

    Attributes:
        targets: with the non-persistent buffers that the loader has written, such as a weight plus one.
        tainted: targets whose values cannot be followed -> why; these buffers among them.
        beside: path of such a buffer -> the tensors that were copied into it on the way.
    """

    skeleton: nn.Module
    targets: Targets
    moves: tuple[Move, ...]
    fills: tuple[Fill, ...]
    tainted: Mapping[str, str]
    beside: Mapping[str, frozenset[str]] = field(default_factory=dict)


def stand_in(info: TensorInfo) -> torch.Tensor:
    """Make a contiguous meta tensor of the wire dtype and global shape of an announced tensor."""
    return torch.empty(info.shape, dtype=dtype_of(info.dtype), device="meta")


def stand_ins(infos: Sequence[TensorInfo]) -> dict[str, torch.Tensor]:
    """Make the stand-in of each announced tensor, by name."""
    return {info.name: stand_in(info) for info in infos}


def trace(host: RankHost, weights: Mapping[str, torch.Tensor]) -> Trace:
    """Run the loader once on a fresh skeleton. Raises LoaderRaised, which says at which tensor; OutOfMemory.

    What a loader finds wrong with the whole, after the last tensor, is no error: coverage tells what is missing.
    """
    with experiment_step("building a skeleton", type(host.model).__name__):
        skeleton = host.skeleton()
        targets = collect_targets(skeleton, live_storages(host.model))
        buffers = _buffers_beside(skeleton, targets)
    recorder = Recorder(weights, targets.tensors)
    with recorder:
        try:
            with experiment_step("tracing the engine's loader", type(host.model).__name__, memory_only=True):
                host.load_weights(skeleton, recorder.feed(iter(weights.items())))
        except OutOfMemory:
            raise
        except loader_errors.LOADER_ERRORS as error:
            if not recorder.streamed:
                raise loader_errors.LoaderRaised(error, recorder.current, targets.tensors, weights) from error
    beside = dict(_written_beside(recorder, buffers))
    return Trace(
        skeleton,
        targets.with_buffers({path: tensor for path, tensor in buffers.items() if path in beside}),
        tuple(recorder.moves),
        uncovered_fills(recorder),
        {**recorder.tainted, **dict.fromkeys(beside, "a buffer that the loader sets beside a parameter")},
        beside,
    )


def _written_beside(recorder: Recorder, buffers: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, frozenset[str]]]:
    """Find the buffers into which a loader has put anything that came from a sent tensor, with the tensors known."""
    for path, tensor in buffers.items():
        if recorder.derived(tensor):
            log = recorder.storages[storage_key(tensor)].log
            yield path, frozenset(write.name for write in log if write.name is not None)


def _buffers_beside(skeleton: nn.Module, targets: Targets) -> dict[str, torch.Tensor]:
    """Collect the non-persistent buffers of a skeleton that share no storage with a target."""
    held = {storage_key(tensor) for tensor in targets.tensors.values()}
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in skeleton.named_modules()
        for name, tensor in unregistered_tensors(module)
        if name in module._buffers and tensor.is_meta and tensor.numel() and is_dense(tensor)
        if storage_key(tensor) not in held
    }


@dataclass(frozen=True)
class Offered:
    """The answer of a loader to each of some tensors: those of which elements went somewhere, and those at which it
    raised. The others it swallowed."""

    taken: frozenset[str]
    refused: Mapping[str, loader_errors.LoaderRaised]


def offer_each(host: RankHost, weights: Mapping[str, torch.Tensor]) -> Offered:
    """Find out which tensors the loader takes or refuses, however many: on one skeleton, it is called again after each
    that it raises at, with those that it has not taken yet. Raises OutOfMemory."""
    with experiment_step("building a skeleton", type(host.model).__name__):
        skeleton = host.skeleton()
        targets = collect_targets(skeleton, live_storages(host.model))
    recorder = Recorder(weights, targets.tensors)
    refused: dict[str, loader_errors.LoaderRaised] = {}
    left, seen = dict(weights), 0
    with recorder:
        while left:
            recorder.current = None
            try:
                with experiment_step("tracing the engine's loader", type(host.model).__name__, memory_only=True):
                    host.load_weights(skeleton, recorder.feed(iter(list(left.items()))))
                break
            except OutOfMemory:
                raise
            except loader_errors.LOADER_ERRORS as error:
                if recorder.streamed:
                    break
                raised = loader_errors.LoaderRaised(error, recorder.current, targets.tensors, weights)
            finally:
                for move in recorder.moves[seen:]:
                    left.pop(move.tensor, None)
                seen = len(recorder.moves)
            if raised.tensor is None or left.pop(raised.tensor, None) is None:
                break  # it fails for a reason that no tensor explains: the next trace says so
            refused[raised.tensor] = raised
    return Offered(frozenset(move.tensor for move in recorder.moves), refused)


def uncovered_fills(recorder: Recorder) -> tuple[Fill, ...]:
    """Subtract from the fills what moves wrote over: clearing a parameter before copying into it is no double write."""
    over: dict[str, list[Region]] = {}
    for move in recorder.moves:
        over.setdefault(move.target, []).append(move.dest)
    out: list[Fill] = []
    for fill in recorder.fills:
        rest = [fill.dest]
        for dest in over.get(fill.target, ()):
            split = [(region, follow(region, region, dest, dest)) for region in rest]
            rest = [out for region, hit in split for out in ([region] if hit is None else [o for o, _ in hit.outside])]
        out.extend(Fill(fill.target, region, fill.value) for region in rest)
    return tuple(out)
