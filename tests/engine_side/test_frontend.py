"""The part of an engine's frontend that is the same for every engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable

import pytest

from bridge.daemon.processes import started_at
from bridge.errors import Busy, DeadlineExceeded
from bridge.protocol.codec import Completion
from engine_side.engines.common import frontend
from engine_side.engines.common import frontend_messages as msg


class IdleFrontend(frontend.Frontend):
    """Of an engine without requests; with `stuck`, one of its requests never arrives."""

    name = "idle"

    def __init__(self, stuck: bool = False) -> None:
        super().__init__()
        self.stuck = stuck
        self.shut = False

    def _facts(self) -> tuple[bytes, int]:
        return b"", 1

    @property
    def _held(self) -> bool:
        return self.shut

    async def _list_loras(self) -> tuple[str, ...]:
        return ()

    def _count_unfinished(self) -> int:
        return 0

    async def _close_gate(self) -> None:
        self.shut = True
        while self.stuck:
            await asyncio.sleep(0.001)

    async def _open_gate(self) -> None:
        self.shut = False

    async def _stop_engine(self) -> None: ...

    async def _resume_engine(self) -> None: ...

    async def _end_requests(self, loras: Iterable[str]) -> None: ...

    async def _retire_loras(self, loras: Iterable[str]) -> None: ...

    async def _generate(self, request: msg.Generate) -> list[Completion]:
        return []


def claim(token: str, pid: int) -> msg.Claim:
    return msg.Claim(token, f"bridge {token}", pid, started_at(pid) or "")


def test_a_hold_ends_although_a_request_never_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend, "HOLD_S", 0.05)
    front = IdleFrontend(stuck=True)
    with pytest.raises(DeadlineExceeded, match="did not arrive"):
        asyncio.run(front.handle(msg.Hold()))


def test_hold_and_release_say_whether_the_engine_is_paused() -> None:
    async def states() -> list[tuple[bool, bool]]:
        front, found = IdleFrontend(), []
        for request in (msg.Hold(), msg.Hold(paused=True), msg.Hold(), msg.Release()):
            assert await front.handle(request) == msg.FrontendDone()
            state = await front.handle(msg.GetState())
            assert isinstance(state, msg.FrontendState)
            found.append((state.held, state.paused))
        return found

    assert asyncio.run(states()) == [(True, False), (True, True), (True, True), (False, False)]


def test_a_claim_of_a_living_process_keeps_others_out() -> None:
    async def run() -> None:
        front = IdleFrontend()
        await front.handle(claim("one", os.getpid()))
        with pytest.raises(Busy, match="bridge one"):
            await front.handle(claim("two", os.getpid()))
        await front.handle(msg.GiveUp("two"))  # of nobody's claim
        with pytest.raises(Busy):
            await front.handle(claim("two", os.getpid()))
        await front.handle(msg.GiveUp("one"))
        await front.handle(claim("two", os.getpid()))

    asyncio.run(run())
