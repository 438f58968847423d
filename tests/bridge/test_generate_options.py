"""What `EngineHandle.generate` refuses before an engine sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bridge import Sampling
from bridge.errors import ConfigError
from bridge.handles import EngineHandle
from bridge.protocol.codec import pack, unpack
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import EngineGenerate, EngineGenerated, FromEngine, ToEngine


class Port:
    """An engine that notes what it is asked."""

    id = "engine0"

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.seconds: list[float] = []

    def call(self, request: ToEngine, reply: object, deadline: Deadline) -> FromEngine:
        self.asked.append(request)
        self.seconds.append(deadline.remaining_s)
        return EngineGenerated(())


BAD: list[tuple[str, dict[str, Any]]] = [
    ("prompt 0", {"prompts": [1, 2, 3]}),
    ("prompt 0", {"prompts": ["hello"]}),
    ("prompt 0", {"prompts": [b"hello"]}),
    ("prompt 0", {"prompts": [{1, 2}]}),
    ("prompt 0", {"prompts": [{1: 2}]}),
    ("prompt 1", {"prompts": [[5], []]}),
    ("prompt 1", {"prompts": [[5], [5.0]]}),
    ("prompt 1", {"prompts": [[5], [None]]}),
    ("prompt 1", {"prompts": [[5], ["5"]]}),
    ("prompt 1", {"prompts": [[5], [5, -1]]}),
    ("prompt 1", {"prompts": [[5], [5, 2**31]]}),
    ("prompts", {"prompts": "hello"}),
    ("prompts", {"prompts": 5}),
    ("prompts", {"prompts": None}),
    ("sampling", {"sampling": {"max_tokens": 2}}),
    ("sampling.max_tokens", {"sampling": Sampling(max_tokens=-1)}),
    ("sampling.max_tokens", {"sampling": Sampling(max_tokens=2**21)}),
    ("sampling.max_tokens", {"sampling": Sampling(max_tokens=True)}),
    ("sampling.max_tokens", {"sampling": Sampling(max_tokens=2.5)}),  # type: ignore[arg-type]
    ("sampling.max_tokens", {"sampling": Sampling(max_tokens="2")}),  # type: ignore[arg-type]
    ("sampling", {"sampling": Sampling(max_tokens=object())}),  # type: ignore[arg-type]
    ("sampling.temperature", {"sampling": Sampling(temperature=-1.0)}),
    ("sampling.temperature", {"sampling": Sampling(temperature=float("nan"))}),
    ("sampling.temperature", {"sampling": Sampling(temperature=float("inf"))}),
    ("sampling.top_p", {"sampling": Sampling(top_p=0.0)}),
    ("sampling.top_p", {"sampling": Sampling(top_p=1.5)}),
    ("sampling.seed", {"sampling": Sampling(seed=-1)}),
    ("sampling.seed", {"sampling": Sampling(seed=2**70)}),
    ("sampling.stop_token_ids", {"sampling": Sampling(stop_token_ids=(-1,))}),
    ("sampling.stop_token_ids", {"sampling": Sampling(stop_token_ids=5)}),  # type: ignore[arg-type]
    ("adapter", {"adapter": None}),
    ("timeout_s", {"timeout_s": 0}),
    ("timeout_s", {"timeout_s": float("nan")}),
    ("timeout_s", {"timeout_s": "5"}),
]


@pytest.mark.parametrize(("where", "given"), BAD, ids=[f"{k}-{where}" for k, (where, _) in enumerate(BAD)])
def test_what_no_engine_can_take_is_sent_to_none(where: str, given: dict[str, Any]) -> None:
    port = Port()
    with pytest.raises(ConfigError) as caught:
        EngineHandle(port).generate(**{"prompts": [[5]], **given})
    error = caught.value
    assert error.where is not None
    assert error.where.startswith(where)
    assert error.expected
    assert error.got
    assert error.remedy
    assert not port.asked


PROMPTS: list[Any] = [
    [[1, 2], [3]],
    ((1, 2), (3,)),
    [np.array([1, 2]), torch.tensor([3])],
    (row for row in ([1, 2], [3])),
]


@pytest.mark.parametrize("prompts", PROMPTS, ids=["lists", "tuples", "arrays", "a generator"])
def test_prompts_in_every_form(prompts: Any) -> None:
    port = Port()
    EngineHandle(port).generate(prompts, timeout_s=7)
    assert port.asked == [EngineGenerate(((1, 2), (3,)), Sampling(), "current", 7.0)]
    assert unpack(pack(port.asked[0]), EngineGenerate) == port.asked[0]
    assert 6 < port.seconds[0] <= 7


def test_numbers_of_other_libraries() -> None:
    port = Port()
    given = Sampling(
        max_tokens=np.int64(3),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        stop_token_ids=[np.int32(7)],  # type: ignore[arg-type]
        seed=torch.tensor(3),  # type: ignore[arg-type]
    )
    EngineHandle(port).generate([[5]], given)
    assert port.asked[0].sampling == Sampling(3, 0.5, 1.0, (7,), 3)


def test_no_prompts_and_nothing_to_sample_are_fine() -> None:
    port = Port()
    EngineHandle(port).generate([], Sampling(max_tokens=0), timeout_s=float("inf"))
    assert port.asked[0].prompts == ()
    unpack(pack(port.asked[0]), EngineGenerate)
