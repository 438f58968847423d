"""What a bridge says to the front of an engine, and what it answers. The front is in the process where requests come
in: a server's, or ours."""

from __future__ import annotations

from bridge.protocol.codec import Completion, ErrorInfo, Message, Sampling


class Hello(Message, frozen=True):
    """Who are you, and do you see this file, which is `inode` on `device` for whoever asks?"""

    file: str
    device: int
    inode: int


class Claim(Message, frozen=True):
    """`token` drives this engine from now on, for bridge `owner`, in process `pid` that the kernel started at
    `started`."""

    token: str
    owner: str
    pid: int
    started: str


class GiveUp(Message, frozen=True):
    token: str


class Hold(Message, frozen=True):
    """New requests wait."""


class Release(Message, frozen=True):
    """They go on."""


class Refuse(Message, frozen=True):
    """New requests, and those that wait, are refused with this reason; None lifts it."""

    reason: str | None


class EndRequests(Message, frozen=True):
    """EndRequests, as aborted, what uses one of these adapters."""

    adapters: tuple[str, ...]


class Note(Message, frozen=True):
    """The bridge has paused the engine, or let it go on."""

    paused: bool


class Publish(Message, frozen=True):
    version: int
    adapter: str | None


class Retire(Message, frozen=True):
    adapters: tuple[str, ...]


class GetState(Message, frozen=True):
    """What is it that you serve, and what do you hold?"""


class Generate(Message, frozen=True):
    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling
    adapter: str
    past_gate: bool
    timeout_s: float | None


class FrontendIdentity(Message, frozen=True):
    """`facts` are the engine's own, packed by those who know it; `clients` is the number of processes that take
    requests in, `sees` whether the file is there, `node` this machine's name."""

    version: str
    facts: bytes
    clients: int
    sees: bool
    node: str


class FrontendState(Message, frozen=True):
    """`adapters`: those of the bridge, then what the engine calls others. `owner`: who drives it, "" nobody (alive).
    `held`: new requests wait. `unfinished`: requests that are not the bridge's own way past the gate."""

    version: int
    adapter: str | None
    paused: bool
    held: bool
    refusal: str | None
    adapters: tuple[str, ...]
    owner: str
    unfinished: int


class Completions(Message, frozen=True):
    completions: tuple[Completion, ...]


class FrontendDone(Message, frozen=True):
    pass


class FrontendFailed(Message, frozen=True):
    error: ErrorInfo


FrontendRequest = (
    Hello | Claim | GiveUp | Hold | Release | Refuse | EndRequests | Note | Publish | Retire | GetState | Generate
)
FrontendReply = FrontendIdentity | FrontendState | Completions | FrontendDone | FrontendFailed
