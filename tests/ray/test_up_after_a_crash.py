"""`up` and `down` over what a killed daemon left, errors of the actors' constructors, and Rays that come too late."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bridge
from bridge.daemon import actors
from bridge.journal.ledger import Ledger
from bridge.journal.state_dir import state_dir
from engine_side.engines.registry import host
from tests.conftest import perturb, tiny_qwen2
from tests.ray.conftest import ROOT, Home, cli_here, eventually, gone
from tests.ray.test_daemon import serves

Up = Callable[..., dict[str, Any]]


@pytest.fixture
def up(home: Home, run: dict[str, Any], start_folder: Path) -> Iterator[Up]:
    """`up(name, ...)` starts a daemon of the test's own; nothing of it may be left in the end."""
    names: list[str] = []
    before = home.files()

    def start(name: str, engines: int = 1, code: int = 0, **changed: str) -> dict[str, Any]:
        names.append(name)
        command = ("up", name, "--engine", f"embedded:{start_folder}", "--engines", str(engines))
        return home.cli(*command, code=code, **changed) if changed else cli_here(*command, code=code)

    yield start
    for name in set(names) & set(actors.running()):
        cli_here("down", name)
    from ray.util import list_named_actors

    assert not [actor for actor in list_named_actors(all_namespaces=True) if actor["name"].split(":")[0] in names]
    assert home.files() == before


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: all(gone(pid) for pid in pids))


def pushed(name: str, seed: int) -> int:
    """Push a step of the model, look at what the engines serve, and answer its version."""
    model = tiny_qwen2(seed=0)
    perturb(model, seed=seed)
    with bridge.connect(name, model=model) as b:
        version = b.push(model.named_parameters()).version
        serves(b, version, model)
        assert b.health().healthy
    return version


# ---- remains of a crash ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [0, 1], ids=["coordinator", "coordinator and an engine"])
def test_up_over_a_killed_daemon(up: Up, home: Home, lost: int) -> None:
    before = home.files()
    first = up("crash", engines=2)
    version = pushed("crash", seed=1)
    engines = [engine["pid"] for engine in first["engines"]]
    kill(first["pid"], *engines[:lost])
    assert len(home.files()) == len(before) + 2, "arena and mailbox are still there"
    second = up("crash", engines=2)
    assert [engine["state"] for engine in second["engines"]] == ["SERVING"] * 2
    assert not {second["pid"], *(engine["pid"] for engine in second["engines"])} & {first["pid"], *engines}
    assert eventually(lambda: all(gone(pid) for pid in engines))
    assert len(home.files()) == len(before) + 1, "the new mailbox alone"
    assert pushed("crash", seed=2) == version + 1, "the journal goes on"


def test_up_at_once_after_the_kill(up: Up, start_folder: Path) -> None:
    """Ray may not have noticed yet: the actor still has its name."""
    first = up("crash")
    os.kill(first["pid"], signal.SIGKILL)
    made = bridge.launch(f"embedded:{start_folder}", name="crash")
    assert made.status().pid != first["pid"]
    made.shutdown()


@pytest.mark.parametrize("command", ["status", "down"])
def test_a_command_at_once_after_the_kill(up: Up, home: Home, command: str) -> None:
    """Ray may not have noticed yet: the actor still has its name."""
    before = home.files()
    first = up("crash")
    pushed("crash", seed=1)
    os.kill(first["pid"], signal.SIGKILL)
    if command == "status":
        error = cli_here("status", "crash", code=2)["error"]
        assert (error["name"], error["got"]) == ("NotFound", "only what a crashed daemon left: crash:engine0")
    assert cli_here("down", "crash")["stopped"] is True
    assert eventually(lambda: all(gone(engine["pid"]) for engine in first["engines"]))
    assert home.files() == before


