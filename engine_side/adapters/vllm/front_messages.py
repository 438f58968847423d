"""What a bridge says to the front of an AsyncLLM, and what it answers. `where` is a probe file: "PATH DEVICE INODE"."""

from __future__ import annotations

from bridge.wire import Completion, ErrorInfo, Message, Sampling
from engine_side.adapters.vllm.facts import Facts


class Hello(Message, frozen=True):
    """Who are you, and do you see this file and the process that asks?"""

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


class End(Message, frozen=True):
    """End, as aborted, what uses one of these adapters."""

    adapters: tuple[str, ...]


class Note(Message, frozen=True):
    """The bridge has paused the engine, or let it go on."""

    paused: bool


class Published(Message, frozen=True):
    version: int
    adapter: str | None


class Retire(Message, frozen=True):
    adapters: tuple[str, ...]


class Ask(Message, frozen=True):
    """What is it that you serve, and what do you hold?"""


class Generate(Message, frozen=True):
    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling
    adapter: str
    past_gate: bool
    timeout_s: float | None


class FrontIs(Message, frozen=True):
    """`clients` is the number of API server processes in front of the engine, `sees` whether the probe is there,
    `sees_process` whether the asker's process is visible."""

    facts: Facts
    vllm: str
    clients: int
    sees: bool
    node: str


class State(Message, frozen=True):
    """`adapters`: those of the bridge, then `#id` for others. `owner`: who drives it, "" nobody (alive)."""

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


class Done(Message, frozen=True):
    pass


class Failed(Message, frozen=True):
    error: ErrorInfo


ToFront = Hello | Claim | GiveUp | Hold | Release | Refuse | End | Note | Published | Retire | Ask | Generate
FromFront = FrontIs | State | Completions | Done | Failed
