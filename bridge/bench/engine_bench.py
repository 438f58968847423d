"""`weighbridge bench --engine KIND:PATH`: pushes into a real engine against the engine's own way to take new weights.

`run` starts a measuring process and puts its figures together. There an EngineJob comes in on stdin, and measurements
go to stdout. A transformers model is the trainer. Every value changes before every timed call; pushes and the engine's
own way take turns in random order within each round, and at the end the engine is checked against the trainer.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import environ
from pathlib import Path
from typing import Any

import msgspec

import bridge
from bridge import entry_points
from bridge.bench.copy_bench import Timed, machine, measure_in_process, variant_stats
from bridge.bench.copy_worker import QWEN2_05B, Trainer, serve_one_job
from bridge.errors import ConfigError, IntegrityError, NotFound

PUSHES = {"unverified": "off", "bits and probes": "weights", "everything": "outputs"}
"""Variants measured besides the engine's own way: label -> verify=."""
TARGETS = {"vllm": {"bits and probes": 1.0}, "sglang": {"unverified": 1.5, "bits and probes": 1.0}}
"""How many times as fast as the engine's own way each variant has to be. "everything" adds forwards of trainer and
engine, which on a CPU take longer than any copy."""

MADE_UP: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": QWEN2_05B,
    "qwen2-0.5b-untied": {**QWEN2_05B, "tie_word_embeddings": False},
}
"""Configurations by name. An engine whose own way leaves one of two tied tensors behind does less work on the first."""


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
            "not an engine that can be measured",
            where="--engine",
            expected=" | ".join(f"{name}:PATH" for name in TARGETS),
            got=repr(spec),
            remedy="give a checkpoint folder, or qwen2-0.5b, after the colon",
        )
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
    return measure_in_process("bridge.bench.engine_bench", job, EngineMeasured, environ)


# ---- the measuring process --------------------------------------------------------------------------------------


@contextmanager
def _folder(given: str) -> Iterator[Path]:
    """Yield the folder of a checkpoint; for the name of a set of shapes one that is made, and removed at the end."""
    if given not in MADE_UP:
        path = Path(given)
        if not (path / "config.json").is_file():
            remedy = f"give a folder with a config.json, or {' or '.join(MADE_UP)}"
            raise NotFound(
                "no such checkpoint folder", where=given, expected="a folder", got="nothing there", remedy=remedy
            )
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="weighbridge-bench-model-") as made:
        (Path(made) / "config.json").write_text(json.dumps(MADE_UP[given]))
        _model(Path(made)).save_pretrained(made)
        yield Path(made)


def _model(folder: Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def measure(job: EngineJob) -> EngineMeasured:
    """Measure one job. Blocks for minutes. Raises IntegrityError when the engine ends with other weights."""
    with _folder(job.folder) as folder:
        trainer = Trainer(_model(folder))
        started = time.perf_counter()
        native = entry_points.load(entry_points.NATIVE_RELOAD)(job.scheme, folder)
        startup = time.perf_counter() - started
        try:
            with bridge.attach(native.engine, model=trainer.model) as made:
                first, variants = _rounds(job, trainer, made, native)
        finally:
            native.stop()
    parameters = list(trainer.model.parameters())
    nbytes = sum(p.nbytes for p in parameters)
    return EngineMeasured(job, native.label, len(parameters), nbytes, variants, first, startup)


def _rounds(job: EngineJob, trainer: Trainer, made: Any, native: Any) -> tuple[Timed, dict[str, list[Timed]]]:
    def push(verify: str) -> Timed:
        trainer.change()
        started = time.perf_counter()
        receipt = made.push(trainer.model.named_parameters(), verify=verify)
        return Timed(time.perf_counter() - started, 0.0, receipt.pause_s, dict(receipt.phases))

    def own() -> Timed:
        trainer.change()
        started = time.perf_counter()
        native.own(trainer.model.named_parameters())
        seconds = time.perf_counter() - started
        return Timed(seconds, 0.0, seconds)

    turns: dict[str, Callable[[], Timed]] = {name: (lambda v=v: push(v)) for name, v in PUSHES.items()}  # type: ignore[misc]
    turns[native.label] = own
    first = push("outputs")
    found: dict[str, list[Timed]] = {name: [] for name in turns}
    order = random.Random(job.seed)
    for _ in range(job.rounds):
        names = list(turns)
        order.shuffle(names)
        for name in names:
            turns[name]()  # untimed: as in a training loop, each call finds the caches of one like it
            found[name].append(turns[name]())
    push("outputs")
    wrong = [check.name for check in made.health().checks if not check.ok]
    if wrong:
        raise IntegrityError(
            "after the rounds the engine's weights are not the trainer's",
            where=", ".join(wrong),
            expected="the bits that were pushed",
            got=f"{len(wrong)} tensors with other bits",
            remedy="this is a fault of weighbridge: please report it",
        )
    return first, found


if __name__ == "__main__":
    sys.exit(serve_one_job(EngineJob, measure))
