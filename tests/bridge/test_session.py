"""What holds a Bridge alive and what its end leaves: forked children, Bridges that are dropped, ends of the process."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge.errors import TransportError
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from tests.conftest import tiny_qwen2, unlinked_and_held

WORKER = Path(__file__).with_name("fork_worker.py")
ROOT = Path(__file__).parents[2]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


# ---- forked children -------------------------------------------------------------------------------------------------


ENDS = ("fork:exits", "fork:closes", "fork:drops", "multiprocessing:exits", "fork:calls")
FORKED = {
    "module": (*ENDS, "fork:shuts_down", "multiprocessing:shuts_down", "multiprocessing:drops", "fork:opens_its_own"),
    "1": ENDS,
    "2": ENDS,
}
"""Engine (an attached module, or so many ranks) -> what children do, by which kind of fork."""


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]) -> dict[str, dict[str, Any]]:
    """What `fork_worker.py` found for every engine, in one process."""
    folder = tmp_path_factory.mktemp("shm")
    state = str(tmp_path_factory.mktemp("state"))
    places = {
        "WEIGHBRIDGE_SHM_DIR": str(folder),
        "XDG_STATE_HOME": state,
        "TMPDIR": str(tmp_path_factory.mktemp("tmp")),
    }
    environment = {**os.environ, **places, "PYTHONPATH": str(ROOT)}
    wanted = [f"{engine}:{child}" for engine, children in FORKED.items() for child in children]
    command = [sys.executable, str(WORKER), str(checkpoint(tiny_qwen2())), *wanted]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def refused(said: dict[str, dict[str, Any]]) -> None:
    """Every call of a child raised Closed, at once, with a way out."""
    for call, answer in said.items():
        assert answer["raised"] == "Closed", (call, answer)
        assert "a child opens a Bridge of its own" in answer["remedy"]
        assert answer["took_s"] < 1, (call, answer)


@pytest.mark.parametrize("engine", FORKED)
def test_a_forked_child_owns_nothing(forked: dict[str, dict[str, Any]], engine: str) -> None:
    """The parent keeps everything and pushes again, whatever a child did; it leaves nothing when it closes."""
    facts = forked[engine]
    assert facts["left"] == []
    assert sorted(facts["children"]) == sorted(FORKED[engine])
    for child, found in facts["children"].items():
        kept = (found["code"], found["kept"], found["verified"], found["healthy"])
        assert kept == (0, True, True, True), (child, found)
        assert found["took_s"] < 5, (child, found)
    said = {child: found["said"] for child, found in facts["children"].items()}
    assert said["fork:closes"]["after"]["raised"] == "Closed"
    refused(said["fork:calls"])


def test_a_forked_child_may_open_a_bridge_of_its_own(forked: dict[str, dict[str, Any]]) -> None:
    assert forked["module"]["children"]["fork:opens_its_own"]["said"] == {"verified": True, "same": True}


# ---- Bridges that are dropped ----------------------------------------------------------------------------------------


@pytest.fixture
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this test's own for shared memory."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setenv("WEIGHBRIDGE_SHM_DIR", str(folder))
    return folder


def test_a_bridge_that_is_dropped_lets_go_of_everything(shm: Path) -> None:
    model, live = net(), net()
    b = bridge.attach(live, name="dropped")
    b.push(model.named_parameters())
    assert len(os.listdir(shm)) == 2
    seen = [weakref.ref(each) for each in (b, live, model)]
    del b
    gc.collect()
    assert os.listdir(shm) == []
    assert not any(thread.name.startswith("weighbridge-release") for thread in threading.enumerate())
    # the name, its lease and the engine are free again, and the engine is as it was pushed
    with bridge.attach(live, name="dropped") as again:
        assert torch.equal(live[1].bias, model[1].bias)
        assert again.push(model.named_parameters()).version == 2
    del again, model, live
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3


@pytest.mark.parametrize("kind", ["module", "embedded"])
def test_an_engine_that_runs_on_keeps_no_file_of_a_bridge_that_closed(
    shm: Path, checkpoint: Callable[..., Path], kind: str
) -> None:
    """One that is open keeps its memory, name or not."""
    model = net() if kind == "module" else tiny_qwen2()
    live = net() if kind == "module" else Engine(EngineConfig(str(checkpoint(model))))
    for _ in range(2):
        with bridge.attach(live) as b:
            assert b.push(model.named_parameters()).verified is True
        assert (os.listdir(shm), unlinked_and_held(shm)) == ([], [])
    if isinstance(live, Engine):
        live.close()


def test_an_engine_of_a_bridge_that_was_dropped_can_be_collected(shm: Path, checkpoint: Callable[..., Path]) -> None:
    model = tiny_qwen2()
    engine = Engine(EngineConfig(str(checkpoint(model))))
    b = bridge.attach(engine, model=model)
    b.push(model.named_parameters())
    seen = [weakref.ref(each) for each in (b, engine, model)]
    del b
    gc.collect()
    assert os.listdir(shm) == []
    assert engine.generate([[1, 2, 3]], bridge.Sampling(max_tokens=2)), "it is its owner's, and runs on"
    engine.close()
    del engine, model
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3


def test_a_push_that_is_under_way_outlives_its_bridge(shm: Path) -> None:
    model, live = net(), net()
    pending = bridge.attach(live).push(model.named_parameters(), wait=False)
    gc.collect()
    assert pending.result().verified is True
    assert torch.equal(live[0].weight, model[0].weight)
    assert os.listdir(shm) == []


def test_a_bridge_that_is_dropped_under_a_lock_of_its_engine(
    shm: Path, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector runs wherever it likes: here in a thread that holds what the end of the Bridge needs."""
    monkeypatch.setattr("bridge.client.DROPPED_WAIT_S", 0.5)
    model = tiny_qwen2()
    engine = Engine(EngineConfig(str(checkpoint(model))))
    b = bridge.attach(engine, model=model)
    b.push(model.named_parameters())
    began = time.monotonic()
    with engine._execution:
        del b
        gc.collect()
        assert time.monotonic() - began < 5
        assert os.listdir(shm) != []
    until = time.monotonic() + 30
    while os.listdir(shm) and time.monotonic() < until:
        time.sleep(0.01)
    assert os.listdir(shm) == []
    engine.close()


