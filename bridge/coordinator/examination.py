"""Examination: compare what engines serve with the arena, for `health`."""

from __future__ import annotations

from typing import Any

from bridge.coordinator.engines import Fleet
from bridge.coordinator.versions import References, Versions
from bridge.errors import BridgeError, Busy
from bridge.model import canary
from bridge.protocol.coordinator_messages import EngineInfo
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import EngineCheck, EngineChecked
from bridge.protocol.rank_jobs import VerifyJob

LEVELS = ("transfer", "read-back", "probe")


def examine(fleet: Fleet, versions: Versions, deadline: Deadline) -> list[dict[str, Any]]:
    """Read back, probe and score what every engine serves now, its LoRA adapter included. Writes nothing.

    Runs on the owner thread; blocks at most until the deadline. Returns one dict of facts per engine; an engine that
    does not answer has state LOST.
    """
    infos = fleet.ask_infos(deadline)
    served = versions.committed
    if served is None or served.weights is None:
        return [facts_of(info) for info in infos.values()]
    references = versions.references.get(served.version, References())
    reference = references.served
    weights = EngineCheck(
        VerifyJob(served.weights.plan.id, served.weights.slot, LEVELS),
        served.version,
        reference.prompts if reference is not None else (),
        scored=served.lora_name if references.base is not None else None,
    )
    alive = [engine for engine, info in infos.items() if info.state != "LOST"]
    answers = fleet.ask_each(dict.fromkeys(alive, weights), EngineChecked, deadline)
    if served.lora is not None:
        adapter = EngineCheck(
            VerifyJob(served.lora.plan.id, served.lora.slot, LEVELS, served.lora_name), served.version
        )
        loaded = fleet.ask_each(dict.fromkeys(alive, adapter), EngineChecked, deadline)
        answers = {engine: _both(answer, loaded[engine]) for engine, answer in answers.items()}
    out = []
    for engine, info in infos.items():
        facts, answer = facts_of(info), answers.get(engine)
        if isinstance(answer, Busy):
            facts["not_examined"] = str(answer)
        elif isinstance(answer, BridgeError):
            facts["error"] = str(answer)
        elif answer is not None:
            facts["levels"] = _levels(answer)
            if reference is not None and answer.scores:
                floor, baseline = fleet.floors.get(engine, canary.DEFAULT_FLOOR), fleet.baselines.get(engine)
                drift = canary.compare(reference.logprobs, answer.scores, floor=floor, baseline=baseline)
                facts["canary"] = {"mean_abs": drift.mean_abs, "max_abs": drift.max_abs, "limit": drift.limit}
        out.append(facts)
    return out


def facts_of(info: EngineInfo) -> dict[str, Any]:
    """Pick the facts of an engine that `health` shows."""
    return {"id": info.id, "kind": info.kind, "state": info.state, "serving": info.serving, "ranks": info.ranks,
            "pid": info.pid, "detail": info.detail}  # fmt: skip


def _both(weights: EngineChecked | BridgeError, adapter: EngineChecked | BridgeError) -> EngineChecked | BridgeError:
    """Join one engine's answers about its weights and its adapter; an error stands for both."""
    if isinstance(weights, BridgeError) or isinstance(adapter, BridgeError):
        return weights if isinstance(weights, BridgeError) else adapter
    ranks = tuple((*a, *b) for a, b in zip(weights.ranks, adapter.ranks, strict=True))
    return EngineChecked(ranks, weights.scores)


def _levels(answer: EngineChecked) -> list[dict[str, Any]]:
    return [
        {
            "rank": rank,
            "level": level.level,
            "ok": level.ok,
            "checked": level.checked,
            "note": level.note,
            "failures": [[failure.name, failure.expected, failure.got] for failure in level.failures],
        }
        for rank, levels in enumerate(answer.ranks)
        for level in levels
    ]
