"""Say what is wrong with weights that an engine's loader did not take, in the words of the sender.

Mechanism only: which tensor it was is found in the frames of the exception, whether the loader had already chosen a
destination tells an unknown name from a wrong shape, and the likely name of a missing tensor is read off a sibling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

import torch

from bridge.errors import BridgeError, DtypeMismatch, DuplicateTensor, MissingTensor, ShapeMismatch, UnexpectedTensor
from bridge.model.dtypes import dtype_name
from bridge.model.manifest import TensorInfo
from bridge.model.regions import Coverage, Move, RankPlan, runs_of
from engine_side.protocol import RankHost

if TYPE_CHECKING:
    from engine_side.plan.bake import Trace

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
"""What foreign loader code raises when weights do not fit it."""

MISSING_SHOWN = 8
"""How many missing tensors become an error of their own; `names` of the first lists all."""


class LoaderRaised(Exception):
    """A loader raised while it was traced.

    Attributes:
        tensor: the stand-in that the innermost frames handled, else the one handed out last, else None.
        target: the engine parameter that the loader had chosen for it, with the shape of the view that it was about to
            write, or None when it had not come that far.
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
        for frame in _frames(error.__traceback__):
            held = [t for t in frame.f_locals.values() if isinstance(t, torch.Tensor)]
            sent = [names[key] for t in held if (key := t.untyped_storage()._cdata) in names]
            found = [(paths[key], tuple(t.shape)) for t in held if (key := t.untyped_storage()._cdata) in paths]
            if sent and current not in sent:
                self.tensor = sent[-1]
            self.target = self.target or (found[-1] if found else None)
            if sent:
                break


def _frames(trace: TracebackType | None) -> Iterator[FrameType]:
    """Innermost first."""
    chain: list[FrameType] = []
    while trace is not None:
        chain.append(trace.tb_frame)
        trace = trace.tb_next
    yield from reversed(chain)


def explain_raise(
    host: RankHost,
    raised: LoaderRaised,
    name: str,
    weight: torch.Tensor,
    trace: Callable[[RankHost, Mapping[str, torch.Tensor]], Trace],
) -> BridgeError:
    """The error of our tree for a tensor at which the loader raised.

    The tensor is loaded once more alone, so that what the frames show can only be about it. If the loader had picked a
    parameter, the name is known and the shape is wrong; otherwise the name is unknown.
    """
    if isinstance(raised.error, DtypeMismatch) and raised.error.names:
        return raised.error
    if isinstance(raised.error, (UnexpectedTensor, ShapeMismatch)) and raised.error.names:
        return _with_remedy(raised.error, _fits_otherwise(host, name, weight, trace))
    try:
        trace(host, {name: weight})
        alone = raised
    except LoaderRaised as again:
        alone = again if again.tensor in (name, None) else raised
    said = f"{type(raised.error).__name__}: {raised.error}"
    shape = tuple(weight.shape)
    turned = _fits_otherwise(host, name, weight, trace)
    if alone.target is None and turned is None:
        return UnexpectedTensor(
            "the engine's loader does not know this tensor",
            where=name,
            expected="a name of the checkpoint that this engine runs",
            got=f"{list(shape)} {dtype_name(weight.dtype)}; the loader said {said}",
            remedy="leave it out, or bind the model so that live names become checkpoint names",
            names=(name,),
        )
    where = f"{name} -> {alone.target[0]}" if alone.target else name
    if turned is not None:
        expected = f"{list(turned)}"
    elif alone.target is not None:
        expected = f"what fits {list(alone.target[1])} of the engine's parameter"
    else:
        expected = "the shape that the engine's configuration implies"
    return ShapeMismatch(
        "a tensor's shape does not fit the engine",
        where=where,
        expected=expected,
        got=f"{list(shape)}; the loader said {said}",
        remedy="the transpose was sent" if turned is not None else "trainer and engine must run the same configuration",
        names=(name,),
    )


def _with_remedy(error: BridgeError, turned: tuple[int, ...] | None) -> BridgeError:
    """An engine's error that is of our tree already, with what the sender can do about it."""
    remedy, expected = "trainer and engine must run the same configuration", error.expected
    if isinstance(error, UnexpectedTensor):
        remedy = "leave it out, or bind the model so that live names become checkpoint names"
        expected = expected or "a name of the checkpoint that this engine runs"
    return type(error)(
        error.what,
        where=error.where,
        expected=expected,
        got=error.got,
        remedy="the transpose was sent" if turned is not None else remedy,
        names=error.names,
    )


