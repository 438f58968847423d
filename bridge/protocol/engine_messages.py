"""What a coordinator and an engine service say to each other, in frozen structs that travel as `wire` frames."""

from __future__ import annotations

from bridge.model.lora_format import LoraSpec
from bridge.model.manifest import Manifest, TensorInfo
from bridge.model.receipt import EngineReport, LevelResult
from bridge.protocol.codec import Completion, ErrorInfo, Message, Sampling
from bridge.protocol.coordinator_messages import EngineInfo, Options, Reference, Refused
from bridge.protocol.rank_jobs import Prompts, RankBake, Scores

# ---- coordinator -> engine service ---------------------------------------------------------------------------------


class EngineHello(Message, frozen=True):
    """Who are you. `mailbox` and `page` give the engine its pages and claim it for bridge `owner`; None asks only."""

    mailbox: str | None = None
    page: int = 0
    owner: str = ""


class EngineBake(Message, frozen=True):
    """With `adapter` the tensors are an adapter's (`bridge.model.lora_format`), else the model's."""

    plan: int
    tensors: tuple[TensorInfo, ...]
    partial: bool
    timeout_s: float
    adapter: LoraSpec | None = None


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
    """Pause, load, verify; stays paused. The slot was sealed as `sealed` and is to be served as `version`. `check` also
    re-digests the arena (once per node).

    `turn`, here and in the three that follow, counts the coordinator's attempts: an engine that hung finds what was
    asked of it meanwhile in its queue, and nothing of an attempt that has ended may be done after a later one.

    With `adapter` the slot holds an adapter, which is loaded under this new name beside the others; `base` is then what
    the trainer answers without it. Otherwise it holds weights, and `keeps` is the adapter that will be served over
    them: requests of any other one are ended, for it belongs to the weights before.
    """

    plan: int
    slot: int
    version: int
    sealed: int
    root: bytes
    check: bool
    options: Options
    reference: Reference | None = None
    canary_floor: float = 0.05
    canary_baseline: float | None = None
    changed: tuple[int, ...] | None = None
    previous: int | None = None
    turn: int = 0
    adapter: str | None = None
    base: Reference | None = None
    keeps: str | None = None


class EngineCommit(Message, frozen=True):
    """Reset caches and check them; stays paused."""

    version: int
    options: Options
    timeout_s: float
    turn: int = 0


class EngineResume(Message, frozen=True):
    """Publish `version` and serve it; `adapter` is what "current" means from now on (None: the base model), the
    bridge's other adapters are retired."""

    version: int
    timeout_s: float
    turn: int = 0
    adapter: str | None = None


class EngineRestore(Message, frozen=True):
    """Go back to `version` with `adapter`: weights from `slot`, verified, then resume. Without a slot, quarantine. An
    engine whose weights were not touched and that serves just that only resumes."""

    plan: int
    slot: int | None
    version: int | None
    reason: str
    timeout_s: float
    retry: bool = True
    turn: int = 0
    adapter: str | None = None


class EngineCheck(Message, frozen=True):
    """Fresh read-back (and probe) of the served version against the arena, and fresh canary scores. Writes nothing.
    Refused with Busy when the engine does not serve `version` any more; None checks whatever it holds. `loaded` names
    the adapter that an adapter's plan is weighed against, `scored` the one that the prompts are answered with."""

    plan: int
    slot: int
    levels: tuple[str, ...]
    prompts: Prompts = ()
    version: int | None = None
    timeout_s: float = 60.0
    loaded: str | None = None
    scored: str | None = None


class EngineExplain(Message, frozen=True):
    plan: int
    name: str
    timeout_s: float = 60.0


class EngineGenerate(Message, frozen=True):
    """What has not finished after `timeout_s` is ended."""

    prompts: Prompts
    sampling: Sampling
    adapter: str = "current"
    timeout_s: float = 600.0


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
