"""Who says what to whom, in frozen structs that travel as `wire` frames:

- trainer process -> coordinator (`ToCoordinator`): plan, begin, submit, wait, and the questions of the command line;
- coordinator -> engine service (`ToEngine`): bake, map an arena, load, commit, resume, restore;
- engine service -> rank: see `jobs`.

A steady push sends one small frame per step whatever the number of tensors: the manifest was agreed before.
"""

from __future__ import annotations

from typing import Any

import msgspec

from bridge.model.lora_format import LoraLimits, LoraSpec
from bridge.model.manifest import Manifest, TensorInfo
from bridge.model.receipt import Receipt
from bridge.protocol.codec import ErrorInfo, Message
from bridge.protocol.rank_jobs import Prompts, Scores


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
    adapters: tuple[str, ...] = ()
    """Those that pushes have loaded and that it still holds."""


class Refused(Message, frozen=True):
    """The request raised; `serving` and `receipt` when a push was aborted."""

    error: ErrorInfo
    serving: dict[str, int | None] = {}
    receipt: Receipt | None = None


# ---- trainer process -> coordinator --------------------------------------------------------------------------------


class Ask(Message, frozen=True):
    """Name, engines, versions: everything a client needs to connect."""


class PlanRequest(Message, frozen=True):
    tensors: tuple[TensorInfo, ...]
    partial: bool
    bound: bool
    timeout_s: float
    adapter: LoraSpec | None = None


class BeginRequest(Message, frozen=True):
    """Ask for a free slot. Refused with Busy while another push is open, StaleVersion for an old version. With
    `compare` nothing will be pushed: the slot is for a `CompareRequest`, and no version is issued (it is 0). With
    `over` nothing is begun, and Begun says so, unless that push brought the weights which the engines serve."""

    plan: int
    version: int | None
    holder: str
    compare: bool = False
    over: int | None = None


class CompareRequest(Message, frozen=True):
    """The slot of a `compare` begin is sealed: which of its tensors differ from the weights that the engines serve?"""

    root: bytes


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
    base: Reference | None = None
    """Of an adapter: what the trainer answers without it."""
    base_proven: bool = True
    """Of an adapter: the engines' base weights were compared with the trainer's."""


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
    | CompareRequest
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
    """`epoch` changes whenever a plan must be asked for again. Which name the adapter has is each engine's to say."""

    name: str
    engines: tuple[EngineInfo, ...]
    committed: int | None
    highest: int
    epoch: int
    node: str
    pid: int
    busy: int | None = None
    mode: str | None = None
    """The mode of the push that brought what is served; None for the engines' own checkpoint."""
    weights: int | None = None
    """The version that brought the weights which are served."""
    adapter: int | None = None
    """The version that brought the adapter which is served over them, if one is."""


class Planned(Message, frozen=True):
    """Write manifest-shaped versions into the arena at `path`. `base`: the slot that holds the committed version, to
    carry unsent tensors of a partial push from; None when there is none."""

    plan: int
    epoch: int
    manifest: Manifest
    path: str


class Begun(Message, frozen=True):
    """`slot` None: nothing was begun, other weights are served than those that were asked for."""

    version: int
    slot: int | None
    base: int | None


class Compared(Message, frozen=True):
    """`known` False: there is nothing to compare with. `weights`: the push that brought the weights (not the adapter)
    which the engines serve now; 0 their own checkpoint's."""

    known: bool
    differing: tuple[str, ...] = ()
    weights: int | None = None


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


FromCoordinator = DaemonIs | Planned | Begun | Compared | Done | Finished | Health | History | Explained | Refused