def test_down_over_a_killed_daemon(up: Up, home: Home) -> None:
    before = home.files()
    first = up("crash")
    pushed("crash", seed=1)
    kill(first["pid"])
    error = cli_here("status", "crash", code=2)["error"]
    assert error["name"] == "NotFound"
    assert "crash:engine0" in error["got"]
    with (state_dir("crash") / "start.lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a daemon that is being started has engines and no coordinator either
        for command in (lambda: up("crash", code=2), lambda: cli_here("down", "crash", code=2)):
            error = command()["error"]
            assert error["name"] == "Busy"
            assert "is starting a daemon" in error["what"]
    assert not any(gone(engine["pid"]) for engine in first["engines"])
    assert cli_here("down", "crash")["stopped"] is True
    assert eventually(lambda: all(gone(engine["pid"]) for engine in first["engines"]))
    assert home.files() == before
    cli_here("down", "crash", code=2)


def test_up_over_a_daemon_that_lost_an_engine(up: Up) -> None:
    """It runs: whoever wants its name is told so, and `down` makes way."""
    first = up("crash", engines=2)
    version = pushed("crash", seed=1)
    kill(first["engines"][1]["pid"])
    error = up("crash", code=2)["error"]
    assert (error["name"], error["where"]) == ("Busy", "crash")
    assert "weighbridge down crash" in error["remedy"]
    assert not gone(first["pid"])
    assert not gone(first["engines"][0]["pid"])
    cli_here("down", "crash")
    assert [engine["state"] for engine in up("crash")["engines"]] == ["SERVING"]
    assert pushed("crash", seed=2) == version + 1


# ---- errors of the actors' constructors ------------------------------------------------------------------------------


def test_an_error_of_the_coordinators_start_reaches_the_caller(up: Up, home: Home, run: dict[str, Any]) -> None:
    ledger = Ledger.open("taken")  # somebody else has the journal open
    try:
        error = up("taken", code=2)["error"]
    finally:
        ledger.close()
    assert (error["name"], error["where"]) == ("Busy", str(ledger.path))
    assert "another daemon has this journal open" in error["what"]
    assert "choose another name" in error["remedy"]
    assert "taken" not in actors.running()


def test_an_error_of_an_engines_start_reaches_the_caller(up: Up, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(bridge.BridgeError) as expected:
        host(f"embedded:{empty}", {})
    error = cli_here("up", "broken", "--engine", f"embedded:{empty}", code=expected.value.exit_code)["error"]
    assert error["name"] == type(expected.value).__name__
    assert (error["what"], error["where"]) == (expected.value.what, expected.value.where)
    assert error["remedy"] == expected.value.remedy


def test_the_start_of_engines_has_a_deadline_of_its_own(up: Up, home: Home) -> None:
    error = up("late", code=3, WEIGHBRIDGE_START_TIMEOUT_S="0.5")["error"]
    assert error["name"] == "DeadlineExceeded"
    assert "WEIGHBRIDGE_START_TIMEOUT_S" in error["remedy"]
    assert up("late", code=2, WEIGHBRIDGE_START_TIMEOUT_S="soon")["error"]["name"] == "ConfigError"


# ---- Ray itself ------------------------------------------------------------------------------------------------------


def python(code: str, state: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, whose Ray is another one."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=110,
        env={**inherited, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(state), **environment},
    )  # fmt: skip


def processes(port: str) -> list[int]:
    """Processes that have this port in their command line."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and port in Path(f"/proc/{entry}/cmdline").read_text():
                found.append(int(entry))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [pid for pid in found if not gone(pid)]


def test_a_ray_that_is_not_ready_in_time_is_ended(tmp_path: Path) -> None:
    code = """
import json, sys
import bridge
from bridge.daemon import ray_cluster
ray_cluster.RAY_START_TIMEOUT_S = 0.3
try:
    ray_cluster.ensure_ray()
except bridge.TransportError as error:
    print(json.dumps([error.where, error.got, error.remedy]))
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    where, got, remedy = json.loads(done.stdout.splitlines()[-1])
    assert (got, remedy) == ("it was not ready in time", f"read {tmp_path}/weighbridge/_ray/ray.log")
    assert not (tmp_path / "weighbridge" / "_ray" / "ray.json").exists()
    assert eventually(lambda: processes(f"--port={where.rpartition(':')[2]}") == [])
    time.sleep(1.0)
    assert processes(where.rpartition(":")[2]) == [], "nothing that it started comes up later"


def test_a_ray_whose_starter_was_killed_is_found_by_the_next(tmp_path: Path, start_folder: Path) -> None:
    """It was recorded before it was ready: the next `up` waits for it, and `down` ends it."""
    code = """
import os, signal
from bridge.daemon import ray_cluster
ray_cluster._authenticate()
ray_cluster._start_ray()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(code, tmp_path).returncode == -signal.SIGKILL
    head = json.loads((tmp_path / "weighbridge" / "_ray" / "ray.json").read_text())
    assert not gone(head["pid"])
    shm = tmp_path / "shm"
    shm.mkdir()
    home = Home(tmp_path, shm)
    home.cli("up", "late", "--engine", f"embedded:{start_folder}")
    assert home.ray["pid"] == head["pid"]
    assert home.cli("down", "late")["stopped"] is True
    assert eventually(lambda: gone(head["pid"]))


def test_a_ray_that_cannot_start_says_where_to_look(tmp_path: Path) -> None:
    code = """
import json
import bridge
from bridge.daemon import ray_cluster
try:
    ray_cluster.ensure_ray()
except bridge.TransportError as error:
    print(json.dumps([error.got, error.remedy]))
"""
    done = python(code, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH="/no/such")
    assert done.returncode == 0, done.stderr
    got, remedy = json.loads(done.stdout.splitlines()[-1])
    assert got == "its head process ended"
    assert remedy == f"read {tmp_path}/weighbridge/_ray/ray.log"
    assert not (tmp_path / "weighbridge" / "_ray" / "ray.json").exists()


# ---- forked children of a trainer ------------------------------------------------------------------------------------


def test_a_forked_child_of_a_connected_trainer_owns_nothing(up: Up, home: Home) -> None:
    """By multiprocessing, whose children end without exit hooks: Ray's own hook waits without end in a forked child."""
    up("forked")
    code = """
import json, multiprocessing, time
import bridge
from tests.conftest import tiny_qwen2
model = tiny_qwen2(seed=0)
b = bridge.connect("forked", model=model)
b.push(model.named_parameters())

def child(answers):
    calls = (lambda: b.push(model.named_parameters()), b.rollback, b.health,
             lambda: b.engines[0].generate([[1, 2, 3]]), lambda: bridge.connect("forked"))
    for call in calls:
        try:
            call()
        except bridge.ConfigError as error:
            answers.send(type(error).__name__)
    b.shutdown()

context = multiprocessing.get_context("fork")
read, write = context.Pipe()
process = context.Process(target=child, args=(write,))
began = time.monotonic()
process.start()
process.join(60)
took = time.monotonic() - began
said = [read.recv() for _ in range(5) if read.poll(0)]
version = b.push(model.named_parameters()).version
print(json.dumps([process.exitcode, took, said, version]))
b.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=home.environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    exitcode, took, said, version = json.loads(done.stdout.splitlines()[-1])
    assert said == ["Closed"] * 4 + ["ConfigError"]
    assert (exitcode, version) == (0, 2)
    assert took < 10
