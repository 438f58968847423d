"""Who says what to whom, in frozen structs that travel as `wire` frames:

- trainer process -> coordinator (`ToCoordinator`): plan, begin, submit, wait, and the questions of the command line;
- coordinator -> engine service (`ToEngine`): bake, map an arena, load, commit, resume, restore;
- engine service -> rank: see `jobs`.

A steady push sends one small frame per step whatever the number of tensors: the manifest was agreed before.
"""

from __future__ import annotations

from typing import Any

import msgspec

from bridge.jobs import Prompts, RankBake, Scores
from bridge.lora import AdapterSpec, LoraLimits
from bridge.manifest import Manifest, TensorInfo
from bridge.receipt import EngineReport, LevelResult, Receipt
from bridge.wire import Completion, ErrorInfo, Message, Sampling


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a push was asked to do, as `Bridge.push` documents it."""

    verify: str = "weights"
    levels: tuple[str, ...] = ()
    inflight: str = "abort"
    kv: str = "reset"
    partial: bool = False
    mode: str = "full"
    reason: str = ""
    timeout_s: float = 300.0


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The trainer's canary: prompts and the log-probability of each next token, in nats."""

    prompts: Prompts
    logprobs: Scores


class EngineInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine says about itself."""

    id: str
    kind: str
    ranks: int
    can_generate: bool
    state: str
    serving: int | None
    node: str
    pid: int
    detail: str = ""
    max_prompt: int | None = None
    lora: LoraLimits | None = None
    adapter: str | None = None
    """The adapter that `current` means now."""


# ---- coordinator -> engine service ---------------------------------------------------------------------------------


class EngineHello(Message, frozen=True):
    """Who are you. `mailbox` and `page` give the engine its pages and claim it for bridge `owner`; None asks only."""

    mailbox: str | None = None
    page: int = 0
    owner: str = ""


class EngineBake(Message, frozen=True):
    plan: int
    tensors: tuple[TensorInfo, ...]
    partial: bool
    timeout_s: float


class EngineMap(Message, frozen=True):
    plan: int
    path: str
    manifest: Manifest
    keep: tuple[int, ...]
    timeout_s: float


class EngineForget(Message, frozen=True):
    """Let go of every plan except `keep`: their arenas are gone."""

    keep: tuple[int, ...]
    timeout_s: float = 30.0


class EngineReadBack(Message, frozen=True):
    """Write what this engine serves into `slot`: live weights read back, and where they are packed what the last commit
    left in `held_slot` of `held_plan`, else the engine's own checkpoint. The asker compares it with the engine."""

    plan: int
    slot: int
    timeout_s: float
    held_plan: int | None = None
    held_slot: int | None = None


class EngineLoad(Message, frozen=True):
    """Pause, load, verify; stays paused. `check` also re-digests the arena (once per node).

    `turn`, here and in the three that follow, counts the coordinator's attempts: an engine that hung finds what was
    asked of it meanwhile in its queue, and nothing of an attempt that has ended may be done after a later one.
    """

    plan: int
    slot: int
    version: int
    root: bytes
    check: bool
    options: Options
    reference: Reference | None = None
    canary_floor: float = 0.05
    canary_baseline: float | None = None
    changed: tuple[int, ...] | None = None
    previous: int | None = None
    turn: int = 0


class EngineCommit(Message, frozen=True):
    """Reset caches and check them; stays paused."""

    version: int
    options: Options
    timeout_s: float
    turn: int = 0


class EngineResume(Message, frozen=True):
    """Publish `version` and serve it."""

    version: int
    timeout_s: float
    turn: int = 0


class EngineRestore(Message, frozen=True):
    """Go back to `version`: from `slot`, verified, then resume. Without a slot, quarantine. An engine whose weights
    were not touched only resumes."""

    plan: int
    slot: int | None
    version: int | None
    reason: str
    timeout_s: float
    retry: bool = True
    turn: int = 0


class EngineCheck(Message, frozen=True):
    """Fresh read-back (and probe) of the served version against the arena, and fresh canary scores. Writes nothing.
    Refused with Busy when the engine does not serve `version` any more; None checks whatever it holds."""

    plan: int
    slot: int
    levels: tuple[str, ...]
    prompts: Prompts = ()
    version: int | None = None
    timeout_s: float = 60.0


class EngineExplain(Message, frozen=True):
    plan: int
    name: str
    timeout_s: float = 60.0


class EngineGenerate(Message, frozen=True):
    prompts: Prompts
    sampling: Sampling
    adapter: str = "current"


class EngineClose(Message, frozen=True):
    pass


