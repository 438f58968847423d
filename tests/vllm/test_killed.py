"""An engine core, or one of its workers, that is killed at any point of a push: nobody waits for it for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

import bridge
from bridge.errors import BridgeError
from engine_side.engines.vllm.driver import LLMDriver
from tests.rigs import shared_files

pytestmark = pytest.mark.timeout(200)
PUSH_S, GRACE_S, NOTICED_S = 30.0, 5.0, 15.0  # vLLM itself takes about 10 s to end a core whose worker was killed
ASKED = bridge.Sampling(max_tokens=200, temperature=0.0)


@pytest.fixture
def rig(request: pytest.FixtureRequest, tmp_path: Path, rigs: Any) -> Iterator[Any]:
    from tests.vllm.rig import VllmRig

    rigs.close()  # while an engine core lives in this process, vLLM remembers that all of them are to
    made = VllmRig(tmp_path, "qwen2-tied", how=request.param)
    core = core_of(made)
    left = shared_files([core.pid, *(child.pid for child in core.children(recursive=True))])
    yield made
    made.close()
    for path in left:  # a killed core takes nothing with it
        path.unlink(missing_ok=True)


def core_of(rig: Any) -> psutil.Process:
    (core,) = rig.llm.llm_engine.engine_core.resources.engine_manager.processes
    return psutil.Process(core.pid)


def victim_of(rig: Any) -> psutil.Process:
    """The engine core; where it has workers, the last of them."""
    process = core_of(rig)
    if rig.how == "tp2":
        process = [child for child in process.children(recursive=True) if "Worker" in child.name()][-1]
    return process


def killing(rig: Any, monkeypatch: pytest.MonkeyPatch, point: str, nth: int, after: bool) -> None:
    """Kill at the nth call of one of the driver's methods: in its middle, or when it is through."""
    real, calls, victim = getattr(LLMDriver, point), [0], victim_of(rig)

    def hooked(self: LLMDriver, *arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] != nth:
            return real(self, *arguments, **keywords)
        if not after:
            victim.suspend()  # the call cannot be through before the kill
            threading.Timer(0.2, victim.kill).start()
            return real(self, *arguments, **keywords)
        try:
            return real(self, *arguments, **keywords)
        finally:
            victim.kill()

    monkeypatch.setattr(LLMDriver, point, hooked)


@pytest.mark.parametrize(
    ("rig", "point", "nth", "after"),
    [
        ("mp", "_run_job", 1, False),
        ("mp", "publish", 1, True),
        ("tp2", "_run_job", 2, False),
    ],
    indirect=["rig"],
)
def test_killed_in_the_middle_of_a_push(
    rig: Any, monkeypatch: pytest.MonkeyPatch, point: str, nth: int, after: bool
) -> None:
    rig.step()
    assert rig.push().verified is True
    rig.step()
    with ThreadPoolExecutor(1) as pool:
        rolling = pool.submit(rig.b.engines[0].generate, [[5, 6, 7]], ASKED)
        killing(rig, monkeypatch, point, nth, after)
        started = time.monotonic()
        with pytest.raises(BridgeError, match=r"died|cannot be reached"):
            rig.push(timeout_s=PUSH_S, inflight="keep")
        assert time.monotonic() - started < NOTICED_S
        assert rig.b.status().engines[0].state == "QUARANTINED"
        with pytest.raises(BridgeError):
            rolling.result(GRACE_S)
    for ask in (rig.said, lambda: rig.b.engines[0].generate([[5, 6]], ASKED), lambda: rig.push(timeout_s=PUSH_S)):
        started = time.monotonic()
        with pytest.raises(BridgeError):
            ask()
        assert time.monotonic() - started < PUSH_S + GRACE_S
    assert rig.b.health().healthy is False
