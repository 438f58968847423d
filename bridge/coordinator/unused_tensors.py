"""Decide which sent tensors engines may leave unused: a tower that an engine was started without, layers for
speculation, a value head. Pure.

Every rank has shown that all of its parameters are covered. What its loader did with the other names decides nothing;
one of them is allowed if the engine holds a placeholder where it would go, if the bound model's logits were shown not
to depend on it, or if the engine ties it to another tensor, which it must then equal at every push.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bridge.errors import BIND, SAME_MODEL, UnexpectedTensor, some_names
from bridge.model.dtypes import FLOATS
from bridge.model.manifest import TensorInfo
from bridge.protocol.coordinator_messages import Planned, PlanRequest, Unproven
from bridge.protocol.rank_jobs import RankBake
from bridge.shm.arena import DIGEST_NBYTES, Seal

_LEFT_OUT = "only names that the engine's own loader uses"


@dataclass(frozen=True)
class Unused:
    """Names that the engines have no place for.

    Attributes:
        by_engine: engine -> those that it leaves unused.
        partners: those that must equal another tensor -> that tensor.
        proofs: those that are allowed only because the bound model's logits do not depend on them.
        everywhere: those that no engine uses: they do not travel.
    """

    by_engine: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    partners: Mapping[str, str] = field(default_factory=dict)
    proofs: tuple[str, ...] = ()
    everywhere: frozenset[str] = frozenset()


ALL_USED = Unused()


def find_unused(request: PlanRequest, baked: Mapping[str, Sequence[RankBake]]) -> Unused:
    """Sort the names without a place by what allows them. Raises UnexpectedTensor for one that nothing can allow.

    `proofs` may name more than `request.independent`: then the trainer has to show the rest before there is a plan.
    """
    infos = {name: info for info in request.tensors for name in (info.name, *info.aliases)}
    by_engine: dict[str, tuple[str, ...]] = {}
    partners: dict[str, str] = {}
    proofs: dict[str, None] = {}
    for engine, ranks in baked.items():
        _require_no_followers(engine, ranks)
        unread = _in_all([rank.unread for rank in ranks])
        if not unread:
            continue
        if request.partial:
            raise _of_a_subset(engine, unread, request)
        tied = {name: ranks[0].partners[name] for name in _in_all([rank.partners for rank in ranks])}
        tied = {name: partner for name, partner in tied.items() if _alike(infos[name], infos[partner])}
        proven = {*tied, *_in_all([rank.placeholders for rank in ranks])}
        torn = tuple(_parts_of_used_modules(unread, infos, tied))
        if torn:
            what = "the engine has no place for a part of a module that it has"
            raise _refusal(engine, torn, request, what, SAME_MODEL if request.bound else f"{BIND}, or {SAME_MODEL}")
        open_names = [name for name in unread if name not in proven]
        if open_names and not request.bound:
            raise _refusal(engine, tuple(open_names), request, "the engine has no place for these tensors", _BIND)
        doubles = {name for name, partner in tied.items() if infos[name].name == partner}  # one tensor, and it is used
        by_engine[engine] = tuple(name for name in unread if name not in doubles)
        partners.update((name, partner) for name, partner in tied.items() if name not in doubles)
        proofs.update(dict.fromkeys(open_names))
    by_engine = {engine: names for engine, names in by_engine.items() if names}
    everywhere = frozenset(_in_all([by_engine.get(engine, ()) for engine in baked])) - partners.keys()
    return Unused(by_engine, partners, tuple(proofs), everywhere & {info.name for info in request.tensors})


def unproven_of(unused: Unused, request: PlanRequest) -> Unproven | None:
    """Build the answer to a request without the proofs that a plan relies on, the same whoever asks for it; None where
    it has them."""
    sent = {name for info in request.tensors for name in (info.name, *info.aliases)} if unused.proofs else set[str]()
    names = tuple(name for name in unused.proofs if name in sent and name not in request.independent)
    engines = tuple(engine for engine, left in unused.by_engine.items() if not set(names).isdisjoint(left))
    return Unproven(names, engines) if names else None


def require_equal_partners(planned: Planned, seal: Seal) -> None:
    """Raise UnexpectedTensor unless every tensor that an engine ties to another one has its bits in a sealed version.
    Called at every push into engines that tie some; compares digests."""
    width, index = DIGEST_NBYTES, {spec.name: k for k, spec in enumerate(planned.manifest.tensors)}
    digest = {n: seal.digests[width * index[n] : width * (index[n] + 1)] for p in planned.partners.items() for n in p}
    torn = tuple(name for name, partner in planned.partners.items() if digest[name] != digest[partner])
    if torn:
        raise UnexpectedTensor(
            "an engine holds as one tensor what the trainer holds as two different ones",
            where=", ".join(f"{name} and {planned.partners[name]}" for name in torn[:3]),
            expected="equal values",
            got="different digests",
            remedy="tie them in the trainer as well (model.config.tie_word_embeddings = True, model.tie_weights(), "
            "then b.bind(model)), or start the engine from a configuration that does not tie them",
            names=torn,
        )


_BIND = f"{BIND}; what its logits do not depend on may stay unused"


def _alike(one: TensorInfo, other: TensorInfo) -> bool:
    return one.shape == other.shape and (one.dtype == other.dtype or {one.dtype, other.dtype} <= FLOATS)


def _in_all(groups: Sequence[Iterable[str]]) -> tuple[str, ...]:
    """List what is in every group, in the order of the first."""
    others = [frozenset(group) for group in groups[1:]]
    return tuple(name for name in (groups[0] if groups else ()) if all(name in other for other in others))


def _parts_of_used_modules(
    unread: Iterable[str], infos: Mapping[str, TensorInfo], tied: Mapping[str, str]
) -> Iterator[str]:
    """Find names beside which, in the same module, other tensors are used: a bias, a scale. They belong to what is
    computed there, whatever a gradient says of them."""
    absent = set(unread)
    used = {name.rpartition(".")[0] for name in infos if name not in absent}
    yield from (name for name in absent if name.rpartition(".")[0] in used and name not in tied)


def _refusal(engine: str, names: tuple[str, ...], request: PlanRequest, what: str, remedy: str) -> UnexpectedTensor:
    names = tuple(sorted(names))
    return UnexpectedTensor(
        what,
        where=f"{some_names(names)} -> {engine}",
        expected=_LEFT_OUT,
        got=f"{len(names)} unused of {len(request.tensors)} sent",
        remedy=remedy,
        names=names,
    )


def _require_no_followers(engine: str, ranks: Sequence[RankBake]) -> None:
    """Raise UnexpectedTensor where a subset would change a tensor that is none of it: the engine ties what the bound
    model holds apart."""
    found = {name: partner for rank in ranks for name, partner in rank.followers.items()}
    if found:
        raise UnexpectedTensor(
            "an engine holds as one tensor what the trainer holds as two, and only one of them was sent",
            where=f"{', '.join(f'{name} and {partner}' for name, partner in list(found.items())[:3])} -> {engine}",
            expected="both in one push, with equal values",
            got=f"{', '.join(list(found.values())[:3])} alone",
            remedy="push the whole model once (without partial=True), or start the engine from a configuration that "
            "does not tie them",
            names=tuple(found),
        )


def _of_a_subset(engine: str, names: tuple[str, ...], request: PlanRequest) -> UnexpectedTensor:
    what = "the engine has no place for these tensors, and of a subset it cannot be shown that it needs none of them"
    remedy = "push the whole model once (without partial=True); subsets of it may hold what it leaves unused"
    return _refusal(engine, names, request, what, remedy if request.bound else f"{_BIND}; {remedy}")
