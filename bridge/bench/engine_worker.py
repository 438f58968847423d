"""The measuring process of `weighbridge bench --engine`: an EngineJob comes in on stdin, measurements go to stdout.

A transformers model is the trainer. Every value changes before every timed call; pushes and the engine's own way take
turns in random order within each round, and at the end the engine is checked against the trainer.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bridge
from bridge import entry_points
from bridge.bench.copy_bench import Timed
from bridge.bench.copy_worker import QWEN2_05B, Trainer, serve_one_job
from bridge.bench.engine_bench import PUSHES, EngineJob, EngineMeasured
from bridge.errors import IntegrityError, NotFound

MADE_UP: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": QWEN2_05B,
    "qwen2-0.5b-untied": {**QWEN2_05B, "tie_word_embeddings": False},
}
"""Configurations by name. An engine whose own way leaves one of two tied tensors behind does less work on the first."""


@contextmanager
def _folder(given: str) -> Iterator[Path]:
    """Yield the folder of a checkpoint; for the name of a set of shapes one that is made, and removed at the end."""
    if given not in MADE_UP:
        path = Path(given)
        if not (path / "config.json").is_file():
            remedy = f"give a folder with a config.json, or {' or '.join(MADE_UP)}"
            raise NotFound("no such checkpoint folder", where=given, remedy=remedy)
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
            "after the rounds the engine's weights are not the trainer's", where=", ".join(wrong),
            remedy="this is a fault of weighbridge: please report it",
        )  # fmt: skip
    return first, found


if __name__ == "__main__":
    sys.exit(serve_one_job(EngineJob, measure))
