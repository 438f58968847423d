"""Turn the refusal of an engine's loader into an error that names the sender's tensor.

No tables of names: the tensor is found in the frames of the exception; a destination that the loader had already chosen
tells a wrong shape from an unknown name; the likely name of a missing tensor is derived from a complete sibling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from traceback import walk_tb
from typing import TYPE_CHECKING

import torch

from bridge.errors import (
    BIND,
    GATHER,
    SAME_MODEL,
    BridgeError,
    DtypeMismatch,
    DuplicateTensor,
    MissingTensor,
    ShapeMismatch,
    UnexpectedTensor,
)
from bridge.model.dtypes import FLOATS, INTEGERS, NUMBERS, Landing, landing
from bridge.model.manifest import TensorInfo
from bridge.model.regions import Coverage, Move, RankPlan, TargetTensor, runs_of
from bridge.model.torch_dtypes import dtype_name
from engine_side.protocol import RankHost

if TYPE_CHECKING:
    from engine_side.plan.trace import Trace

LOADER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BridgeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Exceptions that foreign loader code raises when weights do not fit it."""

MISFITS_EXPLAINED = 32
"""Number of tensors of a wrong shape or dtype, each of which takes a few traces to explain, before all are reported."""

UNKNOWN_REMEDY = f"{BIND}, or {SAME_MODEL}"

MISSING_SHOWN = 8
"""Number of missing tensors that become an error of their own; `names` of the first lists all."""


