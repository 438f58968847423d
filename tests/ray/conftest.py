"""One local Ray for the whole room, started by `weighbridge up` and ended by `weighbridge down`; a daemon per need."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import bridge
from bridge.cli import commands
from bridge.daemon import actors, ray_cluster
from tests.conftest import tiny_qwen2

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("trainer_worker.py")
AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True)
class Home:
    """Where everything of this room lives: its state folder, and with it its own Ray."""

    state: Path
    shm: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            **{k: v for k, v in os.environ.items() if k not in (*AUTH, "RAY_ADDRESS")},
            "PYTHONPATH": str(ROOT),
            "XDG_STATE_HOME": str(self.state),
            "WEIGHBRIDGE_SHM_DIR": str(self.shm),
            "WEIGHBRIDGE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }

    @property
    def ray(self) -> dict[str, Any]:
        """What we know of the Ray that was started: address, pid."""
        found: dict[str, Any] = json.loads((self.state / "weighbridge" / "_ray" / "ray.json").read_text())
        return found

    def cli(self, *args: str, code: int = 0, **changed: str) -> dict[str, Any]:
        """`weighbridge ARGS --json` as a user runs it, in a process of its own; its one JSON object."""
        done = subprocess.run(
            [sys.executable, "-m", "bridge", *args, "--json"],
            env={**self.environment, **changed}, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def files(self) -> list[str]:
        return sorted(os.listdir(self.shm))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, _own_shared_memory: None) -> Iterator[Home]:
    """The environment of the room; when it ends, whatever still runs is stopped and nothing may be left."""
    made = Home(tmp_path_factory.mktemp("home"), Path(os.environ["WEIGHBRIDGE_SHM_DIR"]))
    before = {name: os.environ.get(name) for name in (*AUTH, "XDG_STATE_HOME", "WEIGHBRIDGE_THREADS")}
    yield made
    os.environ["XDG_STATE_HOME"] = str(made.state)
    _stop_all()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _stop_all() -> None:
    import ray

    try:
        ray_cluster.ensure_ray(start=False)
    except bridge.NotFound:
        return
    for name in actors.running():
        actors.stop(name)
    ray.shutdown()
    ray_cluster.stop_ray()


@pytest.fixture(autouse=True)
def _own_state(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the whole suite's: every test here meets the same Ray."""
    monkeypatch.setenv("XDG_STATE_HOME", str(home.state))
    monkeypatch.setenv("WEIGHBRIDGE_THREADS", "1")


@pytest.fixture(scope="session")
def start_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint from which every engine of the room starts: `tiny_qwen2(seed=0)`."""
    folder = tmp_path_factory.mktemp("start")
    tiny_qwen2(seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run(home: Home, start_folder: Path) -> dict[str, Any]:
    """Daemon "run" with two engines, started by `weighbridge up` as a user does; its status."""
    return home.cli("up", "run", "--engine", f"embedded:{start_folder}", "--engines", "2")


@pytest.fixture
def connected(run: dict[str, Any]) -> Iterator[bridge.Bridge]:
    with bridge.connect("run") as b:
        yield b


class Trainer:
    """A trainer in a process of its own: `trainer_worker.py`. Its lines on stdout are JSON objects."""

    def __init__(self, home: Home, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), *args], env=home.environment, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        assert text, f"the trainer ended with {self.process.wait(10)} and said nothing"
        found: dict[str, Any] = json.loads(text)
        return found

    def killed(self) -> None:
        """Wait until it has died of SIGKILL."""
        assert self.process.wait(60) == -signal.SIGKILL

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)


@pytest.fixture
def trainer(home: Home) -> Iterator[Callable[..., Trainer]]:
    started: list[Trainer] = []

    def start(*args: str) -> Trainer:
        started.append(Trainer(home, *args))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        if each.process.stdout is not None:
            each.process.stdout.close()


def cli_here(*args: str, code: int = 0) -> dict[str, Any]:
    """`weighbridge ARGS --json` in this process, which is connected to the room's Ray, for steps on a test's way: most
    of what a process of its own does is import. Its one JSON object."""
    ray_cluster.ensure_ray()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert commands.main([*args, "--json"]) == code
    found: dict[str, Any] = json.loads(output.getvalue())
    return found


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Does it become true in time?"""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def gone(pid: int) -> bool:
    """No such process, or nothing but its exit code is left of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
