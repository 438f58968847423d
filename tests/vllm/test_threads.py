"""An engine core in a process of its own, reached through one socket: a thread generates while another one pushes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import bridge
from tests.rigs import PROMPTS

pytestmark = pytest.mark.timeout(300)
PUSHES = 25


@contextmanager
def meanwhile(call: Callable[[], Any]) -> Iterator[list[Any]]:
    """Inside, another thread calls again and again; what it got, an error last."""
    found: list[Any] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            try:
                found.append(call())
            except BaseException as error:
                found.append(error)
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("who", ["user", "bridge"])
def test_pushes_beside_a_thread_that_generates(rigs: Any, who: str) -> None:
    from vllm import SamplingParams

    rig = rigs.get("qwen2", how="mp")
    rig.step()
    rig.push()
    few = SamplingParams(max_tokens=2, temperature=0, detokenize=False)

    def ask() -> list[int]:
        if who == "bridge":
            asked = rig.b.engines[0].generate(PROMPTS, bridge.Sampling(max_tokens=2, temperature=0.0))
            return [one.weight_version for one in asked if one.token_ids]  # others were aborted before they began
        outputs = rig.llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], few, use_tqdm=False)
        return [int(span.version) for out in outputs for span in out.outputs[0].weight_versions[:1]]

    with meanwhile(ask) as found:
        for _ in range(PUSHES):
            rig.step()
            assert rig.push(verify="weights", timeout_s=60).verified is True
    assert len(found) > 3
    assert all(isinstance(row, list) for row in found), found[-1]
    firsts = [min(row) for row in found if row]
    assert firsts == sorted(firsts)
    assert rig.off() < 0.025
