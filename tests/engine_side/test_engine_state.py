"""The states of an engine: which step follows which, and what it serves in each."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import ProtocolError
from bridge.model.engine_state import TRANSITIONS, EngineState
from engine_side.driver.service import Standing

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
