"""A trainer process with a LoRA policy for the tests: `lora_worker.py ACTION NAME SEED`, as `trainer_worker.py`."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch

import bridge
from tests.conftest import tiny_qwen2
from tests.push.lora_rig import wrap
from tests.ray.trainer_worker import die, say
from trainer_side.trainer import TrainerSide

TARGETS = ["q_proj", "v_proj", "o_proj"]


def policy(seed: int) -> Any:
    """The policy that a worker with this seed pushes: the checkpoint's model under a random adapter."""
    return wrap(tiny_qwen2(seed=0), seed=seed, scale=0.3, target_modules=TARGETS)


def push_and_die(b: bridge.Bridge, model: Any) -> None:
    """SIGKILL as the very next thing after `push(wait=False)` has returned."""
    pending = b.push(model.named_parameters(), mode="adapter", wait=False)
    os.write(1, json.dumps({"version": pending.version, "time": time.time()}).encode() + b"\n")
    die()


def die_in_the_snapshot(b: bridge.Bridge, model: Any) -> None:
    """The base was compared, half of the adapter is written when the process dies."""
    write = TrainerSide.write

    def half(self: TrainerSide, snapshot: Any, arena: Any, slot: int, base: Any, **options: Any) -> Any:
        if snapshot.adapter is None:
            return write(self, snapshot, arena, slot, base, **options)
        tensors = arena.tensors(slot)
        for tensor in tensors[: len(tensors) // 2]:
            tensor.fill_(7)
        die()

    TrainerSide.write = half  # type: ignore[method-assign]
    b.push(model.named_parameters(), mode="adapter")


ACTIONS = {f.__name__: f for f in (push_and_die, die_in_the_snapshot)}


def main(action: str, name: str, seed: str) -> None:
    torch.set_num_threads(1)
    model = policy(int(seed))
    b = bridge.connect(name, model=model)
    say()
    ACTIONS[action](b, model)


if __name__ == "__main__":
    main(*sys.argv[1:])
