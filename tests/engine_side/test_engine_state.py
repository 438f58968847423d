"""The states of an engine: which step follows which, and what it serves in each."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import ProtocolError
from bridge.model.engine_state import TRANSITIONS, EngineState
from bridge.protocol import engine_messages as msg
from bridge.protocol.deadline import Deadline
from bridge.push_settings import PushSettings
from engine_side.driver.service import EngineService, Standing
from engine_side.engines.module import ModuleDriver

S = EngineState


@pytest.mark.parametrize(("now", "to"), itertools.product(S, S))
def test_only_the_steps_of_the_table_are_taken(now: EngineState, to: EngineState) -> None:
    standing = Standing("e", now, serving=4)
    if to in TRANSITIONS[now]:
        standing.move(to)
        assert standing.state is to
    else:
        with pytest.raises(ProtocolError, match=f"got: {to.name}"):
            standing.move(to)
        assert standing.state is now


def test_serving_is_reached_only_through_verified_or_untouched() -> None:
    assert {now for now in S if S.SERVING in TRANSITIONS[now]} == {S.VERIFIED, S.STAGING}
    assert {now for now in S if S.VERIFIED in TRANSITIONS[now]} == {S.LOADED}
    assert {now for now in S if S.LOADED in TRANSITIONS[now]} == {S.STAGING}


@given(st.lists(st.tuples(st.sampled_from(S), st.none() | st.integers(1, 9)), max_size=30))
@settings(deadline=None)
def test_no_walk_serves_without_a_version(walk: list[tuple[EngineState, int | None]]) -> None:
    standing = Standing("e")
    assert standing.state is S.STALE
    for to, serving in walk:
        before = standing.state, standing.serving
        try:
            standing.move(to, serving)
        except ProtocolError:
            assert (standing.state, standing.serving) == before
        assert standing.state is not S.SERVING or standing.serving is not None
        assert standing.state is not S.QUARANTINED or standing.serving is None


@pytest.mark.parametrize(
    ("request_of", "said"),
    [
        (lambda turn: msg.EngineCommit(5, PushSettings(), turn), "commit of a version that was not verified"),
        (lambda turn: msg.EngineResume(5, turn), "resume of a version that was not verified"),
    ],
)
def test_what_was_not_verified_is_neither_committed_nor_resumed(
    request_of: Callable[[int], msg.ToEngine], said: str
) -> None:
    """Whoever asks for it: the engine goes on serving what it served."""
    service = EngineService("engine0", ModuleDriver(torch.nn.Linear(2, 2)), node="here")
    with pytest.raises(ProtocolError, match=said):
        service.handle(request_of(1), Deadline.after(5))
    told = service.handle(msg.EngineHello(), Deadline.after(5))
    assert isinstance(told, msg.EngineIs)
    assert (told.info.state, told.info.serving) == (S.SERVING.value, 0)


def test_what_a_push_that_has_ended_asked_for_is_not_done() -> None:
    service = EngineService("engine0", ModuleDriver(torch.nn.Linear(2, 2)), node="here")
    service.handle(msg.EngineRestore(None, None, "it failed", 5.0, turn=7), Deadline.after(5))
    with pytest.raises(ProtocolError, match="asked for in a push that has ended"):
        service.handle(msg.EngineResume(5, turn=6), Deadline.after(5))
