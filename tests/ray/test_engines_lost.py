"""Two engines of which one is wrong, hangs or dies: the others are put back and go on serving."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bridge
from bridge.config import from_environment
from bridge.session import RaySession
from tests.conftest import perturb, tiny_qwen2
from tests.ray.conftest import Home, eventually, gone
from tests.ray.test_daemon import GREEDY, PROMPT, generated, greedy
from trainer_side.trainer import TrainerSide


@pytest.fixture
def uneven(run: dict[str, Any], home: Home, start_folder: Path, tmp_path: Path) -> Iterator[bridge.Bridge]:
    """Engine 1 has the same weights under another rope: bits and probes will pass there, its outputs will not."""
    wrong = tmp_path / "wrong"
    shutil.copytree(start_folder, wrong)
    config = json.loads((wrong / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 3.0}
    (wrong / "config.json").write_text(json.dumps(config))
    specs = [(f"embedded:{start_folder}", {}), (f"embedded:{wrong}", {})]
    config = from_environment()
    b = bridge.Bridge(RaySession.launch("uneven", specs, config), TrainerSide(), config)
    yield b
    b.shutdown()


def test_one_wrong_engine_and_one_lost_engine(uneven: bridge.Bridge, home: Home) -> None:
    """Engine 1 fails its canary, it hangs, it dies in a push, it is gone: engine 0 serves throughout."""
    start = tiny_qwen2(seed=0)
    model = tiny_qwen2(seed=0)
    uneven.bind(model)
    perturb(model, seed=1)
    before = generated(uneven)
    assert before[0] == (0, greedy(start))
    assert greedy(model) != greedy(start), "the step must be visible, else this test shows nothing"

    with pytest.raises(bridge.PushAborted, match="engine1") as caught:
        uneven.push(model.named_parameters())
    assert isinstance(caught.value.__cause__, bridge.CanaryMismatch)
    assert caught.value.serving == {"engine0": 0, "engine1": 0}
    assert generated(uneven) == before
    reports = {report.id: report for report in caught.value.receipt.engines}
    assert reports["engine0"].canary.mean_abs < reports["engine0"].canary.limit
    assert reports["engine1"].canary.mean_abs > reports["engine1"].canary.limit
    # judged by bits alone, both have what the trainer sent
    receipt = uneven.push(model.named_parameters(), verify="weights")
    assert [e.serving for e in receipt.engines] == [receipt.version] * 2
    assert generated(uneven)[0] == (receipt.version, greedy(model))

    served = greedy(model)
    victim = next(e.pid for e in uneven.status().engines if e.id == "engine1")

    def still_serves() -> None:
        (completion,) = uneven.engines[0].generate([PROMPT], GREEDY)
        assert (completion.weight_version, list(completion.token_ids)) == (receipt.version, served)

    # it hangs: the push ends at its deadline, and the engine is well again once it goes on
    os.kill(victim, signal.SIGSTOP)
    perturb(model, seed=2)
    began = time.monotonic()
    with pytest.raises(bridge.BridgeError, match="engine1"):
        uneven.push(model.named_parameters(), verify="weights", timeout_s=3)
    took = time.monotonic() - began
    still_serves()
    os.kill(victim, signal.SIGCONT)
    assert took < 3 + 5, took
    receipt = uneven.push(model.named_parameters(), verify="weights")
    assert [e.serving for e in receipt.engines] == [receipt.version] * 2
    served = greedy(model)

    # it dies in the middle of a push, when engine 0 has loaded already
    os.kill(victim, signal.SIGSTOP)
    perturb(model, seed=3)
    pending = uneven.push(model.named_parameters(), verify="weights", timeout_s=30, wait=False)
    time.sleep(1)
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(bridge.PushAborted, match="engine1") as lost:
        pending.result()
    assert isinstance(lost.value.__cause__, bridge.PeerLost)
    assert time.monotonic() - began < 15
    still_serves()

    # it is gone
    assert eventually(lambda: gone(victim))
    perturb(model, seed=4)
    with pytest.raises((bridge.PushAborted, bridge.PeerLost), match="engine1"):
        uneven.push(model.named_parameters(), verify="weights", timeout_s=20)
    still_serves()
    report = uneven.health()
    assert not report.healthy
    assert [check.name for check in report.checks if not check.ok and "alive" in check.name] == ["engine1 alive"]
    with pytest.raises(bridge.PeerLost, match="engine1"):
        uneven.engines[1].generate([PROMPT], GREEDY)
