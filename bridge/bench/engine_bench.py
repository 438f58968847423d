"""`weighbridge bench --engine KIND:PATH`: pushes into a real engine against the engine's own way to take new weights.

This half starts the measuring process (`engine_worker`) and puts its figures together.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from os import environ
from typing import Any

import msgspec

from bridge.bench.copy_bench import Timed, machine, measure_in_process, variant_stats
from bridge.errors import ConfigError

PUSHES = {"unverified": "off", "bits and probes": "weights", "everything": "outputs"}
"""Variants measured besides the engine's own way: label -> verify=."""
TARGETS = {"vllm": {"bits and probes": 1.0}, "sglang": {"unverified": 1.5, "bits and probes": 1.0}}
"""How many times as fast as the engine's own way each variant has to be. "everything" adds forwards of trainer and
engine, which on a CPU take longer than any copy."""


class EngineJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measurement to make: `folder` holds a checkpoint's config.json, or is the name of a set of shapes."""

    scheme: str
    folder: str
    rounds: int
    seed: int = 0


class EngineMeasured(msgspec.Struct, frozen=True, tag=True):
    """The measurements of one job: timed calls by variant, those of the engine's own way under `own`."""

    job: EngineJob
    own: str
    tensors: int
    nbytes: int
    variants: dict[str, list[Timed]]
    first: Timed
    startup_s: float


def run(spec: str, rounds: int, seed: int, *, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure one engine and return a plain report. Blocks for minutes.

    Args:
        spec: "vllm:PATH" or "sglang:PATH"; PATH a checkpoint folder, or "qwen2-0.5b" or "qwen2-0.5b-untied", whose
            weights are then made up.

    Raises ConfigError for a spec that cannot be measured, and as `measure_in_process`.
    """
    scheme, colon, folder = spec.partition(":")
    if not colon or scheme not in TARGETS or not folder:
        raise ConfigError(
            "not an engine that can be measured", where="--engine", got=repr(spec),
            expected=" | ".join(f"{name}:PATH" for name in TARGETS),
            remedy="give a checkpoint folder, or qwen2-0.5b, after the colon",
        )  # fmt: skip
    progress(f"starting {scheme}, then {rounds} rounds of {len(PUSHES) + 1} variants, in random order")
    found = _measure(EngineJob(scheme, folder, rounds, seed))
    own = statistics.median(one.seconds for one in found.variants[found.own])
    return {
        "machine": machine(),
        "engine": found.job.scheme,
        "own": found.own,
        "tensors": found.tensors,
        "nbytes": found.nbytes,
        "rounds": found.job.rounds,
        "startup_s": found.startup_s,
        "first": {"seconds": found.first.seconds, "phases": found.first.phases},
        "variants": {
            name: variant_stats(timed, found.nbytes, own, TARGETS[found.job.scheme].get(name))
            for name, timed in found.variants.items()
        },
    }


def _measure(job: EngineJob) -> EngineMeasured:
    return measure_in_process("bridge.bench.engine_worker", job, EngineMeasured, environ)
