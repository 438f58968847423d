"""The examples, the README's loop and the demo as a user starts them: own processes, a real Ray, a few steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge.daemon import ray_cluster
from bridge.daemon.processes import started_at
from tests.documents import ROOT, Document

Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, _own_shared_memory: None) -> Iterator[dict[str, str]]:
    """One Ray for all of them, in a home of its own: from within, it is somebody else's and has to be left alone."""
    home = tmp_path_factory.mktemp("home")
    found = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "OMP_"))}
    found |= {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(home), "WEIGHBRIDGE_THREADS": "1"}
    code = "from bridge.daemon import ray_cluster; ray_cluster.ensure_ray()"
    subprocess.run([sys.executable, "-c", code], env=found, check=True, timeout=110)
    ray = json.loads((home / "weighbridge" / "_ray" / ray_cluster.RAY_FILE).read_text())
    token = home / "weighbridge" / "_ray" / "token"
    found["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("another-home"))
    yield {**found, "RAY_ADDRESS": ray["address"], "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    assert started_at(ray["pid"]) is not None, "one of them stopped a Ray that it had not started"
    found["XDG_STATE_HOME"] = str(home)
    code = "from bridge.daemon import ray_cluster; ray_cluster.stop_ray()"
    subprocess.run([sys.executable, "-c", code], env=found, check=True)
    assert started_at(ray["pid"]) is None


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Start:
    """Run `python ARGS` in `tmp_path`; no shared memory may be left."""
    shm = environment["WEIGHBRIDGE_SHM_DIR"]

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        before = set(os.listdir(shm))
        done = subprocess.run(
            [sys.executable, *args], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=110
        )
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        assert set(os.listdir(shm)) == before, "shared memory was left"
        return done

    return run


def steps(text: str) -> list[dict[str, str]]:
    """The examples' lines: "step N  name value  name value"."""
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    return [dict(re.findall(r"(\w+) ([\w.+-]+)", line)) for line in lines]


@pytest.mark.parametrize("script", ["grpo.py", "ppo.py", "grpo_adapter.py", "grpo_merged.py"])
def test_the_training_loops(start: Start, script: str) -> None:
    rows = steps(start(str(ROOT / "examples" / script), "--steps", "3").stdout)
    assert [(row["step"], row["version"], row["verified"]) for row in rows] == [
        (str(k), str(k), "True") for k in (1, 2, 3)
    ]
    assert all(0 <= float(row["reward"]) <= 1 for row in rows)
    assert len({row["reward"] for row in rows}) > 1
    modes = {"grpo_adapter.py": {"adapter"}, "grpo_merged.py": {"merged"}}
    assert {row["mode"] for row in rows if "mode" in row} == modes.get(script, set())


def test_the_attached_module(start: Start) -> None:
    text = start(str(ROOT / "examples" / "attach_module.py"), "--steps", "3").stdout
    assert [(row["version"], row["verified"]) for row in steps(text)] == [(str(k), "True") for k in (1, 2, 3)]
    apart = re.findall(r"apart ([\d.]+) before the push, ([\d.e+-]+) after", text)
    assert len(apart) == 3
    assert all(float(before) > 0.01 and float(after) == 0 for before, after in apart), apart


def test_the_loop_of_the_readme(start: Start, tmp_path: Path) -> None:
    blocks = [block.code for block in Document(ROOT / "README.md").blocks if block.language == "python"]
    (loop,) = [code for code in blocks if "for step in" in code]
    assert loop.count("/tmp/policy") == 2, "the only place that the example writes to"
    lines = start("-c", loop.replace("/tmp/policy", str(tmp_path / "policy"))).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["1", "True"], ["2", "True"], ["3", "True"]]
    assert all(line.endswith(" s paused") for line in lines)


def test_the_demo(start: Start, environment: dict[str, str], tmp_path: Path) -> None:
    done = start("-m", "bridge", "demo", "--steps", "3", "--out", "out", "--json")
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["healthy"] is True
    assert [row["version"] for row in result["rows"]] == [0, 1, 2], "rollouts come from the version before the push"
    assert all(row["verified"] is True and row["drift"] < 0.002 for row in result["rows"])
    receipts = [json.loads(line) for line in (tmp_path / "out" / "receipts.jsonl").read_text().splitlines()]
    assert [receipt["version"] for receipt in receipts] == [1, 2, 3]
    assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000
    assert "step 3" in done.stderr
    left = [path.name for path in (Path(environment["XDG_STATE_HOME"]) / "weighbridge").glob("demo-*")]
    assert left == [], "the demo leaves no journal behind"
