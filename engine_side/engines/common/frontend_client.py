"""The driver of an engine that is reached through its frontend: the part that is the same for every engine."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import TypeVar
from uuid import uuid4

from bridge.daemon.processes import started_at
from bridge.errors import BridgeError
from bridge.ports import expect
from bridge.protocol.codec import Completion, Sampling
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.published_state import CURRENT, lora_not_loaded
from engine_side.protocol import PromptBatch

R = TypeVar("R")
CALL_S = 60.0
"""Longest wait for a control call, which itself does no work."""
_FOREVER_S = 30 * 24 * 3600.0


class FrontendClient:
    """Base of drivers. Every method blocks until the frontend has answered, and raises PeerLost when the engine is gone
    and DeadlineExceeded.

    Attributes:
        where: the engine in messages.
    """

    where: str

    def __init__(self, on_close: Callable[[], None] | None = None) -> None:
        """`on_close` stops an engine that this driver started."""
        self._on_close = on_close
        self._token = uuid4().hex
        self._claimed = False

    # ---- the engine's part ---------------------------------------------------------------------------------------

    @abstractmethod
    def _front(self, request: msg.FrontendRequest, deadline: Deadline) -> msg.FrontendReply:
        """Send a request to the frontend and return its reply. Raises the errors that it answers with."""

    @abstractmethod
    def _require_ready(self) -> None:
        """Check an engine that was just claimed. Raises ConfigError when it cannot be driven now."""

    @abstractmethod
    def _set_weight_version(self, version: int) -> None:
        """Set the engine's own weight label."""

    @abstractmethod
    def _open_scheduling(self, state: msg.FrontendState, deadline: Deadline | None) -> None:
        """Let a paused engine run the bridge's own requests. Raises Busy when it would run kept ones as well."""

    @abstractmethod
    def _close_scheduling(self) -> None:
        """Pause again after `_open_scheduling`."""

    # ---- claim and end -------------------------------------------------------------------------------------------

    def claim(self, owner: str) -> None:
        """Take the engine for bridge `owner`.

        Raises:
            Busy: another bridge drives it.
            ConfigError: somebody else has paused it.
        """
        self._tell(msg.Claim(self._token, owner, os.getpid(), started_at(os.getpid()) or ""))
        self._claimed = True
        try:
            self._require_ready()
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        if self._claimed:
            self._claimed = False
            self._tell(msg.GiveUp(self._token))

    def close(self) -> None:
        """Give up the claim; stop an engine that this driver started. Others run on, or go on refusing. Idempotent."""
        try:
            self._give_up()
        except BridgeError:
            if self._on_close is None:
                raise
        finally:
            if self._on_close is not None:
                self._on_close()

    # ---- state ---------------------------------------------------------------------------------------------------

    def state(self, deadline: Deadline | None = None) -> msg.FrontendState:
        """Ask the frontend for its state."""
        return self._ask(msg.GetState(), msg.FrontendState, deadline)

    @property
    def refusal(self) -> str | None:
        """The reason why the engine refuses requests; None when it does not."""
        return self.state().refusal

    def refuse(self, reason: str | None) -> None:
        """Refuse waiting and new requests and end those inside the engine; None lifts the refusal."""
        self._tell(msg.Refuse(reason))

    @property
    def published(self) -> tuple[int, str | None]:
        """The version and LoRA that were published last, by whatever bridge."""
        state = self.state()
        return state.version, state.lora

    def publish(self, version: int, adapter: str | None = None) -> None:
        """Make completions report `version`, in the engine's own weight label too, and "current" mean `adapter`."""
        if adapter is not None and adapter not in self.state().loras:
            raise lora_not_loaded(adapter)
        self._set_weight_version(version)
        self._tell(msg.Publish(version, adapter))

    def end_users(self, names: Iterable[str]) -> None:
        """End, as aborted, every request that uses one of these LoRAs."""
        self._tell(msg.EndRequests(tuple(names)))

    def retire(self, names: Iterable[str]) -> None:
        """LoRAs that requests still use are dropped later."""
        self._tell(msg.Retire(tuple(names)))

    # ---- generation ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling,
        adapter: str = CURRENT,
        *,
        past_gate: bool = False,
        deadline: Deadline | None = None,
    ) -> list[Completion]:
        """Sample one completion per prompt. With `past_gate` a paused engine runs these requests and is paused again.

        Raises:
            Busy: `past_gate`, and requests that the engine keeps would run as well.
            DeadlineExceeded: the requests were ended. Without a deadline this waits for as long as they take.
        """
        state = self.state(deadline) if past_gate and prompts else None
        if state is None or not state.paused:
            return self._completions(prompts, sampling, adapter, past_gate, deadline)
        self._open_scheduling(state, deadline)
        try:
            return self._completions(prompts, sampling, adapter, past_gate, deadline)
        finally:
            self._close_scheduling()

    def _completions(
        self, prompts: PromptBatch, sampling: Sampling, adapter: str, past_gate: bool, deadline: Deadline | None
    ) -> list[Completion]:
        """The frontend ends the requests at the deadline; its answer is waited for a little longer."""
        seconds = None if deadline is None else deadline.remaining_s
        request = msg.Generate(tuple(tuple(map(int, p)) for p in prompts), sampling, adapter, past_gate, seconds)
        limit = Deadline.after(_FOREVER_S if seconds is None else seconds + CALL_S)
        return list(self._ask(request, msg.Completions, limit).completions)

    # ---- calls ---------------------------------------------------------------------------------------------------

    def _tell(self, request: msg.FrontendRequest, deadline: Deadline | None = None) -> None:
        self._ask(request, msg.FrontendDone, deadline)

    def _ask(self, request: msg.FrontendRequest, kind: type[R], deadline: Deadline | None = None) -> R:
        return expect(self._front(request, deadline or self._until()), kind, self.where)

    def _until(self) -> Deadline:
        """The deadline of a call that was given none."""
        return Deadline.after(CALL_S)
