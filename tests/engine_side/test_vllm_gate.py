"""The gate of a `vllm.LLM` belongs to the bridge that has claimed the engine. A stand-in takes vLLM's place: what
counts here is only the order in which bridges come and go."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bridge.errors import EngineQuarantined
from bridge.protocol.deadline import Deadline
from engine_side.driver.service import EngineService
from engine_side.engines.vllm.driver import LLMDriver
from engine_side.engines.vllm.plugin import BACKEND


def settings() -> Any:
    return SimpleNamespace(
        weight_transfer_config=SimpleNamespace(backend=BACKEND),
        lora_config=None,
        cache_config=SimpleNamespace(
            block_size=16, enable_prefix_caching=True, kv_offloading_size=None, cache_dtype="auto"
        ),
        model_config=SimpleNamespace(
            model="none", max_model_len=64, quantization=None, dtype=torch.bfloat16, get_vocab_size=lambda: 100
        ),
        parallel_config=SimpleNamespace(world_size=1, enable_eplb=False),
        load_config=SimpleNamespace(load_format="dummy"),
        speculative_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
    )


class IdleEngine:
    """As `LLMEngine` with a core in this process, and without requests."""

    def __init__(self) -> None:
        self.vllm_config = settings()
        self.engine_core = SimpleNamespace(engine_core=object())
        self.arrived: list[str] = []

    def add_request(self, name: str) -> None:
        self.arrived.append(name)

    def step(self) -> list[Any]:
        return []

    def has_unfinished_requests(self) -> bool:
        return False

    def is_sleeping(self) -> bool:
        return False

    def sleep(self, **_: Any) -> None: ...

    def wake_up(self, **_: Any) -> None: ...

    def reset_prefix_cache(self, **_: Any) -> bool:
        return True


def attached_beside(engine: IdleEngine) -> LLMDriver:
    """The driver of a bridge that began to attach while the one before was still closing, and then got the engine."""
    llm: Any = SimpleNamespace(llm_engine=engine)
    first, second = LLMDriver(llm), LLMDriver(llm)
    first.claim("the one before")
    EngineService("engine0", second, node="here")  # an attach looks at the engine before it claims it
    first.close()
    second.claim("the next one")
    return second


def test_callers_wait_for_a_push_of_a_bridge_that_attached_while_another_closed() -> None:
    engine = IdleEngine()
    driver = attached_beside(engine)
    driver.pause("keep", Deadline.after(5))
    user = threading.Thread(target=engine.add_request, args=("a user's",), daemon=True)
    user.start()
    user.join(0.3)
    assert engine.arrived == []
    driver.resume()
    user.join(5)
    assert engine.arrived == ["a user's"]


def test_callers_are_refused_by_a_bridge_that_attached_while_another_closed() -> None:
    engine = IdleEngine()
    attached_beside(engine).gate.reason = "torn"
    with pytest.raises(EngineQuarantined, match="torn"):
        engine.add_request("a user's")


def test_a_driver_that_gives_up_leaves_the_engine_as_it_was() -> None:
    engine = IdleEngine()
    before = vars(engine).keys() - {"_weighbridge_published"}
    driver = attached_beside(engine)
    assert vars(engine).keys() > before
    driver.close()
    assert vars(engine).keys() - {"_weighbridge_published"} == before