class LoaderRaised(Exception):
    """A loader raised while it was traced.

    Attributes:
        tensor: name of the stand-in in the innermost frame that holds one, else of the one handed out last, else None.
        target: path of the engine parameter that the loader had chosen for it, with the shape of the view that it was
            about to write; None when it had not come that far.
    """

    def __init__(
        self,
        error: BaseException,
        current: str | None,
        targets: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__(str(error))
        self.error = error
        names = {w.untyped_storage()._cdata: name for name, w in weights.items()}
        paths = {t.untyped_storage()._cdata: path for path, t in targets.items()}
        self.tensor = current
        self.target: tuple[str, tuple[int, ...]] | None = None
        for frame in reversed([frame for frame, _ in walk_tb(error.__traceback__)]):
            held = [t for t in frame.f_locals.values() if isinstance(t, torch.Tensor)]
            sent = [names[key] for t in held if (key := t.untyped_storage()._cdata) in names]
            found = [(paths[key], tuple(t.shape)) for t in held if (key := t.untyped_storage()._cdata) in paths]
            if sent and current not in sent:
                self.tensor = sent[-1]
            self.target = self.target or (found[-1] if found else None)
            if sent:
                break


Tracer = Callable[[RankHost, Mapping[str, torch.Tensor]], "Trace"]


def explain_refusals(
    host: RankHost,
    refused: Mapping[str, LoaderRaised],
    weights: Mapping[str, torch.Tensor],
    used: AbstractSet[str],
    trace: Tracer,
) -> dict[str, BridgeError]:
    """Make the error of each tensor at which the loader raised. An unknown name stands for its whole subtree, of which
    nothing is used: a vision tower has hundreds. Raises the first error when more than MISFITS_EXPLAINED do not fit.

    Args:
        weights: stand-ins of all that were announced.
        used: names of tensors that the loader takes.
    """
    known = {prefix for name in used for prefix in _prefixes(name)} if refused else set[str]()
    unknown: set[str] = set()
    errors: dict[str, BridgeError] = {}
    misfits: dict[str, BridgeError] = {}
    for name, raised in refused.items():
        subtree = next((prefix for prefix in _prefixes(name) if prefix not in known), name)
        if (
            subtree in unknown
            and raised.target is None
            and not isinstance(raised.error, (DtypeMismatch, ShapeMismatch))
        ):
            errors[name] = unknown_name(name, weights[name], raised.error)
            continue
        errors[name] = error = explain_raise(host, raised, name, weights[name], trace)
        if isinstance(error, UnexpectedTensor):
            unknown.add(subtree)
            continue
        misfits[name] = error
        if len(misfits) > MISFITS_EXPLAINED:
            first = next(iter(misfits.values()))
            raise first.amended(
                what=f"{first.what} (and at least {MISFITS_EXPLAINED} more tensors do not fit)",
                remedy=GATHER if _all_empty(misfits, weights) else SAME_MODEL,
                names=tuple(misfits),
            )
    return errors


def _all_empty(misfits: Mapping[str, BridgeError], weights: Mapping[str, torch.Tensor]) -> bool:
    """True when all tensors that do not fit have a place and are empty: a sharded trainer leaves such behind."""
    return all(isinstance(error, ShapeMismatch) and not weights[name].numel() for name, error in misfits.items())


def _prefixes(name: str) -> Iterator[str]:
    """Yield the paths of the modules around a tensor, widest first."""
    end = name.find(".")
    while end >= 0:
        yield name[:end]
        end = name.find(".", end + 1)


def unknown_name(name: str, weight: torch.Tensor, error: BaseException) -> UnexpectedTensor:
    """Make the error for a tensor that the loader does not know, whatever it raised."""
    if isinstance(error, UnexpectedTensor) and error.names:
        expected = error.expected or "a name of the checkpoint that this engine runs"
        return error.amended(expected=expected, remedy=UNKNOWN_REMEDY)
    return UnexpectedTensor(
        "the engine's loader does not know this tensor",
        where=name,
        expected="a name of the checkpoint that this engine runs",
        got=f"{list(weight.shape)} {dtype_name(weight.dtype)}; the loader said {type(error).__name__}: {error}",
        remedy=UNKNOWN_REMEDY,
        names=(name,),
    )


def explain_raise(
    host: RankHost,
    raised: LoaderRaised,
    name: str,
    weight: torch.Tensor,
    trace: Tracer,
) -> BridgeError:
    """Make the error of our tree for a tensor at which the loader raised.

    The tensor is loaded once more alone, so that the frames can only be about it. If the loader had picked a parameter,
    the name is known and the shape is wrong; otherwise the name is unknown.
    """
    other = SAME_MODEL if weight.numel() else GATHER
    turn = "push its transpose: tensor.mT"
    error = raised.error
    if isinstance(error, DtypeMismatch) and error.names:
        return error
    turned = _transposed_that_fits(host, name, weight, trace)
    if isinstance(error, UnexpectedTensor) and error.names and turned is None:
        return unknown_name(name, weight, error)
    if isinstance(error, (UnexpectedTensor, ShapeMismatch)) and error.names:
        return error.amended(remedy=other if turned is None else turn)
    try:
        trace(host, {name: weight})
        alone = raised
    except LoaderRaised as again:
        alone = again if again.tensor in (name, None) else raised
    said = f"{type(error).__name__}: {error}".removesuffix(": ")
    shape = tuple(weight.shape)
    if alone.target is None and turned is None:
        return unknown_name(name, weight, error)
    where = f"{name} -> {alone.target[0]}" if alone.target else name
    if turned is not None:
        expected = f"{list(turned)}"
    elif alone.target is not None:
        expected = f"a shape that fits {list(alone.target[1])} of the engine's parameter"
    else:
        expected = "the shape that the engine's configuration implies"
    return ShapeMismatch(
        "a tensor's shape does not fit the engine",
        where=where,
        expected=expected,
        got=f"{list(shape)}; the loader said {said}",
        remedy=turn if turned is not None else other,
        names=(name,),
    )


def merge_names(problems: Sequence[BridgeError]) -> tuple[BridgeError, ...]:
    """Let the first problem of each class name the tensors of all of its class."""
    names: dict[type[BridgeError], list[str]] = {}
    for problem in problems:
        names.setdefault(type(problem), []).extend(problem.names)
    out: list[BridgeError] = []
    for problem in problems:
        every = tuple(dict.fromkeys((*problem.names, *names.pop(type(problem), ()))))
        more = len(every) - len(problem.names)
        what = problem.what
        if more and not isinstance(problem, MissingTensor):
            what += f" (and {more} more)"
        out.append(problem.amended(what=what, names=every))
    return tuple(out)


def _transposed_that_fits(
    host: RankHost,
    name: str,
    weight: torch.Tensor,
    trace: Tracer,
) -> tuple[int, ...] | None:
    """The transposed shape of a tensor, when the loader takes that one whole."""
    shape = tuple(weight.shape)
    if len(shape) < 2 or shape[-1] == shape[-2]:
        return None
    other = (*shape[:-2], shape[-1], shape[-2])
    try:
        found = trace(host, {name: torch.empty(other, dtype=weight.dtype, device="meta")})
    except LoaderRaised:
        return None
    return other if found.moves else None


def broadcast_errors(moves: Sequence[Move], infos: Sequence[TensorInfo]) -> Iterator[ShapeMismatch]:
    """Find sent elements that were spread over several engine elements by broadcasting: the loader did not look at
    shapes. A tensor without dimensions is a scale for many and may spread."""
    shapes = {info.name: info.shape for info in infos if info.shape}
    for move in moves:
        spread = any(n > 1 and s == 0 for n, s in zip(move.source.shape, move.source.strides, strict=True))
        if not spread or move.tensor not in shapes:
            continue
        yield ShapeMismatch(
            "a tensor was broadcast into a larger parameter",
            where=f"{move.tensor} -> {move.target}",
            expected=f"a shape that fills {list(move.dest.shape)} element by element",
            got=f"{list(shapes.pop(move.tensor))}",
            remedy=SAME_MODEL,
            names=(move.tensor,),
        )


def dtype_errors(
    plan: RankPlan, computed: Mapping[str, AbstractSet[str]], infos: Sequence[TensorInfo]
) -> Iterator[DtypeMismatch]:
    """Find tensors whose dtype says that they are not what the engine's tensor holds, one error per tensor.

    Args:
        computed: target -> the sent tensors from which the loader computes it, by itself.
    """
    sent = {info.name: info.dtype for info in infos}
    known = {target.path: target for target in plan.targets}
    reached: dict[str, dict[str, TargetTensor]] = {}
    for move in plan.moves:
        target = known[move.target]
        reached.setdefault(move.tensor, {}).setdefault(target.dtype, target)
    for path, names in computed.items():
        # a loader that is given codes and scales may make values of them, and codes of values; of codes alone it cannot
        if path in known and known[path].dtype in FLOATS and not NUMBERS & {sent[name] for name in names}:
            for name in names:
                reached.setdefault(name, {}).setdefault(known[path].dtype, known[path])
    for name, targets in reached.items():
        # one snapshot serves all places of a tensor: it can check that integers survive in one dtype only
        several = len(targets) > 1 and sent[name] in INTEGERS
        for into, target in targets.items():
            found = landing(sent[name], into, buffer=target.buffer)
            if several or found not in (Landing.CARRIED, Landing.CONVERTED):
                yield _dtype_error(name, sent[name], target, found)
                break


def _dtype_error(name: str, sent: str, target: TargetTensor, found: Landing) -> DtypeMismatch:
    if found is Landing.DEQUANTISED:
        what = "codes of a quantised weight are not its values"
        remedy = f"push the values (codes times scales) as {target.dtype} without the scales, or start the engine "
        remedy += "with weights that are quantised in this way"
    elif found is Landing.QUANTISED:
        what = "values cannot be stored as codes: only the engine's own quantiser knows them"
        remedy = f"push the weight as {target.dtype} together with its scales, or its values alone (leave its scales "
        remedy += "out) to an engine that was started from a quantised checkpoint in a folder, or start the engine "
        remedy += "without quantisation"
    else:
        what = "a tensor of this dtype is not what the engine's tensor holds"
        remedy = f"check which tensor belongs to this name, or {SAME_MODEL}"
    return DtypeMismatch(
        what, where=f"{name} -> {target.path}", expected=target.dtype, got=sent, remedy=remedy, names=(name,)
    )


def coverage_errors(
    plan: RankPlan, coverage: Coverage, infos: Sequence[TensorInfo], partial: bool
) -> Iterator[BridgeError]:
    """Report duplicate and missing writes; in a partial plan, elements that nothing reaches are not missing."""
    if coverage.overlaps:
        yield _overlap(plan, coverage)
    if partial or not coverage.holes:
        return
    sent = {i.name for i in infos} | {alias for i in infos for alias in i.aliases}
    likely = {path: likely_names(plan, path, sent) for path in coverage.holes}
    every = tuple(name for path in coverage.holes for name in likely[path])
    targets = {t.path: t for t in plan.targets}
    for path, missing in list(coverage.holes.items())[:MISSING_SHOWN]:
        target = targets[path]
        names = likely[path]
        yield MissingTensor(
            "the engine needs a tensor that was not sent",
            where=f"{', '.join(names)} -> {path}",
            expected=f"all {target.numel} elements of {path} {list(target.shape)} {target.dtype} written",
            got=f"{missing} elements that no sent tensor reaches; {len(coverage.holes)} parameters are incomplete",
            remedy="named_parameters() omits persistent buffers: bind the model (b.bind(model)) so that they travel too"
            if target.buffer
            else "send it, or pass partial=True when a subset is meant",
            names=names + tuple(n for n in every if n not in names),
        )


def _overlap(plan: RankPlan, coverage: Coverage) -> DuplicateTensor:
    path, count = next(iter(coverage.overlaps.items()))
    names = tuple(dict.fromkeys(m.tensor for m in plan.moves if m.target == path))
    return DuplicateTensor(
        "elements of an engine parameter would be written twice",
        where=f"{', '.join(names[:4])} -> {path}",
        expected="each element written exactly once",
        got=f"{count} elements written more than once; {len(coverage.overlaps)} parameters concerned",
        remedy="the engine stores them in one place: tie them in the trainer too, so that they are one tensor (then "
        f"b.bind(model)); push a fused tensor or its parts, not both; or {SAME_MODEL}",
        names=names,
    )


def likely_names(plan: RankPlan, path: str, sent: set[str]) -> tuple[str, ...]:
    """Guess names that would fill the holes of a target: the names that fill the same place of a complete sibling, with
    the segment changed in which the two paths differ. The target's own path when there is no sibling."""
    holes = _hole_spans(plan, path)
    numel = {t.path: t.numel for t in plan.targets}
    mine = path.split(".")
    guesses: dict[str, int] = {}
    for move in plan.moves:
        theirs = move.target.split(".")
        differs = [k for k in range(len(mine)) if k < len(theirs) and mine[k] != theirs[k]]
        if move.target == path or len(theirs) != len(mine) or len(differs) != 1:
            continue
        size = max(numel[move.target], 1)
        at, end = move.dest.offset / size, (move.dest.offset + move.dest.numel) / size
        segments, old = move.tensor.split("."), theirs[differs[0]]
        fits = any(low <= at + 1e-9 and end <= high + 1e-9 for low, high in holes)
        if not fits or segments.count(old) != 1:
            continue
        name = ".".join(mine[differs[0]] if segment == old else segment for segment in segments)
        if name not in sent:
            guesses[name] = guesses.get(name, 0) + 1
    return tuple(sorted(guesses, key=lambda name: (-guesses[name], name))[:MISSING_SHOWN]) or (path,)


def _hole_spans(plan: RankPlan, path: str) -> list[tuple[float, float]]:
    """List the stretches of a target that nothing writes, as fractions of it."""
    numel = next(t.numel for t in plan.targets if t.path == path)
    dests = [m.dest for m in plan.moves if m.target == path] + [f.dest for f in plan.fills if f.target == path]
    runs = sorted((int(a), int(b)) for dest in dests for a, b in runs_of(dest))
    spans: list[tuple[float, float]] = []
    at = 0
    for start, end in [*runs, (numel, numel)]:
        if start > at:
            spans.append((at / numel, start / numel))
        at = max(at, end)
    return spans
