"""What can go wrong and what may be in flight, on one dense family with tied embeddings."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import bridge
from bridge.errors import Busy, EngineQuarantined, MissingTensor, PushAborted
from tests.rigs import difference
from tests.sglang.rig import PROMPTS, check_family

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def rig(rigs: Any) -> Iterator[Any]:
    made = rigs.get("qwen2-tied")
    made.step()
    assert made.push().verified is True
    free = made.inside("pools")
    yield made
    made.inside("mend")
    made.step()
    assert made.push().verified is True, "a good push works after every test"
    assert made.off() < 0.025
    assert made.inside("pools") == free


def test_qwen2_tied(rig: Any) -> None:
    check_family(rig)


@pytest.mark.parametrize("k", [0, 1, 5, 9, 13])
def test_a_push_that_fails_midway_leads_back(rig: Any, k: int) -> None:
    before, said = rig.inside("bits"), rig.said()
    version = rig.b.status().engines[0].serving
    rig.step()
    rig.inside("break_write", k=k)
    with pytest.raises(PushAborted):
        rig.push()
    assert rig.inside("mend") is True
    assert rig.b.status().engines[0].serving == version
    assert rig.version == str(version)
    assert rig.inside("bits") == before
    assert rig.said() == said


def test_an_engine_that_cannot_be_put_back_refuses(rig: Any) -> None:
    rig.step()
    rig.inside("break_write", k=5, always=True)
    with pytest.raises(EngineQuarantined):
        rig.push()
    with pytest.raises(EngineQuarantined):
        rig.said()
    rig.b.close()
    with pytest.raises(EngineQuarantined):
        rig.said()
    rig.inside("mend")
    rig.b = bridge.attach(rig.engine, model=rig.model)
    assert rig.push().verified is True
    assert rig.off() < 0.025


def test_a_subset_leaves_the_rest_bit_identical(rig: Any) -> None:
    before = rig.inside("bits")
    kept = {n: p.detach().clone() for n, p in rig.model.named_parameters()}
    rig.step()
    layer = [(n, p) for n, p in rig.model.named_parameters() if ".layers.1." in n]
    with pytest.raises(MissingTensor):
        rig.b.push(layer)
    with torch.no_grad():
        for name, parameter in rig.model.named_parameters():
            if ".layers.1." not in name:
                parameter.copy_(kept[name])
    assert rig.b.push(layer, partial=True).verified is True
    after = rig.inside("bits")
    assert {n for n in before if before[n] != after[n]} == {n for n in before if ".layers.1." in n}
    assert rig.off() < 0.025


@pytest.mark.parametrize("mode", ["keep", "abort", "drain"])
def test_requests_in_flight(rig: Any, mode: str) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 90, "ignore_eos": True}

    async def user(ids: list[int]) -> Any:
        return await rig.engine.async_generate(input_ids=ids, sampling_params=sampling)

    loop = rig.engine.loop
    futures = [asyncio.run_coroutine_threadsafe(user(ids), loop._channel.loop) for ids in PROMPTS]
    states = rig.engine.tokenizer_manager.rid_to_state
    wanted = len(PROMPTS)
    while len(states) < wanted or any(len(state.output_ids) < 3 for state in list(states.values())):
        threading.Event().wait(0.01)
    old = int(rig.b.status().engines[0].serving)
    rig.step()
    receipt = rig.push(inflight=mode)
    assert receipt.verified is True
    for future in futures:
        out = future.result(60)
        served = [int(span["version"]) for span in out["meta_info"]["weight_versions"]]
        reason, count = out["meta_info"]["finish_reason"]["type"], len(out["output_ids"])
        if mode == "keep":
            assert (reason, count, served) == ("length", 90, [old, receipt.version])
        elif mode == "abort":
            assert (reason, served) == ("abort", [old])
            assert count < 90
        else:
            assert (reason, count, served) == ("length", 90, [old])


def test_a_thread_that_generates_meanwhile(rig: Any) -> None:
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


def test_caches_that_are_not_reset_are_found(rig: Any) -> None:
    rig.step()
    rig.inside("keep_caches")
    with pytest.raises(PushAborted, match="cache"):
        rig.push()


def test_weights_that_somebody_wrote_to_are_found(rig: Any) -> None:
    rig.inside("scale", path="model.norm.weight", factor=0.5)
    report = rig.b.health()
    assert report.status == "unhealthy"


def test_two_bridges(rig: Any) -> None:
    with pytest.raises(Busy):
        bridge.attach(rig.engine, model=rig.model)


def test_rollback(rig: Any) -> None:
    said = rig.said()
    rig.step()
    rig.push()
    assert difference(rig.said(), said) > 0.1
    rig.b.rollback()
    assert rig.said() == said


def test_who_waits_in_a_push_that_tears_the_engine_is_refused(rig: Any) -> None:
    front = vars(rig.engine.tokenizer_manager)["_weighbridge_front"]

    def late() -> None:
        while not front._gate.shut:
            time.sleep(0.001)
        rig.b.engines[0].generate(PROMPTS[:1], bridge.Sampling(max_tokens=4, temperature=0.0))

    rig.step()
    rig.inside("break_write", k=5, always=True)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(late)
        try:
            with pytest.raises(EngineQuarantined):
                rig.push()
            with pytest.raises(EngineQuarantined):
                waiting.result(10)
        finally:
            rig.inside("mend")
            assert rig.push().verified is True
