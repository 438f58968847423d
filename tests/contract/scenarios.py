"""Steps that several tests of the contract, and of the engines' own folders, share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import bridge
from bridge.errors import BridgeError, EngineQuarantined
from tests.rigs import EngineRig, TrainerRig


def quarantine(rig: EngineRig, **options: Any) -> None:
    """Do a push that breaks, after a step, and whose way back breaks as well."""
    with rig.broken_writes(5, always=True), pytest.raises(EngineQuarantined):
        rig.push(**options)


def jiggle(model: Any, seed: int) -> None:
    """Give every LoRA tensor other values: a fresh B is zero and would hide everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.15).to(parameter.dtype))


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll until the condition holds; fails after the seconds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


@contextmanager
def closed(rig: TrainerRig) -> Iterator[None]:
    """Close the bridge inside; another one is attached afterwards."""
    rig.b.close()
    yield
    rig.attach()


def attempt(push: Callable[[], bridge.Receipt]) -> bridge.Receipt | BridgeError:
    """Push, and give back what came of it."""
    try:
        return push()
    except BridgeError as error:
        return error
