"""An engine core in a process of its own that is killed: nobody waits for it for ever."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import bridge
from bridge.errors import BridgeError
from engine_side.adapters.vllm.driver import LLMAdapter

pytestmark = pytest.mark.timeout(200)
PUSH_S, GRACE_S = 10.0, 5.0


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Any]:
    from tests.vllm.rig import VllmRig

    made = VllmRig(tmp_path, "qwen2", how="mp")
    yield made
    made.close()


def kill(rig: Any) -> None:
    (core,) = rig.llm.llm_engine.engine_core.resources.engine_manager.processes
    os.kill(core.pid, signal.SIGKILL)


def test_a_core_that_is_killed_in_the_middle_of_a_push(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.step()
    assert rig.push().verified is True
    run = LLMAdapter._run_job

    def killing(self: LLMAdapter, *arguments: Any) -> Any:
        monkeypatch.undo()
        threading.Timer(0.01, kill, (rig,)).start()
        return run(self, *arguments)

    asked = bridge.Sampling(max_tokens=200, temperature=0.0)
    rig.step()
    with ThreadPoolExecutor(1) as pool:
        rolling = pool.submit(rig.b.engines[0].generate, [[5, 6, 7]], asked)
        monkeypatch.setattr(LLMAdapter, "_run_job", killing)
        started = time.monotonic()
        with pytest.raises(BridgeError, match="died"):
            rig.push(timeout_s=PUSH_S, inflight="keep")
        assert time.monotonic() - started < PUSH_S + GRACE_S
        assert rig.b.status().engines[0].state == "QUARANTINED"
        with pytest.raises(BridgeError):
            rolling.result(GRACE_S)
    for ask in (rig.said, lambda: rig.b.engines[0].generate([[5, 6]], asked), lambda: rig.push(timeout_s=PUSH_S)):
        started = time.monotonic()
        with pytest.raises(BridgeError):
            ask()
        assert time.monotonic() - started < PUSH_S + GRACE_S
    assert rig.b.health().healthy is False
