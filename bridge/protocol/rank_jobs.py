"""What an engine service asks of its ranks, and what they answer: one job per dispatch, one mailbox page per answer."""

from __future__ import annotations

import msgspec

from bridge.model.lora_format import LoraSpec
from bridge.model.manifest import Manifest, TensorInfo
from bridge.model.receipt import RankReport
from bridge.model.regions import Region
from bridge.protocol.codec import ErrorInfo, Message

Prompts = tuple[tuple[int, ...], ...]
Scores = tuple[tuple[float, ...], ...]


class BakeJob(Message, frozen=True):
    """Trace the engine's loader on the announced tensors; keep the result under `plan`, an id chosen by the asker. With
    `adapter` the tensors are an adapter's, and the engine is asked where it would put them."""

    plan: int
    tensors: tuple[TensorInfo, ...]
    partial: bool = False
    adapter: LoraSpec | None = None


class MapJob(Message, frozen=True):
    """Map an arena file and compile plan `plan` onto it; forget every other plan except `keep`."""

    plan: int
    path: str
    manifest: Manifest
    keep: tuple[int, ...] = ()


class ForgetJob(Message, frozen=True):
    """Let go of every plan except `keep`, and of their arenas."""

    keep: tuple[int, ...] = ()


class LoadJob(Message, frozen=True):
    """Load `slot` through `plan` and run the named verification levels. `changed` restricts the copies to tensors (by
    index in the manifest) whose bits differ from what this engine already holds; None loads everything. `previous` is
    the slot of the version held before, for the change level. An adapter's plan loads under the new name `adapter`."""

    plan: int
    slot: int
    levels: tuple[str, ...]
    changed: tuple[int, ...] | None = None
    previous: int | None = None
    adapter: str | None = None


class DropLoraJob(Message, frozen=True):
    """Drop an adapter that was loaded and did not pass, or is not known here at all."""

    adapter: str


class VerifyJob(Message, frozen=True):
    """Run levels against `slot` without writing anything; of an adapter's plan, against the loaded `adapter`."""

    plan: int
    slot: int
    levels: tuple[str, ...]
    adapter: str | None = None


class LogprobsJob(Message, frozen=True):
    """Prompt log-probabilities past the scheduler; all ranks take part, rank 0 answers. `adapter` None: the base."""

    prompts: Prompts
    adapter: str | None = None


class ReadBackJob(Message, frozen=True):
    """Write this rank's live weights into `slot` as version 0; answers the tensors that could not be read back."""

    plan: int
    slot: int


class ExamineJob(Message, frozen=True):
    """Compare live weights with what was loaded last, whoever asks. Without anything to compare with: no levels."""

    levels: tuple[str, ...]


class ExplainJob(Message, frozen=True):
    """Where one canonical tensor goes on this rank."""

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
    """A rank's plan in summary. `dtypes` maps sent tensors to the dtype they land in; `read` holds the source regions
    of tensors that this rank reads only in part (absent: whole), `unread` those it does not touch at all."""

    digest: bytes
    dtypes: dict[str, str]
    unread: tuple[str, ...] = ()
    read: dict[str, tuple[Region, ...]] = {}
    strategies: dict[str, int] = {}
    native: dict[str, str] = {}
    moves: int = 0


class RankLoaded(Message, frozen=True):
    report: RankReport


class RankScores(Message, frozen=True):
    logprobs: Scores


class RankReadBack(Message, frozen=True):
    unreadable: tuple[str, ...] = ()


class RankExplanation(Message, frozen=True):
    """Lines for people and rows for programs: tensor -> parameter, strategy, reason."""

    rows: tuple[dict[str, str], ...]


class RankDone(Message, frozen=True):
    pass


class RankFailed(Message, frozen=True):
    """The job raised. `touched`: live parameters may have been written."""

    error: ErrorInfo
    touched: bool = False


AnyAnswer = RankBake | RankLoaded | RankScores | RankReadBack | RankExplanation | RankDone | RankFailed


class RankAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rank: int
    nonce: int
    answer: AnyAnswer
