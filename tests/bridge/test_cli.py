"""The command line against a recording Bridge: what is called, what is printed where, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from bridge import errors
from bridge.cli import commands
from bridge.coordinator.health import Check, HealthReport
from bridge.model.receipt import CanaryResult, EngineReport, Receipt
from bridge.protocol.coordinator_messages import DaemonStatus, EngineInfo

ENGINE = EngineInfo("engine0", "embedded", 2, True, "SERVING", 7, "host[1]", 4242)
DAEMON = DaemonStatus("run1", (ENGINE,), 7, 9, "host[1]", 4241)
REPORT = EngineReport("engine0", "SERVING", 7, canary=CanaryResult(0.01, 0.05, 0.0, 0.05, 64), pause_s=0.25)
RECEIPT = Receipt(
    7, 6, "full", "asked for", 3, 3 << 20, 1 << 20, {"plan": 0.001, "snapshot": 0.5, "load": 0.25}, 0.25, (REPORT,),
    "weights", True, at=1.7e9, notes=("a note",),
)  # fmt: skip
GOOD = Check("engine0 version", True, "SERVING, version 7", "SERVING, version 7")
BLIND = Check("engine0 canary", True, "a fresh canary", "no stored reference", "bind the model", degraded=True)
BAD = Check("engine0 rank 0 read-back: lm_head.weight", False, "the arena's bytes", "3 bytes differ", "push again")


@dataclass
class FakeBridge:
    """Keeps what it was asked; raises `error` from every call when there is one."""

    calls: list[tuple[str, Any]] = field(default_factory=list)
    checks: tuple[Check, ...] = (GOOD,)
    error: BaseException | None = None

    def _called(self, name: str, what: Any = None) -> None:
        self.calls.append((name, what))
        if self.error is not None:
            raise self.error

    def push(self, named: Iterable[tuple[str, torch.Tensor]], **options: Any) -> Receipt:
        self._called("push", (list(named), options))
        return RECEIPT

    def health(self, timeout_s: float) -> HealthReport:
        self._called("health", timeout_s)
        return HealthReport("run1", self.checks)

    def status(self) -> DaemonStatus:
        self._called("status")
        return DAEMON

    def history(self, last: int) -> list[dict[str, Any]]:
        self._called("history", last)
        return [RECEIPT.to_dict()]

    def explain(self, name: str) -> list[dict[str, str]]:
        self._called("explain", name)
        return [{"engine": "engine0", "rank": "0", "strategy": "in place [bold]"}]

    def __enter__(self) -> FakeBridge:
        return self

    def __exit__(self, *exc: object) -> None:
        self.calls.append(("close", None))


@dataclass
class FakeBackend(commands.Backend):
    made: FakeBridge = field(default_factory=FakeBridge)
    names: list[str] = field(default_factory=lambda: ["run1"])
    launched: list[tuple[Any, ...]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    demos: list[Any] = field(default_factory=list)
    healthy: bool = True

    def launch(self, engine: str, name: str, engines: int, arguments: Mapping[str, Any]) -> Any:
        self.launched.append((engine, name, engines, dict(arguments)))
        return self.made

    def connect(self, name: str) -> Any:
        if name not in self.names:
            raise errors.NotFound("no daemon of that name", where=name, expected="run1", remedy="weighbridge up")
        return self.made

    def running(self) -> list[str]:
        return self.names

    def stop(self, name: str) -> None:
        self.stopped.append(name)

    def named_tensors(self, folder: Path) -> Iterable[tuple[str, torch.Tensor]]:
        return iter([("a", torch.zeros(2))])

    def demo(self) -> Any:
        def run_demo(options: Any) -> Any:
            self.demos.append(options)
            print("something that another library prints")
            code = 0 if self.healthy else 1
            return SimpleNamespace(exit_code=code, to_dict=lambda: {"schema_version": 1, "end": 0.75})

        return SimpleNamespace(
            DemoOptions=lambda **given: given, run_demo=run_demo, print_result=lambda result: print("end 0.75")
        )

    def bench(self) -> Any:
        from bridge.bench import copy_bench

        return SimpleNamespace(BenchOptions=copy_bench.BenchOptions, run_bench=lambda options, progress: BENCH)


BENCH: dict[str, Any] = {
    "machine": {"cpu": "a cpu", "cores": 2, "python": "3.11", "torch": "2.13"},
    "settings": {"tunables": "GLIBC_TUNABLES=x"},
    "results": [
        {
            "shapes": "many-small", "engine": "module", "threads": 1, "tensors": 18000, "nbytes": 18 << 20,
            "reference": {"median_s": 0.01, "p90_s": 0.011, "gb_per_s": 1.8, "spread": 0.5},
            "variants": {
                "off": {"median_s": 0.1, "p90_s": 0.2, "gb_per_s": 0.18, "ratio": 0.1, "target": 0.2, "pause_s": 0.01}
            },
            "first": {"seconds": 3.0}, "unchanged": {"median_s": 0.05}, "noisy": True, "others": 0.4,
            "memory": {"first_extra_nbytes": 9 << 20, "extra_nbytes": 2 << 20, "extra_of_version": 2.0},
            "per_tensor": {"off": {"us_per_tensor": 5.5, "fixed_ms": 1.5}},
        }
    ],
}  # fmt: skip

COMMANDS: dict[str, list[str]] = {
    "up": ["run1", "--engine", "embedded:/nowhere"],
    "down": ["run1"],
    "push": ["run1", "folder"],
    "health": ["run1"],
    "status": ["run1"],
    "history": ["run1"],
    "explain": ["run1", "model.norm.weight"],
    "demo": [],
    "bench": [],
}


def test_every_command_is_covered_by_these_tests() -> None:
    assert set(commands.cli.commands) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_object_with_a_schema_version_and_nothing_else(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main([command, *COMMANDS[command], "--json"], FakeBackend()) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out)["schema_version"] == commands.SCHEMA_VERSION
    assert json.loads(out)["command"] == command


@pytest.mark.parametrize("command", COMMANDS)
def test_people_get_text_on_stdout(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main([command, *COMMANDS[command]], FakeBackend()) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_flag_is_a_usage_error(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    backend = FakeBackend()
    assert commands.main([command, *COMMANDS[command], "--verfiy"], backend) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--verfiy" in err
    assert backend.made.calls == []


def test_a_usage_error_is_data_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["health", "--json"], FakeBackend()) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["name"], error["exit_code"]) == ("UsageError", 2)
    assert "NAME" in error["what"]


EVERY = sorted(set(errors.ERRORS_BY_NAME.values()), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_the_exit_code_comes_from_the_error_class(
    cls: type[errors.BridgeError], capsys: pytest.CaptureFixture[str]
) -> None:
    error = cls("it broke", where="here", expected="this", got="that", remedy="mend it", names=("a", "b"))
    backend = FakeBackend(FakeBridge(error=error))
    assert commands.main(["push", "run1", "folder"], backend) == cls.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    wanted = ["it broke", "where     here", "expected  this", "got       that", "remedy    mend it", cls.__name__]
    assert [word for word in wanted if word not in err] == []
    assert backend.made.calls[-1] == ("close", None)

    assert commands.main(["push", "run1", "folder", "--json"], backend) == cls.exit_code
    facts = json.loads(capsys.readouterr().out)["error"]
    expected = {"name": cls.__name__, "what": "it broke", "where": "here", "expected": "this", "got": "that",
                "remedy": "mend it", "names": ["a", "b"], "exit_code": cls.exit_code}  # fmt: skip
    assert {key: facts[key] for key in expected} == expected


def test_help_lists_every_error_class_with_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed: dict[str, int] = {}
    code = -1
    for line in lines[lines.index("  Exit codes:") + 1 :]:
        head, _, text = line.strip().partition("  ")
        code, text = (int(head), text) if head.isdigit() else (code, line.strip())
        listed |= {name.strip(): code for name in text.split(",") if name.strip()}
    for cls in EVERY:
        if cls is not errors.BridgeError:
            assert listed[cls.__name__] == cls.exit_code
    assert {listed["a bug of weighbridge"], listed["interrupted"]} == {70, 130}


def test_an_aborted_push_shows_what_is_served_and_the_receipt(capsys: pytest.CaptureFixture[str]) -> None:
    error = errors.PushAborted("aborted", receipt=RECEIPT, serving={"engine0": 6})
    assert commands.main(["push", "run1", "folder", "--json"], FakeBackend(FakeBridge(error=error))) == 7
    facts = json.loads(capsys.readouterr().out)["error"]
    assert facts["serving"] == {"engine0": 6}
    assert facts["receipt"]["version"] == 7


@pytest.mark.parametrize("as_json", [True, False])
def test_anything_else_is_a_bug_with_its_traceback(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    backend = FakeBackend(FakeBridge(error=ZeroDivisionError("by nought")))
    assert commands.main(["status", "run1", *(["--json"] if as_json else [])], backend) == 70
    out, err = capsys.readouterr()
    assert "by nought" in err
    assert "Traceback" in err
    assert "bug" in err
    if as_json:
        assert json.loads(out)["error"]["exit_code"] == 70
    else:
        assert out == ""


def test_an_interrupt_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["status", "run1"], FakeBackend(FakeBridge(error=KeyboardInterrupt()))) == 130


@pytest.mark.parametrize(
    ("checks", "code", "status", "mark"),
    [
        ((GOOD,), 0, "healthy", "ok"),
        ((GOOD, BLIND), 0, "degraded", "warn"),
        ((GOOD, BLIND, BAD), 1, "unhealthy", "FAIL"),
    ],
)
def test_health(
    checks: tuple[Check, ...], code: int, status: str, mark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = FakeBackend(FakeBridge(checks=checks))
    assert commands.main(["health", "run1", "--timeout", "5"], backend) == code
    assert backend.made.calls == [("health", 5.0), ("close", None)]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(checks) + 1
    last = checks[-1]
    line = lines[-2]
    assert line.startswith(mark)
    assert [text for text in (last.name, last.expected, last.got, last.remedy) if text not in line] == []
    assert lines[-1] == f"run1 is {status}"

    assert commands.main(["health", "run1", "--json"], backend) == code
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == status
    assert [check["name"] for check in report["checks"]] == [check.name for check in checks]


def test_push_sends_the_folder_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    backend = FakeBackend()
    line = ["push", "run1", "f", "--verify", "transfer", "--partial", "--version", "7", "--timeout", "30"]
    assert commands.main(line, backend) == 0
    (name, (named, options)), closed = backend.made.calls
    assert name == "push"
    assert [each[0] for each in named] == ["a"]
    assert options == {
        "version": 7, "verify": "transfer", "partial": True, "allow_nonfinite": False, "timeout_s": 30.0
    }  # fmt: skip
    assert closed == ("close", None)
    out = capsys.readouterr().out
    assert "version 7" in out
    assert "engine0: SERVING" in out
    assert "a note" in out


@pytest.mark.parametrize("given", [["--verify", "all"], ["--version", "-1"], ["--timeout", "0"]])
def test_push_refuses_what_does_not_fit(given: list[str]) -> None:
    backend = FakeBackend()
    assert commands.main(["push", "run1", "f", *given], backend) == 2
    assert backend.made.calls == []


def test_up_hands_the_engine_arguments_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    backend = FakeBackend()
    line = ["up", "run1", "--engine", "embedded:model", "--engines", "2", "--tp", "2", "--layout", "packed"]
    line += ["--set", "max_num_seqs=8", "--set", "wrap_linears=true", "--set", "load=dummy"]
    line += ["--set", "max_loras=3", "--set", 'lora_targets=["q_proj"]']
    assert commands.main(line, backend) == 0
    arguments = {
        "tensor_parallel_size": 2, "layout": "packed", "max_num_seqs": 8, "wrap_linears": True, "load": "dummy",
        "max_loras": 3, "lora_targets": ["q_proj"],
    }  # fmt: skip
    assert backend.launched == [(f"embedded:{tmp_path / 'model'}", "run1", 2, arguments)]
    assert backend.made.calls[-1] == ("close", None)


@pytest.mark.parametrize("given", [["--set", "novalue"], ["--set", "a=1", "--set", "a=2"]])
def test_up_refuses_settings_that_are_none(given: list[str]) -> None:
    backend = FakeBackend()
    assert commands.main(["up", "run1", "--engine", "embedded:x", *given], backend) == 2
    assert backend.launched == []


def test_down_stops_that_daemon() -> None:
    backend = FakeBackend()
    assert commands.main(["down", "run1"], backend) == 0
    assert backend.stopped == ["run1"]


def test_status_without_a_name_lists_daemons_also_one_that_does_not_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    backend = FakeBackend(FakeBridge(error=errors.PeerLost("an actor is gone", where="run1:trainer")))
    assert commands.main(["status", "--json"], backend) == 0
    assert json.loads(capsys.readouterr().out)["daemons"] == [
        {"name": "run1", "error": "an actor is gone; where: run1:trainer"}
    ]
    backend.made.error = None
    assert commands.main(["status", "--json"], backend) == 0
    assert json.loads(capsys.readouterr().out)["daemons"][0]["engines"][0]["serving"] == 7
    backend.names = []
    assert commands.main(["status"], backend) == 0
    assert "no daemon runs" in capsys.readouterr().out


# An adapter of version 9 over weights of version 7.
LORA_ENGINE = msgspec.structs.replace(ENGINE, serving=9, adapter="run1-v9")
LORA_DAEMON = msgspec.structs.replace(
    DAEMON, engines=(LORA_ENGINE,), committed=9, mode="adapter", weights=7, adapter=9
)  # fmt: skip
LORA_RECEIPT = msgspec.structs.replace(
    RECEIPT, version=9, previous=7, mode="adapter", engines=(msgspec.structs.replace(REPORT, adapter="run1-v9"),)
)


class LoraBridge(FakeBridge):
    def status(self) -> DaemonStatus:
        return LORA_DAEMON

    def history(self, last: int) -> list[dict[str, Any]]:
        return [RECEIPT.to_dict(), LORA_RECEIPT.to_dict()]

    def push(self, named: Iterable[tuple[str, torch.Tensor]], **options: Any) -> Receipt:
        return LORA_RECEIPT


def test_status_tells_which_adapter_lies_over_which_weights(capsys: pytest.CaptureFixture[str]) -> None:
    backend = FakeBackend(LoraBridge())
    assert commands.main(["status", "run1"], backend) == 0
    first, *table = capsys.readouterr().out.splitlines()
    assert "version 9: the adapter of version 9 over the weights of version 7" in first
    assert any("engine0" in line and "run1-v9" in line for line in table)
    assert commands.main(["status", "run1", "--json"], backend) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["committed"], found["mode"], found["weights"], found["adapter"]) == (9, "adapter", 7, 9)
    assert found["engines"][0]["adapter"] == "run1-v9"
    assert commands.main(["status"], backend) == 0
    assert "adapter" in capsys.readouterr().out


def test_history_and_push_tell_mode_and_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    backend = FakeBackend(LoraBridge())
    assert commands.main(["history", "run1"], backend) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "yes" in line]
    assert [[word in row.split() for word in ("full", "adapter", "run1-v9")] for row in rows] == [
        [True, False, False],
        [False, True, True],
    ]
    assert commands.main(["history", "run1", "--json"], backend) == 0
    plain = json.loads(capsys.readouterr().out)["receipts"][1]
    assert (plain["mode"], plain["engines"][0]["adapter"]) == ("adapter", "run1-v9")
    assert commands.main(["push", "run1", "folder"], backend) == 0
    out = capsys.readouterr().out
    assert "version 9 (mode adapter)" in out
    assert "adapter run1-v9" in out


def test_a_name_nobody_launched(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("push", "health", "status", "history", "explain"):
        line = [command, "other", *COMMANDS[command][1:]]
        assert commands.main(line, FakeBackend()) == 2
        assert "other" in capsys.readouterr().err


def test_names_from_outside_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["explain", "run1", "[red]a[/nope]"], FakeBackend()) == 0
    out = capsys.readouterr().out
    assert "[red]a[/nope]" in out
    assert "in place [bold]" in out


def test_the_demo_gets_its_options_and_gives_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    backend = FakeBackend(healthy=False)
    line = ["demo", "--steps", "4", "--tied", "--no-push", "--out", "o", "--model", "m", "--layout", "packed"]
    assert commands.main(line, backend) == 1
    assert backend.demos == [
        {"steps": 4, "tied": True, "push": False, "out_dir": Path("o"), "model": Path("m"), "layout": "packed",
         "quiet": False}
    ]  # fmt: skip
    assert commands.main(["demo"], backend) == 1
    assert backend.demos[1] == {"push": True, "quiet": False}, "the demo's own defaults hold"


def test_the_demo_options_exist() -> None:
    from trainer_side.demo.run import DemoOptions, print_result, run_demo

    DemoOptions(model=None, steps=1, seed=1, tied=True, push=False, out_dir=Path("o"), layout="canonical", quiet=True)
    assert callable(run_demo)
    assert callable(print_result)


def test_help_is_quick_and_loads_no_torch() -> None:
    code = "import sys; from bridge.cli.commands import main; main(['health', '--help']); "
    code += "print([m for m in ('torch', 'ray', 'rich', 'msgspec', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_dash_m_bridge() -> None:
    done = subprocess.run([sys.executable, "-m", "bridge", "nonsense"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "nonsense" in done.stderr
