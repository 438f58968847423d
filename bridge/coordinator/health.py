"""Health: weigh the facts of a live run, which the coordinator collects. Pure but for `orphaned_memory`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bridge.errors import BridgeError, Busy
from bridge.model.receipt import CanaryResult
from bridge.protocol.coordinator_messages import EngineInfo
from bridge.protocol.engine_messages import EngineChecked
from bridge.shm.orphans import find_orphans


class Check(msgspec.Struct, frozen=True):
    """One line of a report: what was looked at, what was expected and found, and the remedy. `degraded` is no failure:
    nothing wrong was found, but not everything was watched."""

    name: str
    ok: bool
    expected: str
    got: str
    remedy: str = ""
    degraded: bool = False


class HealthReport(msgspec.Struct, frozen=True):
    """All checks of one examination; versions first, then weights, then outputs."""

    name: str
    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def status(self) -> str:
        """Sum up the checks: "healthy", "degraded" (nothing wrong, but not everything is watched) or "unhealthy"."""
        if not self.healthy:
            return "unhealthy"
        return "degraded" if any(check.degraded for check in self.checks) else "healthy"

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data, ready for JSON."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return {**plain, "healthy": self.healthy, "status": self.status}


@dataclass(frozen=True)
class Examined:
    """One engine's facts, and the findings of its examination.

    Attributes:
        answer: its weights compared with the arena; Busy when it was not examined, another error when it could not
            be; None where there is nothing to compare with.
        canary: its fresh log-probabilities compared with the stored reference, if there is one.
    """

    info: EngineInfo
    answer: EngineChecked | BridgeError | None = None
    canary: CanaryResult | None = None


@dataclass(frozen=True)
class Facts:
    """Facts of a live run.

    Attributes:
        earlier: version that was committed before this daemon started, as long as it has committed none.
        busy: version of the push in flight.
        watched: what the served version leaves unwatched.
    """

    name: str
    engines: Sequence[Examined]
    committed: int | None
    earlier: int | None
    busy: int | None
    watched: tuple[str, ...]
    last_receipt: Mapping[str, Any] | None


def assess(facts: Facts) -> HealthReport:
    """Weigh the facts that the coordinator collected."""
    checks = [
        *_alive(facts),
        *_versions(facts),
        *_receipt(facts),
        *(check for engine in facts.engines for check in _weights(facts, engine)),
        *(check for engine in facts.engines for check in _outputs(engine)),
    ]
    return HealthReport(facts.name, tuple(checks))


def orphaned_memory(shm_dir: Path | None) -> Check:
    """Look for shared memory on this node that a crash left behind. Changes nothing."""
    orphans = list(map(str, find_orphans(shm_dir)))
    got = ", ".join(orphans[:3]) or "none"
    return Check("orphaned shared memory", not orphans, "none", got, "the next start removes them" if orphans else "")


def _alive(facts: Facts) -> Iterator[Check]:
    for info in (engine.info for engine in facts.engines):
        alive = info.state != "LOST"
        got = f"pid {info.pid}, {info.ranks} rank(s)" if alive else info.detail
        yield Check(f"{info.id} alive", alive, "answers", got, "" if alive else "restart it: weighbridge up")


def _versions(facts: Facts) -> Iterator[Check]:
    committed = facts.committed or 0
    for info in (engine.info for engine in facts.engines):
        if info.state == "LOST":
            continue
        right = info.state == "SERVING" and info.serving == committed
        got = f"{info.state}, version {info.serving}" + (f" ({info.detail})" if info.detail else "")
        if right and facts.earlier is not None:
            before = f"version {facts.earlier} was committed before this daemon started"
            yield Check(f"{info.id} version", True, before, got, "push once", degraded=True)
            continue
        yield Check(
            f"{info.id} version", right or facts.busy is not None, f"SERVING, version {committed}", got,
            "" if right else "push a version that verifies",
        )  # fmt: skip


def _receipt(facts: Facts) -> Iterator[Check]:
    last = facts.last_receipt
    for scope in facts.watched:
        yield Check("scope", True, "every tensor of the engine", scope, "push the whole model once", degraded=True)
    if last is None:
        yield Check("last receipt", True, "a verified push", "nothing was pushed yet", "push once", degraded=True)
        return
    what = f"version {last['version']}, verify={last['verify']}, verified={last['verified']}"
    if last["error"] is not None:
        yield Check(
            "last receipt", False, "a verified push", f"{what}: {last['error']}", "mend the cause and push again"
        )
        return
    whole = last["verified"] is True and all(e["canary"] is not None for e in last["engines"])
    missing = "bind the model and push with verify='outputs'" if not whole else ""
    if facts.earlier is not None:
        what, whole, missing = f"{what}; of an earlier daemon", False, "push once"
    verified = last["verified"] is not False
    yield Check("last receipt", verified, "verified weights", what, missing, degraded=not whole)


def _weights(facts: Facts, engine: Examined) -> Iterator[Check]:
    name, answer = engine.info.id, engine.answer
    if isinstance(answer, Busy):
        yield Check(
            f"{name} weights", True, "weights compared with the arena", f"not examined: {answer}",
            "ask again when it has ended", degraded=True,
        )  # fmt: skip
    elif isinstance(answer, BridgeError):
        yield Check(f"{name} weights", False, "weights that can be read back", str(answer), "see its log")
    elif answer is not None:
        for rank, level in ((rank, level) for rank, levels in enumerate(answer.ranks) for level in levels):
            label = f"{name} rank {rank} {level.level}"
            if level.ok:
                got = level.note or f"{level.checked} checked"
                yield Check(label, True, f"version {facts.committed} bit for bit", got)
                continue
            remedy = "something changed it after the sync: push again, or b.rollback()"
            if not level.failures:
                yield Check(label, False, "a level that passes", level.note or "it failed", remedy)
            for failure in level.failures[:20]:
                yield Check(f"{label}: {failure.name}", False, failure.expected, failure.got, remedy)


def _outputs(engine: Examined) -> Iterator[Check]:
    canary, name = engine.canary, f"{engine.info.id} canary"
    if canary is not None:
        got = f"mean {canary.mean_abs:.4f}, max {canary.max_abs:.4f} nats"
        remedy = "the weights' bits are listed above; if they are right, derived state or caches are not"
        limit = f"mean |difference| <= {canary.limit:.4f} nats"
        if canary.noise is not None:
            limit += f", at a noise of {canary.noise:.3f} of the standard deviation by {engine.info.losses}"
        if not canary.conclusive:
            limit, remedy = "a canary that shows something", "pass canary_limit=NATS to judge by a number of your own"
        passed = canary.ok and canary.conclusive
        yield Check(name, canary.ok, limit, got, "" if passed else remedy, degraded=not canary.conclusive)
    elif engine.info.state != "LOST" and not isinstance(engine.answer, Busy):
        missing = "bind the model before the push"
        yield Check(name, True, "a fresh canary", "no stored reference", missing, degraded=True)
