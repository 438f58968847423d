"""Print what the canary and the other levels find beside how much noise (`make canary-table`).

Every row is a fault of the engine, small to large, every column an engine. Each cell is an engine that is started from
the trainer's weights, with the fault there before the first push, or put in after a first good one; then the trainer
pushes, and what refused it is printed. docs/guarantees.md holds the result.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import bridge
from bridge.errors import BridgeError, CanaryMismatch, PushAborted
from bridge.model import canary
from engine_side.embedded import attention
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from engine_side.embedded.layers import RMSNorm
from engine_side.load.loader import Loader
from tests.families import make_model, perturb
from trainer_side.reference import reference_logprobs

FAMILY = "llama"
DOWN = "model.layers.0.mlp.down_proj.weight"
ENGINES: Mapping[str, tuple[torch.dtype, str | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16, KV fp8_e4m3": (torch.bfloat16, "fp8_e4m3"),
    "bf16, KV fp8_e5m2": (torch.bfloat16, "fp8_e5m2"),
}
"""Column -> dtype of trainer and engine, dtype of the KV cache."""


@dataclass(frozen=True)
class Fault:
    """One row: what is wrong, how much, and how it is brought about while the block runs."""

    kind: str
    size: str
    inject: Callable[[Engine], Any]


@contextmanager
def _rotary_base(theta: float, engine: Engine) -> Iterator[None]:
    table = engine.runner.model.model.rotary_emb
    count = len(table.inverse)
    table.inverse.copy_(1.0 / theta ** (torch.arange(count, dtype=torch.float32) / count))
    yield


@contextmanager
def _norm_epsilon(epsilon: float, engine: Engine) -> Iterator[None]:
    for module in engine.runner.model.modules():
        if isinstance(module, RMSNorm):
            module.eps = epsilon
    yield


@contextmanager
def _attention_scale(by: float, _: Engine) -> Iterator[None]:
    module: Any = attention
    attend = module.paged_attention

    def scaled(q: torch.Tensor, *rest: Any) -> Any:
        return attend(q, *rest, by * q.shape[-1] ** -0.5)

    module.paged_attention = scaled
    try:
        yield
    finally:
        module.paged_attention = attend


@contextmanager
def _weight(by: float, engine: Engine) -> Iterator[None]:
    """Multiply one matrix: now, and again after every load."""
    loader: Any = Loader
    apply, weight = loader.apply, engine.runner.model.get_parameter(DOWN)

    def spoil() -> None:
        with torch.no_grad():
            weight.mul_(by)

    def spoiling(self: Any, *arguments: Any) -> Any:
        outcome = apply(self, *arguments)
        spoil()
        return outcome

    spoil()
    loader.apply = spoiling
    try:
        yield
    finally:
        loader.apply = apply


def _rows(kind: str, inject: Callable[[float, Engine], Any], sizes: Mapping[str, float]) -> list[Fault]:
    return [Fault(kind, name, partial(inject, size)) for name, size in sizes.items()]


FAULTS = [
    *_rows("a matrix, times", _weight, {"1.01": 1.01, "1.5": 1.5}),
    *_rows("rotary base 1e4, now", _rotary_base, {"1.1e4": 1.1e4, "2e4": 2e4, "1e5": 1e5, "1e6": 1e6}),
    *_rows("norm epsilon 1e-6, now", _norm_epsilon, {"1e-4": 1e-4, "1e-3": 1e-3, "1e-2": 1e-2, "1e-1": 1e-1}),
    *_rows("attention scale, times", _attention_scale, {"1.1": 1.1, "1.5": 1.5, "2": 2.0, "4": 4.0}),
]


class Bench:
    """One model and its checkpoint; makes engines from it. `close` is the caller's."""

    def __init__(self, folder: Path, dtype: torch.dtype, kv: str | None) -> None:
        self.model = make_model(FAMILY).to(dtype)
        self.model.save_pretrained(folder)
        self.engine = Engine(EngineConfig(str(folder), kv_dtype=kv))  # type: ignore[arg-type]
        self.b = bridge.attach(self.engine, model=self.model)

    def push(self) -> str:
        """Push, and tell what refused it."""
        try:
            receipt = self.b.push(self.model.named_parameters())
        except PushAborted as error:
            return _level_of(error)
        except CanaryMismatch:
            return "unwritten"
        return "-" if receipt.verified is True else f"{receipt.verified}"

    def noise(self) -> str:
        """Push once, and tell difference and limit as fractions of the spread."""
        drift = self.b.push(self.model.named_parameters()).engines[0].canary
        if drift is None:
            raise CanaryMismatch("the embedded engine gave no canary")
        return f"{drift.mean_abs / drift.spread:.4f} | {drift.limit / drift.spread:.3f}"

    def effect(self, fault: Fault) -> float:
        """Tell how far the fault moves the engine's answers, as a fraction of the trainer's spread."""
        prompts = canary.prompts(self.model.config.vocab_size)
        wanted = reference_logprobs(self.model, prompts)
        with fault.inject(self.engine):
            moved = self.engine.prompt_logprobs(prompts)
        return canary.compare(wanted, moved, canary.LimitRule()).mean_abs / canary.spread_of(wanted)

    def close(self) -> None:
        self.b.close()
        self.engine.close()


def _level_of(error: PushAborted) -> str:
    """Name the levels that failed; the canary is not among the ranks' levels."""
    reports = error.receipt.engines if error.receipt is not None else ()
    failed = [level.level for e in reports for rank in e.ranks for level in rank.levels if not level.ok]
    if failed:
        return ", ".join(dict.fromkeys(failed))
    return "canary" if isinstance(error.__cause__, CanaryMismatch) else type(error.__cause__).__name__


@contextmanager
def _bench(column: str) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), *ENGINES[column])
        try:
            yield bench
        finally:
            bench.close()


def _before(column: str, fault: Fault) -> str:
    with _bench(column) as bench, fault.inject(bench.engine):
        return bench.push()


def _after(column: str, fault: Fault) -> str:
    with _bench(column) as bench:
        bench.noise()
        perturb(bench.model, 1)
        with fault.inject(bench.engine):
            return bench.push()


def _print_table(title: str, cell: Callable[[str, Fault], str]) -> None:
    print(f"\n{title}\n\n| fault | moves by | {' | '.join(ENGINES)} |")
    print("|---|---|" + "---|" * len(ENGINES))
    for fault in FAULTS:
        with _bench("fp32") as bench:
            moved = bench.effect(fault)
        found = " | ".join(cell(column, fault) for column in ENGINES)
        print(f"| {fault.kind} {fault.size} | {moved:.4f} | {found} |", flush=True)


def main() -> None:
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    print("All numbers are fractions of the standard deviation of the trainer's log-probabilities.")
    print("\n| engine | noise | limit |\n|---|---|---|")
    for column in ENGINES:
        with _bench(column) as bench:
            print(f"| {column} | {bench.noise()} |")
    _print_table("There before the first push, of the engine's own weights:", _before)
    _print_table("Broken after a good first push, found by the second, of weights that have moved:", _after)


if __name__ == "__main__":
    try:
        main()
    except BridgeError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
