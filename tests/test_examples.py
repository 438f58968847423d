"""The examples and the demo as a user starts them: processes of their own, a real Ray, a few steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Run `python ARGS` with a home of its own, and with it a Ray of its own; nothing may be left of either."""
    home, shm = tmp_path / "home", Path(os.environ["WEIGHBRIDGE_SHM_DIR"])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "OMP_"))}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(home), "WEIGHBRIDGE_THREADS": "1"}

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        before = set(os.listdir(shm))
        done = subprocess.run(
            [sys.executable, *args], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=110
        )
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        assert set(os.listdir(shm)) == before, "shared memory was left"
        assert not (home / "weighbridge" / "_ray" / "ray.json").exists(), "a Ray was left running"
        return done

    return run


def steps(text: str) -> list[dict[str, str]]:
    """The examples' lines: "step N  name value  name value"."""
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    return [dict(re.findall(r"(\w+) ([\w.+-]+)", line)) for line in lines]


@pytest.mark.parametrize("script", ["grpo.py", "ppo.py"])
def test_the_training_loops(start: Start, script: str) -> None:
    rows = steps(start(str(ROOT / "examples" / script), "--steps", "4").stdout)
    assert [(row["step"], row["version"], row["verified"]) for row in rows] == [
        (str(k), str(k), "True") for k in (1, 2, 3, 4)
    ]
    assert all(0 <= float(row["reward"]) <= 1 for row in rows)
    assert len({row["reward"] for row in rows}) > 1


def test_the_attached_module(start: Start) -> None:
    rows = steps(start(str(ROOT / "examples" / "attach_module.py"), "--steps", "3").stdout)
    assert [(row["version"], row["verified"]) for row in rows] == [("1", "True"), ("2", "True"), ("3", "True")]
    apart = [float(row["apart"]) for row in rows]
    assert min(apart) > 0.01, "the copy is behind before each push"
    assert all(float(row["push"].rstrip(",")) == 0 for row in rows if "push" in row)


def test_the_demo(start: Start, tmp_path: Path) -> None:
    done = start("-m", "bridge", "demo", "--steps", "3", "--out", "out", "--json")
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["healthy"] is True
    assert [row["version"] for row in result["rows"]] == [0, 1, 2], "rollouts come from the version before the push"
    assert all(row["verified"] is True and row["drift"] < 0.002 for row in result["rows"])
    receipts = [json.loads(line) for line in (tmp_path / "out" / "receipts.jsonl").read_text().splitlines()]
    assert [receipt["version"] for receipt in receipts] == [1, 2, 3]
    assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000
    assert "step 3" in done.stderr
    left = sorted(path.name for path in (tmp_path / "home" / "weighbridge").iterdir())
    assert left == ["_ray"], "the demo leaves no daemon's folder behind"
