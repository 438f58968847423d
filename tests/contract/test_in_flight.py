"""Requests that are inside the engine, or on their way into it, when a push comes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import bridge
from bridge.errors import Closed, DeadlineExceeded, EngineQuarantined
from tests.contract.scenarios import closed, quarantine, wait_for
from tests.rigs import PROMPTS, EngineRig

pytestmark = pytest.mark.timeout(300)
MODES = pytest.mark.parametrize("mode", ["keep", "abort", "drain"])


def long_rollout(rig: EngineRig) -> bridge.Sampling:
    """One that is not through when a push comes that is asked for at once."""
    return bridge.Sampling(max_tokens=max(200, rig.in_flight_tokens), temperature=0.0)


@MODES
def test_requests_in_flight(rig: EngineRig, mode: str) -> None:
    old, tokens = int(rig.version), rig.in_flight_tokens
    rig.step()
    rig.begin(PROMPTS, tokens)
    receipt = rig.push(inflight=mode)
    assert receipt.verified is True
    answers = rig.finish()
    assert len(answers) == len(PROMPTS)
    for answer in answers:
        assert (len(answer.tokens) < tokens) is (mode == "abort")
        assert answer.reason == ("abort" if mode == "abort" else "length")
        assert answer.versions == ([old, receipt.version] if mode == "keep" and not rig.no_spans else [old])


@MODES
def test_rollouts_in_flight(rig: EngineRig, mode: str) -> None:
    """Those that were asked of the bridge are requests like others."""
    old = int(rig.version)
    rig.step()
    asked = long_rollout(rig)
    with ThreadPoolExecutor(1) as pool:
        rolling = pool.submit(rig.b.engines[0].generate, PROMPTS[:2], asked)
        wait_for(lambda: rig.busy or rolling.done())
        receipt = rig.push(inflight=mode)
        said = rolling.result(60)
    assert receipt.verified is True
    assert [one.weight_version for one in said] == [old, old]
    assert [one.finish_reason for one in said] == ["abort" if mode == "abort" else "length"] * 2
    assert all((len(one.token_ids) == asked.max_tokens) is (mode != "abort") for one in said)


def test_a_thread_that_generates_meanwhile(rig: EngineRig) -> None:
    """It waits while the weights change hands, and sees one version after the other."""
    said: list[Any] = []
    stop = threading.Event()

    def user() -> None:
        while not stop.is_set():
            said.append(rig.b.engines[0].generate(PROMPTS[:1], bridge.Sampling(max_tokens=8, temperature=0.0)))

    thread = threading.Thread(target=user)
    thread.start()
    try:
        for _ in range(3):
            rig.step()
            assert rig.push(inflight="keep").verified is True
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()
    versions = [row[0].weight_version for row in said]
    assert versions == sorted(versions)


def test_a_caller_waits_as_long_as_it_said(rig: EngineRig) -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        rig.b.engines[0].generate([[5]] * 8, long_rollout(rig), timeout_s=0.02)
    assert time.monotonic() - started < 5
    wait_for(lambda: not rig.busy, 10)  # what has not finished is ended


def test_rollouts_inside_a_torn_engine_are_ended(rig: EngineRig) -> None:
    """Refused, or aborted with nothing but tokens of the version that they began with."""
    old, asked = int(rig.version), long_rollout(rig)
    rig.step()
    with ThreadPoolExecutor(1) as pool:
        rolling = pool.submit(rig.b.engines[0].generate, [[5, 6, 7]], asked)
        wait_for(lambda: rig.busy or rolling.done())
        quarantine(rig, inflight="keep")
        rig.wake()
        if rig.no_torn_error:
            (said,) = rolling.result(30)
            assert (said.finish_reason, said.weight_version) == ("abort", old)
            assert len(said.token_ids) < asked.max_tokens
        else:
            with pytest.raises(EngineQuarantined):
                rolling.result(30)
    assert not rig.busy


def test_who_waits_in_a_push_that_tears_the_engine_is_refused(rig: EngineRig) -> None:
    def late() -> None:
        wait_for(lambda: rig.gate_shut)
        rig.said()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(late)
        time.sleep(0.1)
        rig.step()
        quarantine(rig)
        with pytest.raises(EngineQuarantined):
            waiting.result(30)
    assert not rig.busy


def test_a_push_that_is_under_way_can_be_awaited_after_close(rig: EngineRig) -> None:
    rig.step()
    pending = rig.push(wait=False)
    with closed(rig):
        assert pending.result(60).verified is True
        assert pending.done()
        rig.right()
        with pytest.raises(Closed):
            rig.push()
