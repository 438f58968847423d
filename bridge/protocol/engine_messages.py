"""Messages from the coordinator to one engine's service, and the service's replies; frozen structs in `codec` frames.

A request that concerns ranks carries the rank job as it is (`bridge.protocol.rank_jobs`). Deadlines are not part of a
message: they travel beside it, as the seconds that remain.
"""

from __future__ import annotations

from bridge.model.canary import DEFAULT_FLOOR
from bridge.model.receipt import EngineReport, LevelResult
from bridge.protocol.codec import Completion, ErrorInfo, Message, Sampling
from bridge.protocol.coordinator_messages import EngineInfo, Reference, Refused
from bridge.protocol.rank_jobs import AnyJob, LoadJob, Prompts, RankReply, ReadBackJob, Scores, VerifyJob
from bridge.push_settings import PushSettings

# ---- coordinator -> engine service ---------------------------------------------------------------------------------


class EngineHello(Message, frozen=True):
    """Ask an engine for its facts. Answered at any time, also during a push."""


class EngineClaim(Message, frozen=True):
    """Claim the engine for bridge `owner` and give its ranks their pages of the mailbox, from `page` on."""

    mailbox: str
    page: int
    owner: str


class EngineRun(Message, frozen=True):
    """Run one job on every rank that neither loads weights nor changes what is served."""

    job: AnyJob


class EngineReadBack(Message, frozen=True):
    """Write what this engine serves into the job's slot: live weights read back, and where they are packed what the
    last commit left in `held_slot` of `held_plan`, else the engine's own checkpoint. The sender compares the result
    with the engine."""

    job: ReadBackJob
    held_plan: int | None = None
    held_slot: int | None = None


class EngineLoad(Message, frozen=True):
    """Pause, load and verify a sealed slot; the engine stays paused.

    Attributes:
        version: the version to be served. `sealed` is the one that the slot was sealed as, with root digest `root`.
        check: digest the arena again (once per node).
        reference: the trainer's canary. `base`: for an adapter, the trainer's answers without it.
        turn: counts the coordinator's attempts, here and in the three messages that follow. An engine that hung finds
            requests of an attempt that has ended in its queue, and must not act on them after a later attempt began.
        canary_floor: the canary's floor for this engine's dtypes.
        unmoved: the weights (for an adapter, those below it) are bit for bit what the engine holds already. In an
            engine that nothing was written to yet, the canary then measures the engine's own noise.
        keeps: for weights, the adapter that will be served over them; requests of all others are ended, because they
            belong to the weights before.
    """

    job: LoadJob
    version: int
    sealed: int
    root: bytes
    check: bool
    reference: Reference | None = None
    base: Reference | None = None
    canary_floor: float = DEFAULT_FLOOR
    unmoved: bool = False
    turn: int = 0
    keeps: str | None = None


class EngineCommit(Message, frozen=True):
    """Reset the caches and check them; the engine stays paused."""

    version: int
    settings: PushSettings
    turn: int = 0


class EngineResume(Message, frozen=True):
    """Publish `version` and serve it. `lora` is what "current" means from now on (None: the base model); the bridge's
    other adapters are retired."""

    version: int
    turn: int = 0
    lora: str | None = None


class EngineRestore(Message, frozen=True):
    """Go back to `version` with the adapter `lora`: load `job`, verify, resume. Without a job the engine is
    quarantined. An engine whose weights were not touched and that serves just that only resumes.

    `timeout_s`: seconds for the way back, counted from when the engine begins it: an engine that was late for a push
    must still have them, however short the sender waits for its answer.
    """

    job: LoadJob | None
    version: int | None
    reason: str
    timeout_s: float
    turn: int = 0
    lora: str | None = None


class EngineCheck(Message, frozen=True):
    """Compare what the engine serves with the arena, and answer canary prompts. Writes nothing.

    Refused with Busy unless the engine serves `version`. `scored` names the adapter that the prompts are answered with.
    """

    job: VerifyJob
    version: int
    prompts: Prompts = ()
    scored: str | None = None


class EngineGenerate(Message, frozen=True):
    """Sample completions; what has not finished after `timeout_s` seconds is ended."""

    prompts: Prompts
    sampling: Sampling
    adapter: str = "current"
    timeout_s: float = 600.0


class EngineClose(Message, frozen=True):
    """Let go of the arenas and give the engine up."""


ToEngine = (
    EngineHello
    | EngineClaim
    | EngineRun
    | EngineReadBack
    | EngineLoad
    | EngineCommit
    | EngineResume
    | EngineRestore
    | EngineCheck
    | EngineGenerate
    | EngineClose
)


# ---- engine service -> coordinator ---------------------------------------------------------------------------------


class EngineIs(Message, frozen=True):
    """The engine's facts."""

    info: EngineInfo


class EngineRan(Message, frozen=True):
    """The ranks' answers, in rank order."""

    answers: tuple[RankReply, ...]


class EngineLoaded(Message, frozen=True):
    """The vote after load and verification. `error` set: do not commit. `touched`: live parameters may have been
    written."""

    report: EngineReport
    touched: bool
    error: ErrorInfo | None = None
    phases: dict[str, float] = {}
    notes: tuple[str, ...] = ()


class EngineChecked(Message, frozen=True):
    """Levels per rank, and the canary's log-probabilities if prompts were sent."""

    ranks: tuple[tuple[LevelResult, ...], ...]
    scores: Scores = ()


class EngineGenerated(Message, frozen=True):
    """Completions in the order of the prompts."""

    completions: tuple[Completion, ...]


class EngineVersionZero(Message, frozen=True):
    """Result of an EngineReadBack: `ok` when the slot holds what this engine serves, from which `source` ("live",
    "stored"), and the reason otherwise."""

    ok: bool
    source: str
    reason: str = ""


class EngineOk(Message, frozen=True):
    """The request was carried out; the engine's state afterwards."""

    report: EngineReport


FromEngine = (
    EngineIs | EngineRan | EngineLoaded | EngineChecked | EngineGenerated | EngineVersionZero | EngineOk | Refused
)
