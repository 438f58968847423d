"""What health makes of the facts: each thing that is wrong shows, alone, and makes the run unhealthy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from bridge.coordinator.health import Examined, Facts, assess
from bridge.errors import Busy, PeerLost
from bridge.model.receipt import CanaryResult, Failure, LevelResult
from bridge.protocol.coordinator_messages import EngineInfo
from bridge.protocol.engine_messages import EngineChecked

INFO = EngineInfo("engine0", "embedded", 1, True, "SERVING", 3, "here", 42)
FINE = CanaryResult(0.01, 0.02, 0.0, 0.05, 30)
RECEIPT = {"version": 3, "verify": "outputs", "verified": True, "error": None, "engines": [{"canary": {}}]}


def checked(**changes: Any) -> EngineChecked:
    level = LevelResult("read-back", True, 7)
    return EngineChecked(((level, msgspec.structs.replace(level, level="probe", **changes)),))


def engine(info: EngineInfo = INFO, answer: Any = None, canary: CanaryResult | None = FINE, **changes: Any) -> Examined:
    return Examined(msgspec.structs.replace(info, **changes), checked() if answer is None else answer, canary)


GOOD = Facts("run1", [engine()], committed=3, earlier=None, busy=None, watched=(), last_receipt=RECEIPT)
WRONG = [
    ("engine0 alive", {"engines": [engine(state="LOST", serving=None, detail="gone", canary=None)]}),
    ("engine0 version", {"engines": [engine(state="QUARANTINED", serving=None)]}),
    ("engine0 version", {"engines": [engine(serving=2)]}),
    ("last receipt", {"last_receipt": {**RECEIPT, "error": "the read-back check failed", "verified": False}}),
    ("last receipt", {"last_receipt": {**RECEIPT, "verified": False}}),
    ("engine0 weights", {"engines": [engine(answer=PeerLost("the engine is gone"))]}),
    (
        "rank 0 probe: a.weight",
        {"engines": [engine(answer=checked(ok=False, failures=(Failure("a.weight", "1", "2"),)))]},
    ),
    ("engine0 rank 0 probe", {"engines": [engine(answer=checked(ok=False, note="nothing is bound"))]}),
    ("engine0 canary", {"engines": [engine(canary=msgspec.structs.replace(FINE, mean_abs=0.06))]}),
]
UNWATCHED = [
    ("engine0 version", {"earlier": 2}),
    ("scope", {"watched": ("only 3 tensors",)}),
    ("last receipt", {"last_receipt": None}),
    ("last receipt", {"last_receipt": {**RECEIPT, "verified": "partial"}}),
    ("last receipt", {"last_receipt": {**RECEIPT, "engines": [{"canary": {}}, {"canary": None}]}}),
    ("engine0 weights", {"engines": [engine(answer=Busy("version 4 is being pushed"), canary=None)]}),
    ("engine0 canary", {"engines": [engine(canary=None)]}),
]


def test_a_sound_run_is_healthy() -> None:
    report = assess(GOOD)
    assert report.status == "healthy"
    assert {"engine0 alive", "engine0 version", "last receipt", "engine0 canary"} < {
        each.name for each in report.checks
    }


@pytest.mark.parametrize(("name", "change"), WRONG)
def test_what_is_wrong_shows_alone(name: str, change: dict[str, Any]) -> None:
    report = assess(replace(GOOD, **change))
    assert report.status == "unhealthy"
    (bad,) = [check for check in report.checks if not check.ok]
    assert bad.name.endswith(name)
    assert bad.remedy


@pytest.mark.parametrize(("name", "change"), UNWATCHED)
def test_what_nobody_watched_degrades(name: str, change: dict[str, Any]) -> None:
    report = assess(replace(GOOD, **change))
    assert report.status == "degraded"
    assert name in [check.name for check in report.checks if check.degraded]


def test_one_wrong_engine_among_many_counts() -> None:
    report = assess(replace(GOOD, engines=[engine(), engine(id="engine1", serving=2), engine(id="engine2")]))
    assert [check.name for check in report.checks if not check.ok] == ["engine1 version"]
    assert report.status == "unhealthy"


def test_an_engine_that_a_push_occupies_may_stand_anywhere() -> None:
    report = assess(replace(GOOD, busy=4, engines=[engine(state="LOADED", answer=Busy("version 4 is being pushed"))]))
    assert report.healthy
