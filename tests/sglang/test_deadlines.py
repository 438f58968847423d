"""Every wait of the SGLang driver ends: what hangs here are small stand-ins for an engine, no engine is started."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from bridge.errors import Closed, DeadlineExceeded
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.hosting import Leavings
from engine_side.engines.sglang import frontend, in_process_channel
from engine_side.engines.sglang.driver import EngineShutdown
from engine_side.engines.sglang.in_process_channel import InProcessChannel
from engine_side.engines.sglang.scheduler_messages import ACTION, FACTS, SchedulerAnswer

pytestmark = pytest.mark.timeout(60)
SHORT_S = 0.2


class Stuck:
    """A callback that keeps the event loop busy, as code does that forgets to await."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def __call__(self) -> None:
        self.let_go.wait(30)


class Manager:
    """As much of a tokenizer manager as the channel and the frontend use. Its schedulers never answer `unload`."""

    def __init__(self) -> None:
        self.event_loop: Any = None
        self.generating = threading.Event()
        self.asyncio_tasks: set[Any] = set()
        self.is_pause, self.is_pause_cond = False, asyncio.Condition()
        self.server_args = SimpleNamespace(enable_lora=True)
        self.lora_update_lock = asyncio.Lock()
        self.lora_registry = SimpleNamespace(get_all_adapters=lambda: {"idle": None}, _counters={})

    async def check_weights(self, request: Any) -> tuple[bool, str]:
        return True, msgspec.json.encode(SchedulerAnswer(loras={"idle": "id"})).decode()

    async def unload_lora_adapter(self, request: Any) -> None:
        await asyncio.sleep(60)

    async def generate(self) -> None:
        self.generating.set()
        await asyncio.sleep(60)

    async def _validate_and_resolve_lora(self, request: Any) -> None: ...


class Engine:
    def __init__(self) -> None:
        self.tokenizer_manager, self.loop = Manager(), asyncio.new_event_loop()

    def get_all_child_pids(self) -> list[int]:
        return []


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_process_channel, "_LOOP_S", SHORT_S)
    monkeypatch.setattr(frontend, "_TURN_S", SHORT_S)
    monkeypatch.setattr(frontend, "_END_S", SHORT_S)


def test_a_loop_that_does_not_start_is_named() -> None:
    engine, stuck = Engine(), Stuck()
    loop = engine.loop
    loop.call_soon(stuck)
    channel = InProcessChannel.open(engine, engine)
    with pytest.raises(DeadlineExceeded, match=r"event loop is blocked.*did not start"):
        channel.running_loop()
    stuck.let_go.set()
    assert channel.run(asyncio.sleep(0, 5), Deadline.after(5), "a call") == 5
    channel.close(engine)
    assert engine.loop is loop
    assert not loop.is_running()
    loop.close()


def test_a_loop_that_does_not_stop_is_named_and_the_engine_has_it_back() -> None:
    engine, stuck = Engine(), Stuck()
    loop = engine.loop
    channel = InProcessChannel.open(engine, engine)
    channel.running_loop().call_soon_threadsafe(stuck)
    with pytest.raises(DeadlineExceeded, match=r"event loop is blocked.*did not stop"):
        channel.close(engine)
    assert engine.loop is loop
    (thread,) = [each for each in threading.enumerate() if each.name == "weighbridge-sglang"]
    stuck.let_go.set()
    thread.join(5)
    assert not thread.is_alive()
    loop.close()


def test_a_call_that_hangs_ends_with_its_deadline() -> None:
    engine = Engine()
    loop = engine.loop
    channel = InProcessChannel.open(engine, engine)
    with pytest.raises(DeadlineExceeded, match="did not answer a long sleep"):
        channel.run(asyncio.sleep(60), Deadline.after(SHORT_S), "a long sleep")
    channel.close(engine)
    loop.close()


def test_the_last_user_closes_and_callers_in_other_loops_are_told() -> None:
    """A user that was collected unclosed keeps nothing open."""
    engine = Engine()
    loop, manager = engine.loop, engine.tokenizer_manager
    users = [Manager(), Manager()]
    channel = InProcessChannel.open(engine, users[0])
    assert InProcessChannel.open(engine, users[1]) is channel
    assert InProcessChannel.open(engine, Manager()) is channel
    channel.close(users[0])
    assert engine.loop is not loop
    ended: list[BaseException] = []

    def caller() -> None:
        try:
            asyncio.run(manager.generate())
        except Closed as error:
            ended.append(error)

    thread = threading.Thread(target=caller)
    thread.start()
    assert manager.generating.wait(10)
    channel.close(users[1])
    thread.join(5)
    assert len(ended) == 1
    assert engine.loop is loop
    assert "generate" not in vars(manager)
    loop.close()


class Undead(Engine):
    """An engine whose processes do not end, in the words of SGLang's `kill_process_tree`."""

    def shutdown(self) -> None:
        raise RuntimeError("processes [7] were not reaped within 60 seconds")


def test_processes_that_do_not_end_are_named() -> None:
    engine = Undead()
    shutdown = EngineShutdown(engine, Leavings())
    with pytest.raises(DeadlineExceeded, match=r"did not end.*\[7\]"):
        shutdown()
    shutdown()
    engine.loop.close()


def test_a_request_behind_one_that_is_never_answered_is_not_sent() -> None:
    sent: list[str] = []

    async def schedulers(manager: Any, request: Any, _: Any = None) -> None:
        sent.append(request.skip_tensor_list[1])
        await asyncio.sleep(60)

    async def two_requests() -> None:
        first, second = (SimpleNamespace(action=ACTION, skip_tensor_list=[FACTS, word]) for word in ("1", "2"))
        manager = Manager()
        hangs = asyncio.create_task(frontend.answer_check_weights(schedulers, manager, first))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded, match="earlier request"):
            await frontend.answer_check_weights(schedulers, manager, second)
        hangs.cancel()

    asyncio.run(two_requests())
    assert sent == ["1"]


def test_an_idle_lora_that_is_not_unloaded_is_named() -> None:
    async def retire() -> None:
        with pytest.raises(DeadlineExceeded, match=r"did not unload.*idle"):
            await frontend.SglangFrontend.of(Manager()).handle(msg.Retire(("idle",)))

    asyncio.run(retire())
