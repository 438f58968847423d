"""The demo's loop: roll out on the engine, one GRPO step, push, weigh; then the health check and the files.

`weighbridge demo` calls `run_demo` and then `print_result`.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bridge.entry_points import load
from bridge.model.receipt import Receipt
from bridge.protocol.codec import Sampling
from trainer_side.demo import policy, report
from trainer_side.demo.grpo import Grpo, GrpoConfig, make_batch
from trainer_side.demo.task import Task, grouped_prompts, reward, task_for, uniform_reward
from trainer_side.demo.values import DemoOptions, DemoResult, StepRow

if TYPE_CHECKING:
    from bridge.client import Bridge

__all__ = ["DemoOptions", "DemoResult", "StepRow", "print_result", "run_demo"]

COMPLETION_TOKENS = 12
LARGE_MODEL = 20_000_000
"""Parameters above which rollouts are fewer and passed through the trainer in small pieces."""


OpenBridge = Callable[[DemoOptions, Path, nn.Module], AbstractContextManager["Bridge"]]


@dataclass(frozen=True)
class Scale:
    """The rollouts of one step: `groups` prompts, `group_size` completions of each; `micro_batch` rows per forward."""

    groups: int = 16
    group_size: int = 16
    micro_batch: int = 256


def run_demo(options: DemoOptions, open_bridge: OpenBridge | None = None) -> DemoResult:
    """Run the demo; progress on stderr, files in `options.out_dir`. Blocks until the last step and health check.

    Args:
        open_bridge: starts engines, connects, and stops both again on exit; None launches them on Ray.

    Raises:
        ConfigError: an extra or the checkpoint is missing; nothing was started.
    """
    began = time.monotonic()
    load("matplotlib.figure:Figure")  # the picture at the end: what is missing is said before anything starts
    with report.open_view(options) as view, _one_thread():
        model, checkpoint = _prepare(options)
        task = task_for(policy.vocab_size(model), policy.special_ids(model))
        view.say(f"task: {task.description}")
        record = report.Record(options.out_dir)
        with closing(record), (open_bridge or _launched)(options, checkpoint, model) as bridge:
            run = _Run(options, model, task, bridge)
            for step in range(1, options.steps + 1):
                row, receipt = run.step(step)
                record.step(row, receipt)
                view.row(row)
            result = run.result(began)
        record.result(result)
        report.draw(result.rows, result, options.out_dir / report.PICTURE_FILE)
    return result


def print_result(result: DemoResult) -> None:
    """Print the result on stdout, for a person."""
    sys.stdout.write(report.closing_text(result) + "\n")


class _Run:
    """One loop's state: the policy, its optimiser, the bridge, and the rows so far."""

    def __init__(self, options: DemoOptions, model: nn.Module, task: Task, bridge: Bridge) -> None:
        self.options = options
        self.model = model
        self.task = task
        self.bridge = bridge
        self.rng = random.Random(options.seed)
        self.scale = Scale(groups=8, group_size=8, micro_batch=8) if _is_large(model) else Scale()
        config: Any = model.config
        # 3e-3 at the tiny policy's width, less for wider ones: AdamW's step on a logit grows with the width
        rate = min(3e-3, 3e-3 * 64 / int(config.get_text_config().hidden_size))
        rate = rate if options.learning_rate is None else options.learning_rate
        self.grpo = Grpo(model, GrpoConfig(learning_rate=rate, micro_batch=self.scale.micro_batch))
        self.rows: list[StepRow] = []

    def step(self, step: int) -> tuple[StepRow, Receipt | None]:
        """Run one step; its receipt is None when nothing is pushed."""
        prompts = grouped_prompts(self.task, self.rng, self.scale.groups, self.scale.group_size)
        marks = [time.monotonic()]
        sampling = Sampling(max_tokens=COMPLETION_TOKENS, seed=self.options.seed * 1_000_003 + step)
        completions = self.bridge.engines[0].generate(prompts, sampling)
        rewards = [reward(self.task, p, c.token_ids) for p, c in zip(prompts, completions, strict=True)]
        marks.append(time.monotonic())
        stats = self.grpo.step(make_batch(prompts, completions, rewards, self.scale.group_size))
        marks.append(time.monotonic())
        receipt = self.bridge.push(self.model.named_parameters()) if self.options.push else None
        row = StepRow(
            step=step, reward=sum(rewards) / len(rewards), version=min(c.weight_version for c in completions),
            rollout_s=marks[1] - marks[0], train_s=marks[2] - marks[1], loss=stats.loss, clipped=stats.clipped,
            **(_sync_columns(receipt, time.monotonic() - marks[2]) if receipt is not None else {}),
        )  # fmt: skip
        self.rows.append(row)
        return row, receipt

    def result(self, began: float) -> DemoResult:
        """Compute the closing figures; runs the health check against the live engines."""
        rewards = [row.reward for row in self.rows]
        window = max(1, min(5, len(rewards) // 4))
        health = self.bridge.health()
        return DemoResult(
            task=self.task.description, push=self.options.push, seed=self.options.seed, window=window,
            start=sum(rewards[:window]) / window, end=sum(rewards[-window:]) / window,
            random=uniform_reward(self.task, random.Random(0), samples=8192, tokens=COMPLETION_TOKENS),
            untrained=rewards[0], trainer=self._trainer_reward(), wall_s=time.monotonic() - began,
            healthy=health.healthy, health=tuple(health.checks), rows=tuple(self.rows),
            out_dir=str(self.options.out_dir),
        )  # fmt: skip

    def _trainer_reward(self) -> float:
        """Measure the reward of the trainer's own copy: the engine's last figure should not be far from it."""
        prompts = grouped_prompts(self.task, self.rng, self.scale.groups * self.scale.group_size, 1)
        self.model.eval()
        generator = torch.Generator().manual_seed(self.options.seed)
        tokens = policy.sample(self.model, torch.tensor(prompts), COMPLETION_TOKENS, generator).tolist()
        return sum(reward(self.task, p, c) for p, c in zip(prompts, tokens, strict=True)) / len(prompts)


def _prepare(options: DemoOptions) -> tuple[nn.Module, Path]:
    """Load or make the policy; returns it and the checkpoint folder from which the engines start."""
    if options.model is not None:
        return policy.load_policy(options.model), options.model
    model = policy.tiny_qwen2(seed=options.seed, tied=options.tied)
    checkpoint = options.out_dir / "policy_at_start"
    policy.save_policy(model, checkpoint)
    return model, checkpoint


@contextmanager
def _launched(options: DemoOptions, checkpoint: Path, model: nn.Module) -> Iterator[Bridge]:
    """Launch an embedded engine in a Ray actor of its own, and a daemon that ends with the run."""
    import bridge
    from bridge.journal.state_dir import state_dir

    name = options.name or f"demo-{os.getpid()}-{secrets.token_hex(2)}"
    spec = f"embedded:{checkpoint.resolve()}"
    # Two threads on matrices this small gain nothing, and wait for each other where another process needs a core.
    few = {} if _is_large(model) else {"threads": 1}
    opened = bridge.launch(spec, name=name, engines=1, model=model, layout=options.layout, **few)
    try:
        yield opened
    finally:
        opened.shutdown()
        if options.name is None:  # a name that no later run uses: its journal goes with it
            shutil.rmtree(state_dir(name), ignore_errors=True)


def _sync_columns(receipt: Receipt, seconds: float) -> dict[str, Any]:
    """Turn a receipt into a row's columns; `seconds` is how long the training loop waited, Ray calls included."""
    drifts = [engine.canary.mean_abs for engine in receipt.engines if engine.canary is not None]
    return {
        "sync_ms": seconds * 1e3,
        "pause_ms": receipt.pause_s * 1e3,
        "gb_per_s": receipt.nbytes / seconds / 1e9,
        "drift": max(drifts, default=None),
        "verified": receipt.verified,
    }


def _is_large(model: nn.Module) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) > LARGE_MODEL


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit the trainer to one torch thread: on two cores the engine's actor needs the other one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