ToEngine = (
    EngineHello
    | EngineBake
    | EngineMap
    | EngineForget
    | EngineReadBack
    | EngineLoad
    | EngineCommit
    | EngineResume
    | EngineRestore
    | EngineCheck
    | EngineExplain
    | EngineGenerate
    | EngineClose
)


class EngineIs(Message, frozen=True):
    info: EngineInfo


class EngineBaked(Message, frozen=True):
    ranks: tuple[RankBake, ...]


class EngineLoaded(Message, frozen=True):
    """The vote after load and verify. `error` set: do not commit. `touched`: live parameters may have been written."""

    report: EngineReport
    touched: bool
    error: ErrorInfo | None = None
    phases: dict[str, float] = {}
    notes: tuple[str, ...] = ()


class EngineChecked(Message, frozen=True):
    ranks: tuple[tuple[LevelResult, ...], ...]
    scores: Scores = ()


class EngineExplained(Message, frozen=True):
    rows: tuple[dict[str, str], ...]


class EngineGenerated(Message, frozen=True):
    completions: tuple[Completion, ...]


class EngineVersionZero(Message, frozen=True):
    """Whether `slot` now holds this engine's version 0, and why not."""

    ok: bool
    source: str
    reason: str = ""


class EngineOk(Message, frozen=True):
    report: EngineReport


class Refused(Message, frozen=True):
    """The request raised; `serving` and `receipt` when a push was aborted."""

    error: ErrorInfo
    serving: dict[str, int | None] = {}
    receipt: Receipt | None = None


FromEngine = (
    EngineIs
    | EngineBaked
    | EngineLoaded
    | EngineChecked
    | EngineExplained
    | EngineGenerated
    | EngineVersionZero
    | EngineOk
    | Refused
)


# ---- trainer process -> coordinator --------------------------------------------------------------------------------


class Ask(Message, frozen=True):
    """Name, engines, versions: everything a client needs to connect."""


class PlanRequest(Message, frozen=True):
    tensors: tuple[TensorInfo, ...]
    partial: bool
    bound: bool
    timeout_s: float


class BeginRequest(Message, frozen=True):
    """Ask for a free slot. Refused with Busy while another push is open, StaleVersion for an old version."""

    plan: int
    version: int | None
    holder: str


class CancelRequest(Message, frozen=True):
    """Drop a push that was begun and not submitted; the slot stays unsealed."""

    version: int


class SubmitRequest(Message, frozen=True):
    """The slot is sealed: run the push. Answered as soon as it is journalled; it goes on without the trainer."""

    version: int
    root: bytes
    options: Options
    phases: dict[str, float]
    wire_nbytes: int
    reference: Reference | None = None
    notes: tuple[str, ...] = ()
    sent: tuple[str, ...] | None = None


class WaitRequest(Message, frozen=True):
    version: int
    timeout_s: float


class RollbackRequest(Message, frozen=True):
    timeout_s: float


class HealthRequest(Message, frozen=True):
    timeout_s: float = 120.0


class HistoryRequest(Message, frozen=True):
    last: int = 20


class ExplainRequest(Message, frozen=True):
    name: str


class CloseRequest(Message, frozen=True):
    """Stop engines gracefully and unlink the arena."""


ToCoordinator = (
    Ask
    | PlanRequest
    | BeginRequest
    | CancelRequest
    | SubmitRequest
    | WaitRequest
    | RollbackRequest
    | HealthRequest
    | HistoryRequest
    | ExplainRequest
    | CloseRequest
)


class DaemonIs(Message, frozen=True):
    """`epoch` changes whenever a plan must be asked for again."""

    name: str
    engines: tuple[EngineInfo, ...]
    committed: int | None
    highest: int
    epoch: int
    node: str
    pid: int
    busy: int | None = None


class Planned(Message, frozen=True):
    """Write manifest-shaped versions into the arena at `path`. `base`: the slot that holds the committed version, to
    carry unsent tensors of a partial push from; None when there is none."""

    plan: int
    epoch: int
    manifest: Manifest
    path: str


class Begun(Message, frozen=True):
    version: int
    slot: int
    base: int | None
    timeout_s: float = 300.0


class Done(Message, frozen=True):
    pass


class Finished(Message, frozen=True):
    """A push has ended (or not yet: receipt and error are None). `aborted`: engines had been written to and were put
    back; without it an `error` means that nothing was touched."""

    receipt: Receipt | None
    error: ErrorInfo | None = None
    aborted: bool = False
    serving: dict[str, int | None] = {}


class Health(Message, frozen=True):
    facts: dict[str, Any]


class History(Message, frozen=True):
    receipts: tuple[dict[str, Any], ...]


class Explained(Message, frozen=True):
    rows: tuple[dict[str, str], ...]


FromCoordinator = DaemonIs | Planned | Begun | Done | Finished | Health | History | Explained | Refused
