"""Options and results of a demo run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from bridge.coordinator.health import Check

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class DemoOptions:
    """One demo run.

    Args:
        model: a local checkpoint folder to start from; None: a tiny random Qwen2.
        steps: optimiser steps, one batch of rollouts and (with `push`) one push each.
        seed: of the random policy, the prompts and the engine's sampling.
        tied: tie the random policy's embeddings.
        push: False never pushes: the engine keeps serving the first policy, and the trainer learns from its rollouts.
        out_dir: where receipts, rows and the picture go; files of an earlier run are replaced.
        layout: the embedded engine's post-load layout.
        learning_rate: None scales with the model's width.
        name: of the bridge; None: one that no other demo uses.
        quiet: no progress on stderr.
    """

    model: Path | None = None
    steps: int = 50
    seed: int = 0
    tied: bool = False
    push: bool = True
    out_dir: Path = Path("demo_out")
    layout: str = "canonical"
    learning_rate: float | None = None
    name: str | None = None
    quiet: bool = False


@dataclass(frozen=True)
class StepRow:
    """One step. `version` is the oldest that sampled any of its rollouts; the sync columns are None without a push."""

    step: int
    reward: float
    version: int
    rollout_s: float
    train_s: float
    loss: float
    clipped: float
    sync_ms: float | None = None
    pause_ms: float | None = None
    gb_per_s: float | None = None
    drift: float | None = None
    verified: bool | str | None = None


@dataclass(frozen=True)
class DemoResult:
    """The closing figures of a run, mean rewards.

    Attributes:
        start, end: of the engine's rollouts over the first and last `window` steps.
        random: of tokens drawn uniformly.
        untrained: of the policy's first rollouts.
        trainer: of the trainer's own copy at the end, which the engine should match when pushes are on.
    """

    task: str
    push: bool
    seed: int
    window: int
    start: float
    end: float
    random: float
    untrained: float
    trainer: float
    wall_s: float
    healthy: bool
    out_dir: str
    health: tuple[Check, ...] = ()
    rows: tuple[StepRow, ...] = field(default=(), repr=False)

    @property
    def exit_code(self) -> int:
        """0, or 1 when the demo ran and found something unhealthy."""
        return 0 if self.healthy else 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {"schema_version": SCHEMA_VERSION, **msgspec.to_builtins(self)}
