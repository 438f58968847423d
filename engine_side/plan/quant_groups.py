"""Find quantised weights that were sent without their scales: a group of tensors arrives whole or not at all.

The groups are read off the engine's own modules and the trace of its own loader. A module is quantised when it holds a
matrix in a dtype in which no layer computes; its other tensors are needed to read that matrix, except `bias`, which
`quant_method.apply(layer, x, bias)` takes as an argument of its own. The tensors of one checkpoint module have to reach
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


def find_incomplete_groups(baked: Baked, kept: AbstractSet[str] = frozenset()) -> Iterator[MissingTensor]:
    """Report each checkpoint module of which only part of the tensors was sent that a quantised module needs.

    Args:
        kept: tensors that the engine keeps, and nobody needs to send.
    """
    landed: dict[str, list[str]] = {}
    for move in baked.plan.moves:
        landed.setdefault(move.target, []).append(move.tensor)
    held = {target for target, tensors in landed.items() if all(tensor in kept for tensor in tensors)}
    complete = {t.path for t in baked.plan.targets} - baked.coverage.holes.keys()
    for path, places in baked.targets.of_module().items():
        own = {place.name: place.target for place in places if place.name != "bias" and place.target not in held}
        tensors = {name: baked.targets.tensors[target] for name, target in own.items()}
        codes = {n for n, tensor in tensors.items() if tensor.dim() >= 2 and tensor.dtype not in COMPUTE | INDICES}
        if codes and not complete.issuperset(own.values()):
            yield from _incomplete_groups(path, own, codes, landed)


def _incomplete_groups(
    path: str, own: Mapping[str, str], codes: AbstractSet[str], landed: Mapping[str, list[str]]
) -> Iterator[MissingTensor]:
    """Report the missing tensors of each checkpoint module that reaches some of `own` (attribute -> target)."""
    brought: dict[str, dict[str, str]] = {}
    for attribute, target in own.items():
        for tensor in landed.get(target, ()):
            brought.setdefault(tensor.rpartition(".")[0], {}).setdefault(attribute, tensor)
    for source, found in brought.items():
        needed: dict[str, str] = {}
        for attribute, tensor in found.items():
            # Where a module holds several matrices, the loader puts a stem in front of a checkpoint's last segment
            # (`w13_` and `w2_` of experts): attributes with one stem belong together. Without, all of them do.
            last = tensor.rpartition(".")[2]
            stem = attribute.removesuffix(last) if attribute.endswith(f"_{last}") else ""
            if not any(name.startswith(stem) for name in codes):
                stem = ""
            needed.update({name: name.removeprefix(stem) for name in own if name.startswith(stem)})
        sent = tuple(found.values())
        absent = tuple(f"{source}.{last}" if source else last for name, last in needed.items() if name not in found)
        if absent:
            yield MissingTensor(
                "a quantised weight, its scales and its zero points arrive together or not at all",
                where=f"{', '.join(sent)} -> {path}",
                expected=f"{', '.join(absent)} with it",
                got=f"{', '.join(sent)} alone",
                remedy=f"send {', '.join(absent)} too, or leave {', '.join(sent)} out",
                names=(*sent, *absent),
            )
