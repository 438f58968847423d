"""Find out, once a push is refused, what its error should say: which shape the engine's loader takes for a name, which
tensors it takes only together, which ones a packed module lacks.

No table of names: candidates come from the checkpoint that the engine was started from and from the sizes that its
modules hold, and the engine's own loader confirms them. Each trial is one trace on a fresh skeleton; it writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

import msgspec

from bridge.errors import BridgeError, MissingTensor, ShapeMismatch
from bridge.model.manifest import TensorInfo
from bridge.model.regions import source_coverage
from engine_side.plan.bake import Baked
from engine_side.plan.clusters import Role
from engine_side.plan.loader_errors import LoaderRaised
from engine_side.plan.quant_groups import find_incomplete_groups
from engine_side.plan.strategies import ModuleStrategy, StrategyTable
from engine_side.plan.trace import Trace, stand_in, stand_ins, trace
from engine_side.plan.unfilled import checkpoint_tensors
from engine_side.protocol import KnowsCheckpoint, RankHost

MAX_TRIALS = 48
"""Number of shapes that are tried for one tensor, and of tensors that may have to come with one."""
SHOWN = 8
"""Number of tensors that a message spells out."""


def explained_problems(host: RankHost, baked: Baked, kept: AbstractSet[str]) -> Iterator[BridgeError]:
    """List the problems of a plan with what was found out about them, the one to raise first.

    A tensor that does not fit explains what is missing; an incomplete group says more about it than a hole does.

    Args:
        kept: tensors that the engine keeps, and nobody needs to send.
    """
    yield from with_accepted_shape(host, baked, [p for p in baked.problems if not isinstance(p, MissingTensor)])
    yield from find_incomplete_groups(baked, kept)
    yield from waiting_tensors(host, baked)
    yield from (problem for problem in baked.problems if isinstance(problem, MissingTensor))


# ---- shapes ----------------------------------------------------------------------------------------------------------


def with_accepted_shape(host: RankHost, baked: Baked, problems: Sequence[BridgeError]) -> Iterator[BridgeError]:
    """Quote in the first problem, which is the one that is raised, the shape that the loader takes: what a parameter
    shows may be padded."""
    sent = {info.name: info for info in baked.infos}
    for place, problem in enumerate(problems):
        named = place == 0 and isinstance(problem, ShapeMismatch) and problem.names
        info = sent.get(problem.names[0]) if named else None
        shape = None if info is None else _accepted_shape(host, baked, info)
        yield problem if shape is None else problem.amended(expected=f"{list(shape)}, which the engine's loader takes")


def _accepted_shape(host: RankHost, baked: Baked, info: TensorInfo) -> tuple[int, ...] | None:
    """Find the shape of which the loader takes every element under this name; the largest of several."""
    known = next((other.shape for other in _checkpoint(host) if other.name == info.name), None)
    if known is not None and _takes_whole(host, info, known):
        return known
    sizes = _sizes_of_incomplete_modules(baked)
    others = [(*info.shape[:k], n, *info.shape[k + 1 :]) for k in range(len(info.shape)) for n in sizes]
    taken = [shape for shape in others[:MAX_TRIALS] if shape != info.shape and _takes_whole(host, info, shape)]
    return max(taken, key=math.prod, default=None)


def _takes_whole(host: RankHost, info: TensorInfo, shape: tuple[int, ...]) -> bool:
    try:
        found = trace(host, {info.name: stand_in(msgspec.structs.replace(info, shape=shape))})
    except LoaderRaised:
        return False
    read = [(move.tensor, move.source) for move in found.moves]
    return bool(read) and not source_coverage({info.name: math.prod(shape)}, read)


def _sizes_of_incomplete_modules(baked: Baked) -> list[int]:
    """List the sizes that modules with an unfilled parameter hold: there goes a tensor that was refused."""
    modules = dict.fromkeys(place.module for place in baked.targets.places if place.target in baked.coverage.holes)
    held = (value for path in modules for value in vars(baked.skeleton.get_submodule(path)).values())
    return list(dict.fromkeys(value for value in held if type(value) is int and value > 1))


# ---- tensors that come together --------------------------------------------------------------------------------------


def waiting_tensors(host: RankHost, baked: Baked) -> Iterator[MissingTensor]:
    """Report the tensors of a partial push that the loader keeps back until others have come."""
    if not baked.partial or not baked.unread or (feeders := Feeders.of(host, baked)) is None:
        return
    for name in baked.unread:
        reached = feeders.targets_of(name)
        others = _fewest(host, baked.infos, name, feeders.unsent(reached))
        if others:
            yield MissingTensor(
                "the engine's loader keeps this tensor back until the others of its layer have come",
                where=f"{name} -> {', '.join(reached)}",
                expected=f"{listed(others)} in the same push",
                got=f"{name} without {'it' if len(others) == 1 else 'them'}",
                remedy=f"push {listed(others)} together with {name}, or all of model.named_parameters()",
                names=(name, *others),
            )


def split_packed_modules(
    host: RankHost,
    baked: Baked,
    decided: StrategyTable,
    parts: Callable[[ModuleStrategy], Sequence[tuple[str, str, Role]]],
    sendable: Callable[[Sequence[str]], tuple[str, ...]],
) -> Iterator[MissingTensor]:
    """Report the packed modules that a partial push splits: they can only be rebuilt from all of their tensors.

    Args:
        parts: lists (attribute, target of the plan, form) of a module's canonical tensors.
        sendable: leaves out, of names of the engine's checkpoint, what a trainer has not.
    """
    whole = {target.path for target in baked.plan.targets} - baked.coverage.holes.keys()
    split = [
        (choice, target)
        for choice in decided.choices.values()
        for name, target, _ in parts(choice)
        if not (choice.direct or choice.stored[name].identity or target in whole)
    ]
    feeders = Feeders.of(host, baked) if split else None
    for choice, target in split:
        unsent = [] if feeders is None else feeders.unsent([target for _, target, _ in parts(choice)])
        absent = sendable([info.name for info in unsent])
        yield MissingTensor(
            "a module whose storage is packed needs all of its tensors",
            where=f"{target} -> {choice.path} ({choice.cls})",
            expected="every tensor that feeds this module, or none",
            got=f"strategy {choice.strategy.value}: {choice.reason}",
            remedy=f"push {listed(absent) or 'the other tensors of this layer'} too, or all of "
            "model.named_parameters()",
            names=absent or (target,),
        )


def _fewest(host: RankHost, sent: Sequence[TensorInfo], name: str, candidates: Sequence[TensorInfo]) -> tuple[str, ...]:
    """Find one other tensor that is enough for the tensor to be taken; all candidates where none is."""
    for other in candidates[:MAX_TRIALS]:
        try:
            found = trace(host, stand_ins((*sent, other)))
        except LoaderRaised:
            continue
        if any(move.tensor == name for move in found.moves):
            return (other.name,)
    return tuple(info.name for info in candidates)


class Feeders:
    """Tells which tensors of the engine's own checkpoint feed which of its parameters, as a complete load shows."""

    def __init__(self, baked: Baked, known: Mapping[str, TensorInfo], whole: Trace) -> None:
        self._sent = {info.name for info in baked.infos}
        self._known = known
        self._moves = whole.moves

    @classmethod
    def of(cls, host: RankHost, baked: Baked) -> Feeders | None:
        """Trace the tensors that were sent with all others of the checkpoint; None where that is not at hand."""
        sent = {info.name for info in baked.infos}
        known = {info.name: info for info in _checkpoint(host) if info.name not in sent}
        try:
            whole = trace(host, stand_ins((*baked.infos, *known.values()))) if known else None
        except LoaderRaised:
            return None
        return None if whole is None else cls(baked, known, whole)

    def targets_of(self, name: str) -> tuple[str, ...]:
        """List the parameters that a tensor reaches when nothing is missing."""
        return tuple(dict.fromkeys(move.target for move in self._moves if move.tensor == name))

    def unsent(self, targets: Iterable[str]) -> list[TensorInfo]:
        """List the tensors that feed these parameters and did not come."""
        wanted = set(targets)
        names = dict.fromkeys(m.tensor for m in self._moves if m.target in wanted and m.tensor not in self._sent)
        return [self._known[name] for name in names if name in self._known]


def listed(names: Sequence[str]) -> str:
    """Join names for a message, which shows a few; `names` of the error has all."""
    more = f" and {len(names) - SHOWN} more (the error's names)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _checkpoint(host: RankHost) -> tuple[TensorInfo, ...]:
    """List the tensors of the checkpoint that the engine was started from; none where it is not at hand."""
    folder = host.checkpoint if isinstance(host, KnowsCheckpoint) else None
    return () if folder is None else checkpoint_tensors(folder)
