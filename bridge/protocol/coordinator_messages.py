"""Messages from a trainer's process (or the command line) to the coordinator, and its replies; frozen structs in
`codec` frames.

A steady push sends one small frame per step whatever the number of tensors, since the manifest was agreed before.
Deadlines are not part of a message: they travel beside it, as the seconds that remain. The coordinator talks to
engines in `engine_messages`, and those to their ranks in `rank_jobs`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from bridge.model import canary
from bridge.model.declared_losses import DeclaredLosses, Noise, Rounding
from bridge.model.lora_format import LoraLimits, LoraSpec
from bridge.model.manifest import Manifest, TensorInfo
from bridge.model.receipt import Receipt
from bridge.protocol.codec import ErrorInfo, Message
from bridge.protocol.rank_jobs import Prompts, Scores
from bridge.push_settings import PushSettings


class Rounded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The trainer's log-probabilities with rounding in its forward."""

    rounding: Rounding
    logprobs: Scores


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The trainer's canary: prompts and the log-probability of each next token, in nats.

    `rounded` holds the same with the rounding of engines that declare losses: how much of a difference these explain.
    """

    prompts: Prompts
    logprobs: Scores
    rounded: tuple[Rounded, ...] = ()

    def rounding_of(self, losses: DeclaredLosses) -> float | None:
        """Compute what rounding as these losses do changes in the trainer, as a fraction of the standard deviation of
        its log-probabilities. None where it did not round so."""
        for found in self.rounded:
            if found.rounding == losses.rounding(found.rounding.codes):
                return canary.fraction_of(self.logprobs, found.logprobs)
        return None


class EngineInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Facts of one engine, as its service tells them.

    Attributes:
        state, serving: its `EngineState` and the version that it serves (None: nothing).
        max_prompt: longest prompt in tokens that can be scored and continued by one; None: no limit.
        lora: LoRA limits; None for an engine that was started without LoRA.
        adapter: the LoRA adapter that "current" means now.
        adapters: the LoRA adapters that pushes have loaded and that it still holds.
        losses: what its configuration declares to be stored or computed more coarsely than its weights' dtype.
        noise: what these were measured to change before the first load; None: not known.
    """

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
    adapters: tuple[str, ...] = ()
    losses: DeclaredLosses = DeclaredLosses()
    noise: Noise | None = None


class Refused(Message, frozen=True):
    """The request raised: the error as data, for a caller in another process."""

    error: ErrorInfo


# ---- trainer process -> coordinator --------------------------------------------------------------------------------


class StatusRequest(Message, frozen=True):
    """Ask for name, engines and versions: everything a client needs to connect. Answered at once, also during a
    push."""


class PlanRequest(Message, frozen=True):
    """Announce a layout and have every engine plan it. `bound`: a model is bound, so names are canonical. With `lora`
    the tensors are an adapter's. `independent`: names of which the trainer has shown that its logits do not depend on
    them. `unsent`: of a subset of a bound model, the names of its other tensors."""

    tensors: tuple[TensorInfo, ...]
    partial: bool
    bound: bool
    lora: LoraSpec | None = None
    independent: tuple[str, ...] = ()
    unsent: tuple[str, ...] = ()


class BeginRequest(Message, frozen=True):
    """Ask for a free slot. Refused with Busy while another push is open, StaleVersion for an old version.

    Attributes:
        holder: who pushes, as the lease names it.
        compare: nothing will be pushed; the slot is for a `CompareRequest`, and no version is issued (it is 0).
        over: begin nothing, and say so, unless this push brought the weights that the engines serve.
    """

    plan: int
    version: int | None
    holder: str
    compare: bool = False
    over: int | None = None


class CompareRequest(Message, frozen=True):
    """The slot of a `compare` begin is sealed: ask which of its tensors differ from the weights that engines serve."""

    root: bytes


class CancelRequest(Message, frozen=True):
    """Drop a push that was begun and not submitted; the slot stays unsealed."""

    version: int


class SubmitRequest(Message, frozen=True):
    """The slot is sealed: run the push. Answered as soon as it is journalled; the push goes on without the trainer.

    Attributes:
        phases: seconds that the trainer's side took so far. `wire_nbytes`: bytes written to the arena.
        reference: the trainer's canary. `base`: for an adapter, the trainer's answers without it.
        proven: nothing that was to be shown is open: for an adapter, the engines' base weights were compared with the
            trainer's; the canary has its reference, if it was asked for or is the default.
    """

    version: int
    root: bytes
    settings: PushSettings
    phases: dict[str, float]
    wire_nbytes: int
    notes: tuple[str, ...] = ()
    reference: Reference | None = None
    base: Reference | None = None
    proven: bool = True


