"""Rank jobs: what an engine's ranks are told to do, and how they answer.

One job goes to every rank of an engine, as it was made by the coordinator or the engine's driver; each rank posts its
answer on its own page of the mailbox.
"""

from __future__ import annotations

import msgspec

from bridge.model.declared_losses import Noise
from bridge.model.lora_format import LoraSpec
from bridge.model.manifest import Manifest, TensorInfo
from bridge.model.receipt import LevelResult, RankReport
from bridge.model.regions import Region
from bridge.protocol.codec import ErrorInfo, Message
from bridge.push_settings import PushSettings

Prompts = tuple[tuple[int, ...], ...]
Scores = tuple[tuple[float, ...], ...]


class BakeJob(Message, frozen=True):
    """Trace the engine's loader on the announced tensors and keep the result under `plan`, an id of the sender's.

    With `lora` the tensors are an adapter's, and the engine tells where it would put them. `unsent`: names of tensors
    that the trainer has besides.
    """

    plan: int
    tensors: tuple[TensorInfo, ...]
    partial: bool = False
    lora: LoraSpec | None = None
    unsent: tuple[str, ...] = ()


class MapJob(Message, frozen=True):
    """Map an arena file and compile plan `plan` onto it; forget every other plan except those of `keep`."""

    plan: int
    path: str
    manifest: Manifest
    keep: tuple[int, ...] = ()


class ForgetJob(Message, frozen=True):
    """Let go of every plan except those of `keep`, and of their arenas."""

    keep: tuple[int, ...] = ()


class LoadJob(Message, frozen=True):
    """Load `slot` through `plan`, then run those levels of `settings` that a rank decides alone.

    Attributes:
        changed: manifest indices of tensors whose bits differ from what the engine holds; None loads every tensor.
        previous: slot of the version held before, for the change level.
        lora: name under which an adapter's plan loads the adapter; it was never used before.
    """

    plan: int
    slot: int
    settings: PushSettings
    changed: tuple[int, ...] | None = None
    previous: int | None = None
    lora: str | None = None


class DropLoraJob(Message, frozen=True):
    """Drop an adapter that was loaded and did not pass; unknown names are ignored."""

    lora: str


class VerifyJob(Message, frozen=True):
    """Run levels against `slot` without writing anything; for an adapter's plan, against the loaded adapter `lora`."""

    plan: int
    slot: int
    levels: tuple[str, ...]
    lora: str | None = None


class LogprobsJob(Message, frozen=True):
    """Compute prompt log-probabilities past the scheduler, with the loaded adapter `lora` (None: the base model). All
    ranks take part; the answer of rank 0 counts."""

    prompts: Prompts
    lora: str | None = None


class NoiseJob(Message, frozen=True):
    """Tell what is known of this engine's noise; with `measured`, keep that for this process's life. It is a fact of
    the engine as it was started, so it has to outlive the bridge that measured it."""

    measured: Noise | None = None


class ReadBackJob(Message, frozen=True):
    """Write this rank's live weights into `slot`; the answer lists the tensors that cannot be read back."""

    plan: int
    slot: int


class ExamineJob(Message, frozen=True):
    """Compare live weights with what was loaded last, whoever asks. Without anything to compare with: no levels."""

    levels: tuple[str, ...]


class ExplainJob(Message, frozen=True):
    """Tell where one canonical tensor goes on this rank."""

    plan: int
    name: str


AnyJob = (
    BakeJob
    | MapJob
    | ForgetJob
    | LoadJob
    | DropLoraJob
    | VerifyJob
    | LogprobsJob
    | NoiseJob
    | ReadBackJob
    | ExamineJob
    | ExplainJob
)


class RankJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job with its return address: rank r answers on page `page + r` of `mailbox`, under `nonce`."""

    mailbox: str
    page: int
    nonce: int
    job: AnyJob


class RankBake(Message, frozen=True):
    """A rank's plan in summary.

    Attributes:
        dtypes: sent tensor -> dtype in which it lands, or of the values that are quantised here.
        read: source regions of tensors that this rank reads only in part (absent: whole).
        unread: names that this rank has no place for. `placeholders`: those of them where a module stands that holds
            nothing. `partners`: those that this rank ties to what another tensor fills -> that tensor. `followers`: the
            same, of the job's unsent names.
        coverage: proof that the plan writes every element of this rank once. It depends on nothing that a push
            changes, so it is computed with the plan and reported by every push through it.
        codes: dtypes of the codes that this rank makes of values.
    """

    digest: bytes
    dtypes: dict[str, str]
    unread: tuple[str, ...] = ()
    placeholders: tuple[str, ...] = ()
    partners: dict[str, str] = {}
    followers: dict[str, str] = {}
    read: dict[str, tuple[Region, ...]] = {}
    strategies: dict[str, int] = {}
    moves: int = 0
    coverage: LevelResult = LevelResult("coverage", False, 0)
    codes: tuple[str, ...] = ()


class RankLoaded(Message, frozen=True):
    """Report of a load, a verification or an examination."""

    report: RankReport


class RankScores(Message, frozen=True):
    """Log-probabilities of the prompts' tokens, in nats."""

    logprobs: Scores


class RankNoise(Message, frozen=True):
    """The noise that was measured in this engine (None: not yet), and whether a load of weights has ever begun to write
    in this rank: after that it cannot be measured any more."""

    noise: Noise | None
    written: bool


class RankReadBack(Message, frozen=True):
    """Names of the tensors whose live storage cannot be read back; and of quantised ones that a rank took from the
    engine's checkpoint instead."""

    unreadable: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()


class RankExplanation(Message, frozen=True):
    """A row per move: tensor, parameter, source, dest, module, strategy, reason."""

    rows: tuple[dict[str, str], ...]


class RankDone(Message, frozen=True):
    """The job is done, and there is nothing to tell."""


class RankFailed(Message, frozen=True):
    """The job raised. `touched`: live parameters may have been written."""

    error: ErrorInfo
    touched: bool = False


RankReply = RankBake | RankLoaded | RankScores | RankNoise | RankReadBack | RankExplanation | RankDone
AnyAnswer = RankReply | RankFailed


class RankAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An answer with its sender, as it lies on a page of the mailbox."""

    rank: int
    nonce: int
    answer: AnyAnswer
