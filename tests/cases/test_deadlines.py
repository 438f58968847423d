"""`timeout_s` bounds every part of a push, the forwards of the trainer's own model too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from bridge.errors import DeadlineExceeded
from tests.push.rig import Rig

SLOW_S = 0.2


class SlowLinear(nn.Linear):
    """The fault `slow layer`: computes what it should, late."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(SLOW_S)
        return super().forward(x)


@contextmanager
def slow_layers(model: nn.Module) -> Iterator[int]:
    """Make every linear layer slow; yields how many there are."""
    linear = [module for module in model.modules() if type(module) is nn.Linear]
    for module in linear:
        module.__class__ = SlowLinear
    try:
        yield len(linear)
    finally:
        for module in linear:
            module.__class__ = nn.Linear


def test_the_forward_for_the_canary_ends_at_the_deadline(rig: Rig) -> None:
    rig.push()
    rig.step()
    with slow_layers(rig.model) as count:
        with rig.unmoved(then_push=False):
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded, match=r"a forward of the trainer's model.*raise timeout_s"):
                rig.push(timeout_s=2 * SLOW_S)
            assert time.monotonic() - started < count * SLOW_S / 2
        assert rig.push(verify="weights", timeout_s=5).verified is True  # the remedy
    assert rig.push().verified is True
