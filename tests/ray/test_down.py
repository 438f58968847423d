"""How a daemon ends: `weighbridge down`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.ray.conftest import Home, eventually, gone


@pytest.fixture
def alone(tmp_path: Path) -> Home:
    """A home whose Ray nothing else uses: it ends in the test."""
    home = Home(tmp_path, tmp_path / "shm")
    home.shm.mkdir()
    return home


def test_down_stops_what_up_started_and_nothing_else(alone: Home, start_folder: Path) -> None:
    home = alone
    run = home.cli("up", "run", "--engine", f"embedded:{start_folder}", "--engines", "2")
    head, address = home.ray["pid"], home.ray["address"]
    actors = [run["pid"], *(engine["pid"] for engine in run["engines"])]
    # somebody else's Ray, as seen from another home: `down` there stops the daemon, not Ray
    foreign = {
        "XDG_STATE_HOME": str(home.state / "elsewhere"),
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home.state / "weighbridge" / "_ray" / "token"),
    }
    home.cli("up", "guest", "--engine", f"embedded:{start_folder}", **foreign)
    assert home.cli("down", "guest", **foreign)["stopped"] is True
    assert not gone(head)
    children = [child.pid for child in psutil.Process(head).children(recursive=True)]
    assert len(children) >= 3
    assert home.cli("down", "run")["stopped"] is True
    assert eventually(lambda: gone(head))
    assert eventually(lambda: all(gone(pid) for pid in (*actors, *children)))
    assert home.files() == []
    assert not (home.state / "weighbridge" / "_ray" / "ray.json").exists()
    assert home.cli("status")["daemons"] == []
    home.cli("down", "run", code=2)


def test_down_leaves_ray_to_a_trainer_that_is_connected(alone: Home, start_folder: Path) -> None:
    """Ray ends a driver whose cluster has gone, and with it the training run."""
    alone.cli("up", "run", "--engine", f"embedded:{start_folder}")
    head = alone.ray["pid"]
    code = """
import bridge
b = bridge.connect("run")
print("connected", flush=True)
input()
try:
    b.rollback()
except bridge.PeerLost as error:
    print(type(error).__name__)
"""
    trainer = subprocess.Popen(
        [sys.executable, "-c", code], env=alone.environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "connected\n"
    assert alone.cli("down", "run")["stopped"] is True
    assert not gone(head)
    output, _ = trainer.communicate("\n", timeout=60)
    assert (trainer.returncode, output) == (0, "PeerLost\n")
    alone.cli("down", "run", code=2)
    assert eventually(lambda: gone(head))
