"""Health: weigh the facts of a live run. Pure: the coordinator collects the facts, the command line prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

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


def local_facts(shm_dir: Path | None = None) -> dict[str, Any]:
    """Collect what only this node can see: shared memory that a crash left behind. Changes nothing."""
    return {"orphans": list(map(str, find_orphans(shm_dir)))}


def assess(facts: Mapping[str, Any], local: Mapping[str, Any]) -> HealthReport:
    """Weigh the facts of the coordinator and of this node."""
    engines = facts["engines"]
    checks = [
        *_alive(engines),
        *_versions(facts, engines),
        *_receipt(facts),
        *(check for engine in engines for check in _weights(facts, engine)),
        *(check for engine in engines for check in _outputs(engine)),
        _orphans(local),
    ]
    return HealthReport(facts["name"], tuple(checks))


def assess_server(url: str, checks: Iterable[Check], local: Mapping[str, Any]) -> HealthReport:
    """Build the report about a server that no bridge has to drive: its driver's checks, and what this node sees."""
    return HealthReport(url, (*checks, _orphans(local)))


def _alive(engines: list[dict[str, Any]]) -> Iterator[Check]:
    for engine in engines:
        alive = engine["state"] != "LOST"
        got = f"pid {engine['pid']}, {engine['ranks']} rank(s)" if alive else engine["detail"]
        yield Check(f"{engine['id']} alive", alive, "answers", got, "" if alive else "restart it: weighbridge up")


def _versions(facts: Mapping[str, Any], engines: list[dict[str, Any]]) -> Iterator[Check]:
    committed = facts["committed"]
    for engine in engines:
        if engine["state"] == "LOST":
            continue
        right = engine["state"] == "SERVING" and engine["serving"] == (committed if committed is not None else 0)
        got = f"{engine['state']}, version {engine['serving']}"
        if engine["detail"]:
            got += f" ({engine['detail']})"
        if right and facts["earlier"] is not None:
            before = f"version {facts['earlier']} was committed before this daemon started"
            yield Check(f"{engine['id']} version", True, before, got, "push once", degraded=True)
            continue
        yield Check(
            f"{engine['id']} version", right or facts["busy"] is not None, f"SERVING, version {committed or 0}", got,
            "" if right else "push a version that verifies",
        )  # fmt: skip


def _receipt(facts: Mapping[str, Any]) -> Iterator[Check]:
    last = facts["last_receipt"]
    for scope in facts["watched"]:
        yield Check("scope", True, "every tensor of the engine", scope, "push the whole model once", degraded=True)
    if last is None:
        yield Check("last receipt", True, "a verified push", "nothing was pushed yet", "push once", degraded=True)
        return
    what = f"version {last['version']}, verify={last['verify']}, verified={last['verified']}"
    failed = last["error"] is not None
    if failed:
        yield Check(
            "last receipt", False, "a verified push", f"{what}: {last['error']}", "mend the cause and push again"
        )
        return
    whole = last["verified"] is True and all(e["canary"] is not None for e in last["engines"])
    missing = "bind the model and push with verify='outputs'" if not whole else ""
    if facts["earlier"] is not None:
        what, whole, missing = f"{what}; of an earlier daemon", False, "push once"
    verified = last["verified"] is not False
    yield Check("last receipt", verified, "verified weights", what, missing, degraded=not whole)


def _weights(facts: Mapping[str, Any], engine: Mapping[str, Any]) -> Iterator[Check]:
    if "not_examined" in engine:
        yield Check(
            f"{engine['id']} weights", True, "weights compared with the arena",
            f"not examined: {engine['not_examined']}", "ask again when it has ended", degraded=True,
        )  # fmt: skip
    if "error" in engine:
        yield Check(f"{engine['id']} weights", False, "weights that can be read back", engine["error"], "see its log")
    for level in engine.get("levels", ()):
        name = f"{engine['id']} rank {level['rank']} {level['level']}"
        if level["ok"]:
            got = level["note"] or f"{level['checked']} checked"
            yield Check(name, True, f"version {facts['committed']} bit for bit", got)
            continue
        for tensor, expected, got in level["failures"][:20]:
            remedy = "something changed it after the sync: push again, or b.rollback()"
            yield Check(f"{name}: {tensor}", False, expected, got, remedy)


def _outputs(engine: Mapping[str, Any]) -> Iterator[Check]:
    canary = engine.get("canary")
    name = f"{engine['id']} canary"
    if canary is None:
        if engine["state"] != "LOST" and "not_examined" not in engine:
            yield Check(
                name, True, "a fresh canary", "no stored reference", "bind the model before the push", degraded=True
            )
        return
    ok = canary["mean_abs"] <= canary["limit"]
    got = f"mean {canary['mean_abs']:.4f}, max {canary['max_abs']:.4f} nats"
    remedy = "" if ok else "the weights' bits are listed above; if they are right, derived state or caches are not"
    yield Check(name, ok, f"mean |difference| <= {canary['limit']:.4f} nats", got, remedy)


def _orphans(local: Mapping[str, Any]) -> Check:
    orphans = local["orphans"]
    got = ", ".join(orphans[:3]) or "none"
    return Check("orphaned shared memory", not orphans, "none", got, "the next start removes them" if orphans else "")
