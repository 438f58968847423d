"""Messages between a bridge's driver and the frontend of an engine, in the process where the engine's requests arrive.

That process is a server's, or the driver's own.
"""

from __future__ import annotations

from typing import Any

from bridge.protocol.codec import Completion, Message, Sampling, unpack
from bridge.protocol.coordinator_messages import Refused


class Hello(Message, frozen=True):
    """Ask who answers, and whether it sees `file`, which is `inode` on `device` for the driver."""

    file: str
    device: int
    inode: int


class Claim(Message, frozen=True):
    """Take the engine for bridge `owner`, whose driver runs in process `pid`, started at `started` (kernel's clock).
    `token` names this claim."""

    token: str
    owner: str
    pid: int
    started: str


class GiveUp(Message, frozen=True):
    """End the claim `token`; ignored when another one has followed it."""

    token: str


class Hold(Message, frozen=True):
    """Make new requests wait. `paused`: the bridge has paused the engine, or is about to. Idempotent."""

    paused: bool = False


class Release(Message, frozen=True):
    """Let waiting requests go on: the engine is not paused any more. Idempotent."""


class Refuse(Message, frozen=True):
    """Refuse new and waiting requests with `reason`, and end what runs; None lifts the refusal."""

    reason: str | None


class EndRequests(Message, frozen=True):
    """End, as aborted, every request that uses one of these LoRAs."""

    loras: tuple[str, ...]


class Retire(Message, frozen=True):
    """Drop each of these LoRAs once no request uses it."""

    loras: tuple[str, ...]


class Publish(Message, frozen=True):
    """Remember `version` as the one that serves, and `lora` as what "current" means."""

    version: int
    lora: str | None


class GetState(Message, frozen=True):
    """Ask for a FrontendState."""


class Generate(Message, frozen=True):
    """Sample one completion per prompt (token ids). `lora` is "current", "base" or a name; `past_gate` passes although
    requests are held; after `timeout_s` (None: never) the requests are ended."""

    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling
    lora: str
    past_gate: bool
    timeout_s: float | None


class FrontendIdentity(Message, frozen=True):
    """The engine's packed facts (read by its own package), the number of processes that accept requests, whether the
    file of Hello was seen, and the name of this node."""

    facts: bytes
    clients: int
    sees: bool
    node: str


class FrontendState(Message, frozen=True):
    """The state of a frontend.

    Attributes:
        version, lora: what was published last.
        paused: a bridge has paused the engine.
        held: new requests wait.
        refusal: why requests are refused; None when they are not.
        loras: names of the loaded LoRAs, those of the bridge first.
        owner: the bridge that drives the engine and is alive; "" for none.
        unfinished: number of requests inside the engine.
    """

    version: int
    lora: str | None
    paused: bool
    held: bool
    refusal: str | None
    loras: tuple[str, ...]
    owner: str
    unfinished: int


class Completions(Message, frozen=True):
    """One completion per prompt of Generate, in its order."""

    completions: tuple[Completion, ...]


class FrontendDone(Message, frozen=True):
    """The request was carried out."""


FrontendRequest = (
    Hello | Claim | GiveUp | Hold | Release | Refuse | EndRequests | Retire | Publish | GetState | Generate
)
FrontendReply = FrontendIdentity | FrontendState | Completions | FrontendDone | Refused


def read_reply(frame: bytes, where: str) -> FrontendReply:
    """Decode a reply that came over HTTP. Raises the error that the frontend answered with, ProtocolError."""
    answer: Any = unpack(frame, FrontendReply)
    if isinstance(answer, Refused):
        raise answer.error.rebuild(where)
    reply: FrontendReply = answer
    return reply
