"""The demo's loop and its files, against an in-process bridge that copies weights and samples for real."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bridge.errors import ConfigError, NotFound
from bridge.model.receipt import CanaryResult, EngineReport, Receipt
from bridge.protocol.codec import Completion, Sampling
from trainer_side.demo import policy, report
from trainer_side.demo.run import DemoOptions, DemoResult, print_result, run_demo


@dataclass
class LocalEngine:
    """Serves a copy of the policy; only `push` of its bridge changes it."""

    model: nn.Module
    version: int = 0

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        tokens = policy.sample(
            self.model, torch.tensor(prompts), sampling.max_tokens, torch.Generator().manual_seed(sampling.seed or 0)
        )
        with torch.no_grad():
            logprobs = policy.completion_logprobs(self.model, torch.tensor(prompts), tokens)
        rows = zip(tokens.tolist(), logprobs.tolist(), strict=True)
        return [Completion(tuple(ids), tuple(values), "length", self.version) for ids, values in rows]


@dataclass
class LocalCheck:
    name: str = "actors alive"
    ok: bool = True
    expected: str = "1"
    got: str = "1"
    remedy: str = "none"


@dataclass
class LocalHealth:
    checks: list[LocalCheck]

    @property
    def healthy(self) -> bool:
        return all(check.ok for check in self.checks)


@dataclass
class LocalBridge:
    """Copies on push, keeps receipts, remembers that it was closed."""

    model: nn.Module
    healthy: bool = True
    closed: bool = False
    receipts: list[Receipt] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engines = [LocalEngine(copy.deepcopy(self.model))]

    def push(self, named: Iterable[tuple[str, Tensor]]) -> Receipt:
        assert not self.closed
        served = dict(self.engines[0].model.named_parameters())
        tensors = dict(named)
        with torch.no_grad():
            for name, tensor in tensors.items():
                served[name].copy_(tensor)
        self.engines[0].version += 1
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        canary = CanaryResult(mean_abs=1e-6, max_abs=1e-5, kl=0.0, limit=2e-3, tokens=96)
        receipt = Receipt(
            version=self.engines[0].version, previous=self.engines[0].version - 1, mode="full", reason="",
            tensors=len(tensors), nbytes=nbytes, wire_nbytes=nbytes, phases={"load": 0.001}, pause_s=0.001,
            engines=(EngineReport("0", "SERVING", self.engines[0].version, canary=canary),), verify="outputs",
            verified=True,
        )  # fmt: skip
        self.receipts.append(receipt)
        return receipt

    def health(self) -> LocalHealth:
        return LocalHealth([LocalCheck(ok=self.healthy, got="1" if self.healthy else "0")])


@dataclass
class Opened:
    """An opener that keeps the bridge it opened, for the test to look at."""

    healthy: bool = True
    bridge: LocalBridge | None = None
    checkpoint: Path | None = None

    @contextmanager
    def __call__(self, options: DemoOptions, checkpoint: Path, model: nn.Module) -> Iterator[LocalBridge]:
        self.checkpoint = checkpoint
        self.bridge = LocalBridge(model, healthy=self.healthy)
        try:
            yield self.bridge
        finally:
            self.bridge.closed = True


def _options(tmp_path: Path, **changes: object) -> DemoOptions:
    return replace(DemoOptions(steps=4, out_dir=tmp_path / "out", quiet=True), **changes)  # type: ignore[arg-type]


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_rows_receipts_a_picture_and_a_result(tmp_path: Path) -> None:
    opened = Opened()
    result = run_demo(_options(tmp_path), opened)
    out = tmp_path / "out"
    steps, receipts = _lines(out / "steps.jsonl"), _lines(out / "receipts.jsonl")
    assert [row["version"] for row in steps] == [0, 1, 2, 3]
    assert [row["version"] for row in receipts] == [1, 2, 3, 4]
    assert all(row["verified"] is True and row["drift"] == 1e-6 for row in steps)
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "result.json").read_text())["end"] == result.end
    assert result.exit_code == 0
    assert opened.bridge is not None
    assert opened.bridge.closed
    assert (out / "policy_at_start" / "model.safetensors").is_file()


def test_without_pushes_the_engine_keeps_serving_the_first_version(tmp_path: Path) -> None:
    opened = Opened()
    result = run_demo(_options(tmp_path, push=False), opened)
    assert {row.version for row in result.rows} == {0}
    assert all(row.sync_ms is None and row.verified is None for row in result.rows)
    assert (tmp_path / "out" / "receipts.jsonl").read_text() == ""
    assert opened.bridge is not None
    assert opened.bridge.receipts == []


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    first, second, other = (
        [row.reward for row in run_demo(_options(tmp_path / str(i), steps=2, seed=seed), Opened()).rows]
        for i, seed in enumerate((0, 0, 1))
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize("tied", [False, True])
def test_pushes_make_the_engine_learn_and_their_absence_does_not(tmp_path: Path, tied: bool) -> None:
    steps = 27 if tied else 24  # as many as it takes
    fresh: DemoResult = run_demo(_options(tmp_path / "fresh", steps=steps, tied=tied), Opened())
    assert fresh.random == pytest.approx(1 / 8, abs=0.02)
    assert fresh.end > fresh.start + 0.3
    assert fresh.trainer > fresh.start + 0.3, "the trainer's own figure is measured after the last step"
    if not tied:
        stale = run_demo(_options(tmp_path / "stale", steps=steps, push=False), Opened())
        assert stale.end < 0.2


def test_a_local_checkpoint_with_a_larger_vocabulary_gets_a_task_it_can_learn(tmp_path: Path) -> None:
    policy.save_policy(policy.tiny_qwen2(seed=9, vocab_size=320, hidden_size=32), tmp_path / "given")
    opened = Opened()
    result = run_demo(_options(tmp_path, model=tmp_path / "given", steps=2), opened)
    assert opened.checkpoint == tmp_path / "given"
    assert "divisible" in result.task
    assert not (tmp_path / "out" / "policy_at_start").exists()


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nowhere.*config\.json"):
        run_demo(_options(tmp_path, model=tmp_path / "nowhere"), Opened())


def test_a_missing_extra_says_what_to_type_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    opened = Opened()
    with pytest.raises(ConfigError, match=r"pip install 'weighbridge\[demo\]'"):
        run_demo(_options(tmp_path), opened)
    assert opened.bridge is None


def test_an_unhealthy_engine_at_the_end_shows_in_the_exit_code_and_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_demo(_options(tmp_path, steps=1), Opened(healthy=False))
    print_result(result)
    assert result.exit_code == 1
    assert "UNHEALTHY" in (text := capsys.readouterr().out)
    assert "actors alive: expected 1, got 0; none" in text


def test_the_bridge_is_closed_when_a_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: LocalBridge, named: Iterable[tuple[str, Tensor]]) -> Receipt:
        raise RuntimeError("no push today")

    monkeypatch.setattr(LocalBridge, "push", broken)
    opened = Opened()
    with pytest.raises(RuntimeError, match="no push today"):
        run_demo(_options(tmp_path), opened)
    assert opened.bridge is not None
    assert opened.bridge.closed


def test_progress_goes_to_stderr_and_the_result_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_demo(_options(tmp_path, quiet=False), Opened())
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "step 4" in shown.err
    print_result(result)
    assert "reward" in capsys.readouterr().out
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["schema_version"] == 1
    assert len(plain["rows"]) == 4


def test_the_live_table_shows_the_latest_steps(tmp_path: Path) -> None:
    from rich.console import Console

    with (tmp_path / "terminal").open("w") as file:
        console = Console(file=file, force_terminal=True, width=100)
        rows = run_demo(_options(tmp_path), Opened()).rows
        with report.LiveTable(console) as table:
            for row in rows:
                table.row(replace(row, verified="partial"))
    shown = (tmp_path / "terminal").read_text()
    assert "verified" in shown
    assert "partial" in shown
