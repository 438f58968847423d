"""A trainer process for the tests: connects to daemon NAME, steps `tiny_qwen2` and does what its first argument says.

    trainer_worker.py ACTION NAME SEED

Every line that it prints is a JSON object; it says who it is before it does anything.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import torch

import bridge
from tests.conftest import perturb, tiny_qwen2
from trainer_side.trainer import TrainerSide


def say(**facts: Any) -> None:
    print(json.dumps({"pid": os.getpid(), "time": time.time(), **facts}), flush=True)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def push_and_die(b: bridge.Bridge, model: Any) -> None:
    """SIGKILL as the very next thing after `push(wait=False)` has returned; what it said before is all that it says."""
    pending = b.push(model.named_parameters(), wait=False)
    os.write(1, json.dumps({"version": pending.version, "time": time.time()}).encode() + b"\n")
    die()


def die_in_the_snapshot(b: bridge.Bridge, model: Any) -> None:
    """Half of the snapshot is written when the process dies."""

    def half(self: TrainerSide, snapshot: Any, arena: Any, slot: int, base: Any, **options: Any) -> Any:
        tensors = arena.tensors(slot)
        for tensor in tensors[: len(tensors) // 2]:
            tensor.fill_(7)
        die()

    TrainerSide.write = half  # type: ignore[method-assign]
    b.push(model.named_parameters())


def push_and_hold(b: bridge.Bridge, model: Any) -> None:
    """Keep the lease until somebody ends this process."""
    say(version=b.push(model.named_parameters()).version)
    time.sleep(600)


ACTIONS = {f.__name__: f for f in (push_and_die, die_in_the_snapshot, push_and_hold)}


def main(action: str, name: str, seed: str) -> None:
    torch.set_num_threads(1)
    model = tiny_qwen2(seed=0)
    perturb(model, seed=int(seed))
    b = bridge.connect(name, model=model)
    say()
    ACTIONS[action](b, model)


if __name__ == "__main__":
    main(*sys.argv[1:])