def together(problems: Sequence[BridgeError]) -> tuple[BridgeError, ...]:
    """The same problems; the first of each class names the tensors of all of its class."""
    names: dict[type[BridgeError], list[str]] = {}
    for problem in problems:
        names.setdefault(type(problem), []).extend(problem.names)
    out: list[BridgeError] = []
    for problem in problems:
        every = tuple(dict.fromkeys((*problem.names, *names.pop(type(problem), ()))))
        more = len(every) - len(problem.names)
        out.append(
            type(problem)(
                f"{problem.what} (and {more} more)"
                if more and not isinstance(problem, MissingTensor)
                else problem.what,
                where=problem.where,
                expected=problem.expected,
                got=problem.got,
                remedy=problem.remedy,
                names=every,
            )
        )
    return tuple(out)


def _fits_otherwise(
    host: RankHost,
    name: str,
    weight: torch.Tensor,
    trace: Callable[[RankHost, Mapping[str, torch.Tensor]], Trace],
) -> tuple[int, ...] | None:
    """The transposed shape, when the loader takes that one whole."""
    shape = tuple(weight.shape)
    if len(shape) < 2 or shape[-1] == shape[-2]:
        return None
    other = (*shape[:-2], shape[-1], shape[-2])
    try:
        found = trace(host, {name: torch.empty(other, dtype=weight.dtype, device="meta")})
    except LoaderRaised:
        return None
    return other if found.moves else None


def broadcasts(moves: Sequence[Move], infos: Mapping[str, TensorInfo]) -> Iterator[ShapeMismatch]:
    """A sent element that was spread over several engine elements by broadcasting: the loader did not look at shapes.
    A tensor without dimensions is a scale for many and may spread."""
    seen: set[str] = set()
    for move in moves:
        spread = any(n > 1 and s == 0 for n, s in zip(move.source.shape, move.source.strides, strict=True))
        info = infos.get(move.tensor)
        if not spread or info is None or not info.shape or move.tensor in seen:
            continue
        seen.add(move.tensor)
        yield ShapeMismatch(
            "a tensor was broadcast into a larger parameter",
            where=f"{move.tensor} -> {move.target}",
            expected=f"a shape that fills {list(move.dest.shape)} element by element",
            got=f"{list(info.shape)}",
            remedy="trainer and engine must run the same configuration",
            names=(move.tensor,),
        )


def uncovered(plan: RankPlan, coverage: Coverage, infos: Sequence[TensorInfo], partial: bool) -> Iterator[BridgeError]:
    """Duplicate and missing writes as errors; in a partial plan what nothing reaches is not missing."""
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
            remedy=_advice(target.buffer),
            names=names + tuple(n for n in every if n not in names),
        )


def _advice(buffer: bool) -> str:
    if buffer:
        return "named_parameters() omits persistent buffers: bind the model (b.bind(model)) so that they travel too"
    return "send it, or pass partial=True when a subset is meant"


def _overlap(plan: RankPlan, coverage: Coverage) -> DuplicateTensor:
    path, count = next(iter(coverage.overlaps.items()))
    names = tuple(dict.fromkeys(m.tensor for m in plan.moves if m.target == path))
    return DuplicateTensor(
        "elements of an engine parameter would be written twice",
        where=f"{', '.join(names[:4])} -> {path}",
        expected="each element written exactly once",
        got=f"{count} elements written more than once; {len(coverage.overlaps)} parameters concerned",
        remedy="send one of the names only: the engine stores both in one place",
        names=names,
    )


def likely_names(plan: RankPlan, path: str, sent: set[str]) -> tuple[str, ...]:
    """Names that would probably fill the holes of a target: what fills the same place of a complete sibling, with the
    segments changed in which the two paths differ. The target's own path when there is no sibling."""
    holes = _hole_spans(plan, path)
    numel = {t.path: t.numel for t in plan.targets}
    mine = path.split(".")
    guesses: dict[str, int] = {}
    for move in plan.moves:
        theirs = move.target.split(".")
        differs = [k for k in range(len(mine)) if k < len(theirs) and mine[k] != theirs[k]]
        if move.target == path or len(theirs) != len(mine) or len(differs) != 1:
            continue
        at, reach = _span(move, numel[move.target])
        if not any(low <= at + 1e-9 and at + reach <= high + 1e-9 for low, high in holes):
            continue
        name = _translate(move.tensor, theirs[differs[0]], mine[differs[0]])
        if name is not None and name not in sent:
            guesses[name] = guesses.get(name, 0) + 1
    return tuple(sorted(guesses, key=lambda name: (-guesses[name], name))[:MISSING_SHOWN]) or (path,)


def _translate(name: str, old: str, new: str) -> str | None:
    segments = name.split(".")
    places = [k for k, segment in enumerate(segments) if segment == old]
    if len(places) != 1:
        return None
    segments[places[0]] = new
    return ".".join(segments)


def _span(move: Move, numel: int) -> tuple[float, float]:
    """Where in its target a move begins, and how much of it, as fractions."""
    return move.dest.offset / max(numel, 1), move.dest.numel / max(numel, 1)


def _hole_spans(plan: RankPlan, path: str) -> list[tuple[float, float]]:
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
