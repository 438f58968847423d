"""What goes on around a push: users' event loops, a scheduler that hangs, an engine that its user has paused."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psutil
import pytest

import bridge
from bridge.errors import BridgeError, Closed, ConfigError
from tests.contract.scenarios import wait_for
from tests.rigs import PROMPTS, Rigs, one_version

pytestmark = pytest.mark.timeout(300)
SHORT = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
LONG = {"temperature": 0, "max_new_tokens": 90, "ignore_eos": True}


@pytest.fixture
def rig(rigs: Rigs) -> Iterator[Any]:
    yield from one_version(rigs)


async def ask(rig: Any, sampling: dict[str, Any] = SHORT) -> int:
    out = await asyncio.wait_for(rig.engine.async_generate(input_ids=PROMPTS[0], sampling_params=sampling), 20)
    return len(out["output_ids"])


def test_users_generate_in_loops_of_their_own(rig: Any) -> None:
    """An event that is set in another loop wakes nobody: SGLang would look again after seconds only."""
    started = time.monotonic()
    assert asyncio.run(ask(rig)) == 6
    assert asyncio.run(ask(rig)) == 6
    rig.step()
    assert rig.push().verified is True
    assert asyncio.run(ask(rig)) == 6
    assert time.monotonic() - started < 4


def test_caches_are_kept_when_asked_for(rig: Any) -> None:
    """No note of a receipt says otherwise."""
    cached(rig, PROMPTS[2])
    before = cached(rig, PROMPTS[2])
    assert before > 0
    receipt = rig.push(kv="keep")
    assert receipt.verified is True
    assert cached(rig, PROMPTS[2]) == before
    assert not any("kept no KV" in note for note in receipt.notes)
    rig.push()
    assert cached(rig, PROMPTS[2]) == 0


def cached(rig: Any, ids: list[int]) -> int:
    """Tokens of a prompt that came out of the prefix cache."""
    (out,) = rig.engine.generate(input_ids=[ids], sampling_params={"temperature": 0, "max_new_tokens": 1})
    return int(out["meta_info"]["cached_tokens"])


def test_streams_in_loops_of_their_own(rig: Any) -> None:
    async def streamed(stop: int) -> list[int]:
        stream: AsyncIterator[Any] = await rig.engine.async_generate(
            input_ids=PROMPTS[0], sampling_params=LONG, stream=True
        )
        lengths: list[int] = []
        async for chunk in stream:
            lengths.append(len(chunk["output_ids"]))
            if len(lengths) == stop:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        return lengths

    lengths = asyncio.run(streamed(1000))
    assert len(lengths) > 3
    assert max(lengths) == 90 or sum(lengths) == 90
    assert len(asyncio.run(streamed(2))) == 2
    wait_for(lambda: not rig.busy, 10)  # a stream that was left has ended its request


def test_a_user_who_stops_waiting_ends_his_request(rig: Any) -> None:
    async def impatient() -> None:
        await asyncio.wait_for(rig.engine.async_generate(input_ids=PROMPTS[0], sampling_params=LONG), 0.05)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(impatient())
    wait_for(lambda: not rig.busy, 10)


def test_attached_after_the_loop_of_a_rollout_was_closed(rig: Any) -> None:
    rig.b.close()
    manager = rig.engine.tokenizer_manager
    with asyncio.Runner() as runner:
        rig.engine.loop.run_until_complete(end_tasks(manager))
        manager.event_loop = None
        assert runner.run(ask(rig)) == 6
    assert manager.event_loop.is_closed()
    rig.attach()
    rig.step()
    assert rig.push(timeout_s=20).verified is True
    assert asyncio.run(ask(rig)) == 6
    assert len(rig.said()) == len(PROMPTS)


def test_attached_from_within_a_loop_that_ends(rig: Any) -> None:
    unattached(rig)

    async def rollout() -> None:
        await attached_here(rig)
        rig.step()
        assert (await asyncio.to_thread(rig.push)).verified is True
        assert await ask(rig) == 6

    asyncio.run(rollout())
    rig.step()
    assert rig.push(timeout_s=20).verified is True
    assert asyncio.run(ask(rig)) == 6


def test_a_push_from_within_the_engines_own_loop_is_refused_at_once(rig: Any) -> None:
    """It would wait for schedulers whose answers only this loop can take."""
    unattached(rig)

    async def rollout() -> None:
        await attached_here(rig)
        rig.step()
        started = time.monotonic()
        for blocking in (rig.push, rig.b.health, rig.b.rollback):
            with pytest.raises(ConfigError, match="to_thread"):
                blocking()
        assert time.monotonic() - started < 2
        pending = await asyncio.to_thread(rig.push, wait=False)
        while not pending.done():
            await asyncio.sleep(0.01)
        assert pending.result().verified is True
        assert await ask(rig) == 6

    asyncio.run(rollout())


def test_closing_from_within_the_engines_own_loop_is_refused_at_once(rig: Any) -> None:
    """And closes nothing: another thread can close it afterwards."""
    unattached(rig)

    async def rollout() -> None:
        await attached_here(rig)
        rig.step()
        started = time.monotonic()
        with pytest.raises(ConfigError, match="to_thread"):
            rig.b.close()
        assert time.monotonic() - started < 2
        assert (await asyncio.to_thread(rig.push)).verified is True
        await asyncio.to_thread(rig.b.close)
        with pytest.raises(Closed):
            rig.push()
        assert await ask(rig) == 6

    asyncio.run(rollout())
    rig.attach()


def unattached(rig: Any) -> None:
    """No bridge, and an engine that takes the next loop for its own."""
    rig.b.close()
    manager = rig.engine.tokenizer_manager
    rig.engine.loop.run_until_complete(end_tasks(manager))
    manager.event_loop = None


async def attached_here(rig: Any) -> None:
    """The engine takes this loop, then a bridge."""
    assert await ask(rig) == 6
    rig.b = await asyncio.to_thread(bridge.attach, rig.engine, model=rig.model)


async def end_tasks(manager: Any) -> None:
    """As if the engine had never been called."""
    for task in list(manager.asyncio_tasks):
        task.cancel()
    await asyncio.gather(*manager.asyncio_tasks, return_exceptions=True)
    manager.asyncio_tasks.clear()


def test_a_bridge_that_closes_tells_who_waits_in_another_loop(rig: Any) -> None:
    said: list[Any] = []

    def user() -> None:
        try:
            said.append(asyncio.run(ask(rig, LONG)))
        except BaseException as error:
            said.append(error)

    thread = threading.Thread(target=user)
    thread.start()
    wait_for(lambda: rig.busy)
    rig.b.close()
    thread.join(10)
    assert isinstance(said[0], Closed) or said == [90]
    rig.attach()


@pytest.mark.parametrize("delay", [-1.0, 0.03])
def test_a_scheduler_that_hangs_does_not_outlast_the_deadline(rig: Any, delay: float) -> None:
    pids = map(psutil.Process, rig.engine.get_all_child_pids())
    (scheduler,) = [p for p in pids if "scheduler" in " ".join(p.cmdline())]
    rig.step()
    timer = threading.Timer(max(delay, 0), scheduler.suspend)
    if delay < 0:
        scheduler.suspend()
    else:
        timer.start()
    started = time.monotonic()
    try:
        try:
            rig.push(timeout_s=4)
        except BridgeError:
            assert time.monotonic() - started < 10
        else:
            assert delay >= 0, "a push without its scheduler"
    finally:
        timer.join() if delay >= 0 else None
        scheduler.resume()
    rig.step()
    assert rig.push(timeout_s=60).verified is True
    assert rig.off() < rig.largest_noise


@pytest.mark.parametrize("verify", ["outputs", "weights"])
def test_an_engine_that_its_user_has_paused(rig: Any, verify: str) -> None:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    loop, manager = rig.engine.loop, rig.engine.tokenizer_manager
    version = rig.b.status().engines[0].serving
    loop.run_until_complete(manager.pause_generation(PauseGenerationReqInput(mode="retract")))
    try:
        rig.step()
        started = time.monotonic()
        with pytest.raises(ConfigError, match="continue_generation"):
            rig.push(timeout_s=20, verify=verify)
        assert time.monotonic() - started < 4
        assert manager.is_pause, "it is its user who lets it go on"
    finally:
        loop.run_until_complete(manager.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False)))
    assert rig.version == str(version)
