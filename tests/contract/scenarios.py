"""Steps that several scenarios share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from bridge.errors import EngineQuarantined
from tests.rigs import EngineRig, difference


def check_family(rig: EngineRig) -> None:
    """Two pushes and a rollback: verified without the canary's help, as near to transformers as the engine is, and
    equal to an engine that was started from a checkpoint of the same weights."""
    serving = rig.b.status().engines[0].serving or 0
    said = [rig.said()]
    for version in (serving + 1, serving + 2):
        rig.step()
        assert rig.off() > 2 * rig.largest_noise, "the step must show"
        receipt = rig.push()
        assert receipt.verified is True
        assert rig.version == str(version)
        for rank in receipt.engines[0].ranks:
            assert not rank.canary_only
            assert "native" not in rank.strategies
        said.append(rig.said())
        assert rig.off() < rig.largest_noise
    rig.b.rollback()
    assert rig.said() == said[1] != said[0]
    assert rig.version == str(serving + 1)
    assert difference(said[2], said[1]) > 3 * difference(said[2], rig.wanted()), "the step must show"
    if not rig.no_fresh or rig.b.status().engines[0].ranks == 1:  # four of SGLang's schedulers are too many here
        assert said[2] == rig.fresh()


def quarantine(rig: EngineRig, **options: Any) -> None:
    """A push, after a step, whose way back breaks as well."""
    with rig.broken_writes(5, always=True), pytest.raises(EngineQuarantined):
        rig.push(**options)


def jiggle(model: Any, seed: int) -> None:
    """Other values in every LoRA tensor: a fresh B is zero and would hide everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.15).to(parameter.dtype))


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


@contextmanager
def closed(rig: EngineRig) -> Iterator[None]:
    """Inside, no bridge drives the engine; another one does afterwards."""
    rig.b.close()
    yield
    rig.attach()
