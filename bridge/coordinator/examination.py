"""Examination: compare what engines serve with the arena, for `health`."""

from __future__ import annotations

from bridge.coordinator.engines import Fleet
from bridge.coordinator.health import Examined
from bridge.coordinator.versions import References, Versions
from bridge.errors import BridgeError
from bridge.model import canary
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import EngineCheck, EngineChecked
from bridge.protocol.rank_jobs import VerifyJob

LEVELS = ("transfer", "read-back", "probe")


def examine(fleet: Fleet, versions: Versions, deadline: Deadline) -> list[Examined]:
    """Read back, probe and score what every engine serves now, its LoRA adapter included. Writes nothing.

    Runs on the owner thread; blocks at most until the deadline. An engine that does not answer has state LOST.
    """
    infos = fleet.ask_infos(deadline)
    served = versions.committed
    if served is None or served.weights is None:
        return [Examined(info) for info in infos.values()]
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
    found = []
    for engine, info in infos.items():
        answer, drift = answers.get(engine), None
        if reference is not None and isinstance(answer, EngineChecked) and answer.scores:
            floor = fleet.floors.get(engine, canary.DEFAULT_FLOOR)
            noise = None if info.noise is None else info.noise.expected(reference.rounding_of(info.losses))
            rule = canary.LimitRule(floor, noise, references.canary_limit)
            drift = canary.compare(reference.logprobs, answer.scores, rule)
        found.append(Examined(info, answer, drift))
    return found


def _both(weights: EngineChecked | BridgeError, adapter: EngineChecked | BridgeError) -> EngineChecked | BridgeError:
    """Join one engine's answers about its weights and its adapter; an error stands for both."""
    if isinstance(weights, BridgeError) or isinstance(adapter, BridgeError):
        return weights if isinstance(weights, BridgeError) else adapter
    ranks = tuple((*a, *b) for a, b in zip(weights.ranks, adapter.ranks, strict=True))
    return EngineChecked(ranks, weights.scores)
