"""What a push has shown: which levels a word asks for, how an engine's reports add up, whether a version is verified.
Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from bridge.errors import BridgeError, EngineQuarantined, PeerLost, ProtocolError
from bridge.model.engine_state import EngineState
from bridge.model.levels import LORA_LEVELS, WEIGHT_LEVELS
from bridge.model.receipt import EngineReport, Verified
from bridge.protocol.engine_messages import EngineChecked


@dataclass
class Verdict:
    """How a push ended. `error` None: committed everywhere. `touched`: some engine had been written to."""

    reports: tuple[EngineReport, ...] = ()
    error: BridgeError | None = None
    touched: bool = False
    phases: dict[str, float] = field(default_factory=dict)
    verified: Verified = False
    notes: tuple[str, ...] = ()


def both(weights: EngineChecked | BridgeError, adapter: EngineChecked | BridgeError) -> EngineChecked | BridgeError:
    """One engine's answer about its weights and its adapter."""
    if isinstance(weights, BridgeError) or isinstance(adapter, BridgeError):
        return weights if isinstance(weights, BridgeError) else adapter
    ranks = tuple((*a, *b) for a, b in zip(weights.ranks, adapter.ranks, strict=True))
    return EngineChecked(ranks, weights.scores)


def merge(before: EngineReport, after: EngineReport) -> EngineReport:
    """The later report's state over the earlier one's findings."""
    if before.id != after.id:
        raise ProtocolError("reports of different engines", expected=before.id, got=after.id)
    extra = {rank.rank: rank.levels for rank in after.ranks}
    ranks = tuple(
        msgspec.structs.replace(rank, levels=(*rank.levels, *extra.get(rank.rank, ()))) for rank in before.ranks
    )
    return EngineReport(
        id=after.id,
        state=after.state,
        serving=after.serving,
        ranks=ranks or after.ranks,
        canary=before.canary or after.canary,
        adapter=after.adapter or before.adapter,
        pause_s=max(before.pause_s, after.pause_s),
        error=after.error or before.error,
    )


def verified(version: int, reports: Iterable[EngineReport]) -> Verified:
    """From what really ran. True: every engine serves the version, and every level of the weights that could run has
    passed on each of its ranks; "partial": some have, or a module was left to the canary; False: nothing was shown."""
    found = [_shown(report, version) for report in reports]
    if not found or not all(found):
        return False
    return True if all(shown is True for shown in found) else "partial"


def unserved(version: int, reports: Iterable[EngineReport]) -> BridgeError | None:
    """What the trainer must hear of a version that was committed: EngineQuarantined or PeerLost for engines that were
    lost before they served it; None when all do."""
    lost = [report for report in reports if report.serving != version]
    if not lost:
        return None
    kind = EngineQuarantined if any(report.state == EngineState.QUARANTINED.value for report in lost) else PeerLost
    return kind(
        f"version {version} is committed, and an engine was lost before it served it",
        where=", ".join(report.id for report in lost),
        expected=f"version {version} served by every engine",
        got="; ".join(f"{report.state}: {report.error or 'no answer'}" for report in lost),
        remedy="the other engines serve it; what was lost serves nothing until a verified push",
    )


def _shown(report: EngineReport, version: int) -> Verified:
    if report.serving != version or not report.ranks:
        return False
    levels = [{level.level: level for level in rank.levels if level.ok} for rank in report.ranks]
    weighed = all(any(rank[name].checked for name in ("read-back", "probe") if name in rank) for rank in levels)
    # without a version before there is nothing to have changed from
    needed = LORA_LEVELS if report.adapter is not None else set(WEIGHT_LEVELS) - {"change"}
    whole = all(set(rank) >= needed for rank in levels)
    alone = any(rank.canary_only for rank in report.ranks)
    if weighed and whole and not alone:
        return True
    return "partial" if report.canary is not None or (weighed and not alone) else False