class WaitRequest(Message, frozen=True):
    """Ask for the end of a push; blocks at most `timeout_s` seconds."""

    version: int
    timeout_s: float


class RollbackRequest(Message, frozen=True):
    """Serve the version before the last committed one again. `timeout_s` bounds what the engines do."""

    timeout_s: float


class HealthRequest(Message, frozen=True):
    """Examine the engines, unless a push or a plan occupies them."""


class HistoryRequest(Message, frozen=True):
    """Ask for the newest receipts of the journal."""

    last: int = 20


class ExplainRequest(Message, frozen=True):
    """Ask where a canonical tensor goes in every engine."""

    name: str


class CloseRequest(Message, frozen=True):
    """Stop engines gracefully and unlink the arenas."""


ToCoordinator = (
    StatusRequest
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


# ---- coordinator -> trainer process --------------------------------------------------------------------------------


class DaemonStatus(Message, frozen=True):
    """The coordinator's state.

    Attributes:
        engines: each engine's facts; those of an engine that did not answer at once are the last known ones.
        committed: the version that all engines were last brought to. `highest`: the highest ever issued.
        busy: the version of the push in flight.
        mode: mode of the push that brought what is served; None: the engines' own checkpoint.
        weights: version of the push that brought the weights that are served.
        adapter: version of the push that brought the LoRA adapter that is served over them, if one is. Its name is
            each engine's to tell.
    """

    name: str
    engines: tuple[EngineInfo, ...]
    committed: int | None
    highest: int
    node: str
    pid: int
    busy: int | None = None
    mode: str | None = None
    weights: int | None = None
    adapter: int | None = None


class PlanAnswer(Message, frozen=True):
    """The answer to a PlanRequest: `Planned` or `Unproven`."""


class Planned(PlanAnswer, frozen=True):
    """Write manifest-shaped versions into the arena at `path`, under the id `plan`.

    Attributes:
        unused: announced tensors that no engine uses; the manifest lacks them.
        partners: tensors that an engine ties to another one -> that one. A version is right only where they are equal.
    """

    plan: int
    manifest: Manifest
    path: str
    unused: tuple[str, ...] = ()
    partners: dict[str, str] = {}


class Unproven(PlanAnswer, frozen=True):
    """There is no plan yet: `engines` have no place for these names, and the trainer has to show first that its logits
    do not depend on them."""

    names: tuple[str, ...]
    engines: tuple[str, ...]


class Begun(Message, frozen=True):
    """Write `version` into `slot`; tensors that are not sent are carried over from slot `base`. `slot` None: nothing
    was begun, because other weights are served than those that were asked for."""

    version: int
    slot: int | None
    base: int | None


class Compared(Message, frozen=True):
    """Names of tensors that differ. `known` False: there is nothing to compare with. `weights`: version of the push
    that brought the weights (not the adapter) which the engines serve now; 0: their own checkpoint."""

    known: bool
    differing: tuple[str, ...] = ()
    weights: int | None = None


class Accepted(Message, frozen=True):
    """The request was carried out, or is under way."""


class Finished(Message, frozen=True):
    """A push has ended, or not yet: then receipt and error are None.

    `aborted`: engines had been written to and were put back; without it an `error` means that nothing was touched.
    `serving`: engine -> version that it serves now.
    """

    receipt: Receipt | None
    error: ErrorInfo | None = None
    aborted: bool = False
    serving: dict[str, int | None] = {}


class HealthFacts(Message, frozen=True):
    """A `bridge.coordinator.health.HealthReport` as plain data."""

    facts: dict[str, Any]


class History(Message, frozen=True):
    """Receipts as plain data, oldest first."""

    receipts: tuple[dict[str, Any], ...]


class Explained(Message, frozen=True):
    """A row per engine, rank and move."""

    rows: tuple[dict[str, str], ...]


FromCoordinator = (
    DaemonStatus
    | Planned
    | Unproven
    | Begun
    | Compared
    | Accepted
    | Finished
    | HealthFacts
    | History
    | Explained
    | Refused
)
