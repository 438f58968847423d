"""A quantised weight without its scales is no weight: what belongs together arrives together or not at all.

Which tensors these are is read off the engine's own modules and the trace of its own loader. A module is quantised when
it holds a matrix in a dtype that nobody computes in; `bias` apart (`quant_method.apply(layer, x, bias)` takes it as an
argument of its own), all that hangs on it is needed to read that matrix. What one checkpoint module brings has to reach
all of these parameters, in fused layers too, where several checkpoint modules share each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet

import torch

from bridge.errors import MissingTensor
from engine_side.plan.bake import Baked

COMPUTE = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128})
"""Dtypes in which layers compute."""
INDICES = frozenset({torch.int64, torch.bool})
"""Dtypes of positions, counters and masks, which are no storage of weights."""


def find_incomplete_groups(baked: Baked) -> Iterator[MissingTensor]:
    """One problem per checkpoint module that brings only part of what an engine's quantised module needs of it."""
    landed: dict[str, list[str]] = {}
    for move in baked.plan.moves:
        landed.setdefault(move.target, []).append(move.tensor)
    complete = {t.path for t in baked.plan.targets} - baked.coverage.holes.keys()
    for path, places in baked.targets.of_module().items():
        own = {place.name: place.target for place in places if place.name != "bias"}
        codes = {name for name, target in own.items() if _is_storage(baked.targets.tensors[target])}
        if codes and not complete.issuperset(own.values()):
            yield from _incomplete_groups(path, own, codes, landed)


def _is_storage(tensor: torch.Tensor) -> bool:
    return tensor.dim() >= 2 and tensor.dtype not in COMPUTE | INDICES


def _incomplete_groups(
    path: str, own: Mapping[str, str], codes: AbstractSet[str], landed: Mapping[str, list[str]]
) -> Iterator[MissingTensor]:
    """For each checkpoint module that reaches some of `own` (attribute -> target): what it should have brought too."""
    brought: dict[str, dict[str, str]] = {}
    for attribute, target in own.items():
        for tensor in landed.get(target, ()):
            brought.setdefault(tensor.rpartition(".")[0], {}).setdefault(attribute, tensor)
    for source, found in brought.items():
        needed: dict[str, str] = {}
        for attribute, tensor in found.items():
            stem = _stem(attribute, tensor, codes)
            needed.update({name: name.removeprefix(stem) for name in own if name.startswith(stem)})
        sent = tuple(found.values())
        absent = tuple(f"{source}.{last}" if source else last for name, last in needed.items() if name not in found)
        if absent:
            yield _problem(path, sent, absent)


def _stem(attribute: str, tensor: str, codes: AbstractSet[str]) -> str:
    """What the loader puts in front of a checkpoint's last segment where a module holds several matrices (`w13_` and
    `w2_` of experts): whatever has it belongs to the same one. "" where all of the module belongs together."""
    last = tensor.rpartition(".")[2]
    stem = attribute.removesuffix(last) if attribute.endswith(f"_{last}") else ""
    return stem if any(name.startswith(stem) for name in codes) else ""


def _problem(path: str, sent: tuple[str, ...], absent: tuple[str, ...]) -> MissingTensor:
    return MissingTensor(
        "a quantised weight, its scales and its zero points arrive together or not at all",
        where=f"{', '.join(sent)} -> {path}",
        expected=f"{', '.join(absent)} with it",
        got=f"{', '.join(sent)} alone",
        remedy=f"send {', '.join(absent)} too, or leave {', '.join(sent)} out",
        names=(*sent, *absent),
    )
