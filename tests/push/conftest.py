"""Engines of this process with a bridge that is bound to the trainer's model, plain or under PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bridge
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from tests.conftest import tiny_qwen2
from tests.push.lora_rig import LoraRig, wrap


@pytest.fixture
def attached(checkpoint: Callable[[Any], Path]) -> Iterator[Callable[..., tuple[Engine, bridge.Bridge]]]:
    made: list[Any] = []

    def attach(model: Any, **engine_args: Any) -> tuple[Engine, bridge.Bridge]:
        engine = Engine(EngineConfig(str(checkpoint(model)), **engine_args))
        made.append(engine)
        b = bridge.attach(engine, model=model)
        made.append(b)
        return engine, b

    yield attach
    for thing in reversed(made):
        thing.close()


@pytest.fixture
def make(checkpoint: Callable[[Any], Path]) -> Iterator[Callable[..., LoraRig]]:
    """`make(base, engine={...}, **lora)`: a rig around PEFT on `base`, whose checkpoint the engine starts from.

    In place of `**lora`, `model=` makes the trainer's model from the base.
    """
    made: list[LoraRig] = []

    def build(base: Any = None, *, model: Any = None, engine: dict[str, Any] | None = None, **lora: Any) -> LoraRig:
        base = tiny_qwen2() if base is None else base
        folder = checkpoint(base)
        made.append(LoraRig(folder, wrap(base, **lora) if model is None else model(base), **(engine or {})))
        return made[-1]

    yield build
    for rig in made:
        rig.close()