def test_the_most_recent_bridge_is_not_kept_alive(shm: Path) -> None:
    model, live = net(), net()
    b = bridge.attach(live)
    assert bridge.push(model.named_parameters()).verified is True
    del b
    gc.collect()
    assert os.listdir(shm) == []
    with pytest.raises(bridge.ConfigError, match="nothing referred to it") as caught:
        bridge.push(model.named_parameters())
    assert caught.value.remedy is not None
    assert "keep b" in caught.value.remedy


def test_a_bridge_that_cannot_bind_leaves_nothing(shm: Path) -> None:
    live = net()
    with pytest.raises(bridge.BridgeError):
        bridge.attach(live, model="not a model")  # type: ignore[arg-type]
    assert os.listdir(shm) == []
    bridge.attach(live).close()


def test_a_journal_that_cannot_be_removed_does_not_keep_the_lease(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bridge.coordinator.coordinator import Coordinator

    b = bridge.attach(net(), name="stuck")
    b.push(net().named_parameters())
    real = Coordinator.close

    def fails(self: Coordinator) -> None:
        real(self)
        raise TransportError("an engine did not close")

    monkeypatch.setattr(Coordinator, "close", fails)
    with pytest.raises(TransportError):
        b.close()
    monkeypatch.setattr(Coordinator, "close", real)
    with bridge.attach(net(), name="stuck") as again:
        again.push(net().named_parameters())


# ---- what a crash left -----------------------------------------------------------------------------------------------


def test_the_next_bridge_of_a_name_removes_what_a_killed_process_left(shm: Path) -> None:
    code = """
import bridge, os, signal, torch
model, live, other = (torch.nn.Linear(3, 3) for _ in range(3))
kept = bridge.attach(live, name="killed"), bridge.attach(other, name="bystander")
for b in kept:
    b.push(model.named_parameters())
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == -9
    assert len(os.listdir(shm)) == 4
    with bridge.attach(net(), name="killed") as b:
        assert len(os.listdir(shm)) == 3, "its own mailbox, and what another name left: too young to be an orphan"
        assert b.push(net().named_parameters()).version == 2
    assert {name.rpartition("-")[0] for name in os.listdir(shm)} == {"weighbridge-bystander"}
