"""Rank: run one rank job and post its answer.

`Rank.run` is the one Python function that every engine has to be able to execute in each of its workers. It never
raises for an error of a job, because a raising worker poisons vLLM's RPC for later calls: the error is the answer.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bridge.config import from_environment
from bridge.errors import REPORT, BridgeError, ProtocolError
from bridge.model.declared_losses import Noise
from bridge.model.manifest import validate
from bridge.model.receipt import RankReport
from bridge.protocol import rank_jobs as jobs
from bridge.protocol.codec import ErrorInfo, pack, unpack
from bridge.shm.arena import Arena
from bridge.shm.mailbox import Mailbox
from engine_side.live.bindings import AttributeSnapshot
from engine_side.load import version_zero
from engine_side.load.arena_views import ArenaViews
from engine_side.load.loader import Loader
from engine_side.plan.loader_errors import LOADER_ERRORS
from engine_side.protocol import RankHost
from engine_side.verify.verify import Verifier
from engine_side.worker.lora_loader import LoraLoader

log = logging.getLogger(__name__)


@dataclass
class MappedPlan:
    """A baked plan of this rank, of weights (`part` is then a Verifier) or of a LoRA; once mapped, with its arena."""

    part: Verifier | LoraLoader
    bake: jobs.RankBake
    arena: Arena | None = None

    @property
    def loader(self) -> Loader | LoraLoader:
        return self.part if isinstance(self.part, LoraLoader) else self.part.loader

    def version(self, slot: int) -> int | None:
        """The version that a slot of its arena is sealed as."""
        seal = None if self.arena is None else self.arena.seal_of(slot)
        return None if seal is None else seal.version

    def close(self) -> None:
        """Let go of loader and arena."""
        self.loader.close()
        if self.arena is not None:
            self.arena.close()
            self.arena = None


class Rank:
    """One rank of an engine: its plans, kept between jobs. Runs one job at a time."""

    def __init__(self, host: RankHost, threads: int | None = None) -> None:
        self.host = host
        self._threads = threads or from_environment().copy_threads
        self._plans: dict[int, MappedPlan] = {}
        self._mailbox: Mailbox | None = None
        self._loading: Loader | None = None  # the load under way
        self._lost: AttributeSnapshot | None = None
        self._loaded: tuple[int, int] | None = None
        """(plan, slot) of the weights that were loaded last."""
        self._ever_written = False
        self._noise: Noise | None = None
        self._own = True
        """The engine's own checkpoint is served, as far as loads through this rank tell."""

    def run(self, frame: bytes) -> None:
        """Run one job and post its answer. Raises only when the frame or the mailbox cannot be read at all."""
        job = unpack(frame, jobs.RankJob)
        if self._mailbox is None or str(self._mailbox.path) != job.mailbox:
            self._close_mailbox()
            self._mailbox = Mailbox.open(Path(job.mailbox))
        mailbox = self._mailbox
        try:
            answer = self._answer(job.job)
        except Exception as error:  # process boundary: a worker must answer by value whatever broke
            if not isinstance(error, BridgeError):
                log.exception("rank %d: %s failed", self.host.rank, type(job.job).__name__)
            answer = jobs.RankFailed(ErrorInfo.of(error), self._wrote)
        self._ever_written |= self._wrote
        mailbox.post(job.page + self.host.rank, job.nonce, pack(jobs.RankAnswer(self.host.rank, job.nonce, answer)))
        if isinstance(job.job, jobs.ForgetJob) and not job.job.keep:
            self._close_mailbox()  # the last job of a bridge that closes; an open file keeps its memory

    @property
    def _wrote(self) -> bool:
        """True when the job that ran last was a load that has begun to write."""
        return self._loading is not None and self._loading.began_to_write

    def close(self) -> None:
        """Let go of arenas and mailbox. Idempotent."""
        for planned in self._plans.values():
            planned.close()
        self._plans.clear()
        self._close_mailbox()

    def _close_mailbox(self) -> None:
        if self._mailbox is not None:
            self._mailbox.close()
            self._mailbox = None

    def _answer(self, job: jobs.AnyJob) -> jobs.AnyAnswer:
        self._loading = None
        match job:
            case jobs.BakeJob():
                return self._bake(job)
            case jobs.MapJob():
                return self._map(job)
            case jobs.ForgetJob():
                return self._forget(job.keep)
            case jobs.LoadJob():
                return jobs.RankLoaded(self._load(job))
            case jobs.VerifyJob():
                self._keep_originals(job)
                return jobs.RankLoaded(self._verify(job))
            case jobs.LogprobsJob():
                return jobs.RankScores(tuple(tuple(row) for row in self._prompt_logprobs(job)))
            case jobs.NoiseJob():
                self._noise = self._noise if job.measured is None else job.measured
                return jobs.RankNoise(self._noise, self._ever_written)
            case jobs.DropLoraJob():
                self.host.remove_lora(job.lora)
                return jobs.RankDone()
            case jobs.ReadBackJob():
                return self._read_back(job)
            case jobs.ExamineJob():
                return jobs.RankLoaded(self._examine(job))
            case jobs.ExplainJob():
                return jobs.RankExplanation(self._planned(job.plan, mapped=False).loader.explain(job.name))

    def _planned(self, plan: int, *, mapped: bool = True) -> MappedPlan:
        """Find a plan. Raises ProtocolError for an unknown one, and unless `mapped` is False for one without arena."""
        planned = self._plans.get(plan)
        if planned is None:
            raise ProtocolError(
                "this rank does not know that plan",
                where=f"rank {self.host.rank}",
                expected="a plan that was baked here",
                got=str(plan),
                remedy="push again",
            )
        if mapped and planned.arena is None:
            raise ProtocolError(
                "this plan is not mapped onto an arena yet",
                where=f"rank {self.host.rank}",
                expected="a mapped plan",
                got=str(plan),
                remedy="push again",
            )
        return planned

    def _bake(self, job: jobs.BakeJob) -> jobs.RankBake:
        loader = self._loader(job)
        try:
            # the plan is proven to cover this rank once, here: no push changes it
            part = loader if isinstance(loader, LoraLoader) else Verifier(loader.check())
            bake = msgspec.structs.replace(loader.rank_bake(), coverage=part.coverage())
        except BaseException:
            loader.close()
            raise
        self._plans[job.plan] = MappedPlan(part, bake)
        return bake

    def _loader(self, job: jobs.BakeJob) -> Loader | LoraLoader:
        if job.lora is not None:
            return LoraLoader(self.host, job.tensors, job.lora)
        loader = self._weights_loader(job)
        tied = () if loader.problems else (*loader.baked.unplaced.partners, *loader.baked.followers)
        # what the trainer holds apart from a tensor that the engine ties it to; untying moves no value
        if not tied or not self.host.untie(tied):
            return loader
        loader.close()
        return self._weights_loader(job)

    def _weights_loader(self, job: jobs.BakeJob) -> Loader:
        """Bake; what is to become of names without a place is decided by the coordinator, which knows all ranks."""
        partial, unsent, threads = job.partial, job.unsent, self._threads
        return Loader(self.host, job.tensors, partial=partial, unsent=unsent, unknown_allowed=True, threads=threads)

    def _map(self, job: jobs.MapJob) -> jobs.RankDone:
        planned = self._planned(job.plan, mapped=False)
        arena = Arena.open(Path(job.path), validate(job.manifest))
        try:
            slots = [arena.tensors(slot) for slot in range(arena.slots)]
            if isinstance(planned.loader, LoraLoader):
                planned.loader.map(job.manifest, slots)
            else:
                planned.loader.map(job.manifest, slots, ArenaViews.of(arena), arena.seal_of)
        except BaseException:
            arena.close()
            raise
        planned.arena = arena
        return self._forget((job.plan, *job.keep))

    def _forget(self, keep: tuple[int, ...]) -> jobs.RankDone:
        for plan in [p for p in self._plans if p not in keep]:
            self._plans.pop(plan).close()
        return jobs.RankDone()

    def _load(self, job: jobs.LoadJob) -> RankReport:
        planned = self._planned(job.plan)
        verifier = planned.part
        if isinstance(verifier, LoraLoader):
            if job.lora is None:
                raise ProtocolError(
                    "an adapter needs a name",
                    where=f"rank {self.host.rank}",
                    expected="a name",
                    got=f"plan {job.plan}",
                    remedy=REPORT,
                )
            return verifier.load(job.slot, job.lora, job.settings.levels, job.previous)
        loader = self._loading = verifier.loader
        if self._lost is not None:  # the load before this one lost attributes, and was aborted for it
            self._lost.put_back()
            self._lost = None
        own = planned.version(job.slot) == 0
        self._loaded, self._own = None, False
        outcome = loader.apply(job.slot, job.changed)
        self._loaded, self._own = (job.plan, job.slot), own
        started = time.perf_counter()
        wanted = set(job.settings.levels) - {"coverage"}  # answered with the bake
        levels = verifier.run(wanted, job.slot, outcome=outcome, previous=job.previous, changed=job.changed)
        report = RankReport(
            rank=self.host.rank,
            levels=levels,
            strategies=planned.bake.strategies,
            rebound=(*outcome.rebound, *outcome.created, *outcome.dropped),
            canary_only=verifier.canary_only(),
            written=outcome.written,
            quantised={} if loader.codes is None else dict(loader.codes.errors[job.slot]),
            kept=() if loader.codes is None else loader.codes.kept,
            skipped_only=verifier.only_skipped(levels, job.changed),
            load_s=outcome.load_s,
            postload_s=outcome.postload_s,
            verify_s=time.perf_counter() - started,
        )
        if any(level.level == "attributes" and not level.ok for level in levels):
            self._lost = loader.snapshot
        return report

    def _prompt_logprobs(self, job: jobs.LogprobsJob) -> list[list[float]]:
        """Run a forward without the forward caches; where it fails (in every rank alike), once more with them."""
        caches = [p.loader.caches for p in self._plans.values() if isinstance(p.loader, Loader)]
        for each in caches:
            each.clear(unproven=True)
        try:
            scores = self.host.prompt_logprobs(job.prompts, job.lora)
        except BaseException as error:  # whatever it was, the model must not stay without them
            restored = [each.restore() for each in caches]
            if not any(restored) or not isinstance(error, LOADER_ERRORS):
                raise
            scores = self.host.prompt_logprobs(job.prompts, job.lora)
        for each in caches:
            each.confirm()
        return scores

    def _keep_originals(self, job: jobs.VerifyJob) -> None:
        planned = self._planned(job.plan)
        if self._own and isinstance(planned.part, Verifier) and planned.version(job.slot) == 0:
            version_zero.keep_originals(planned.part.loader, job.slot)

    def _verify(self, job: jobs.VerifyJob) -> RankReport:
        started = time.perf_counter()
        part = self._planned(job.plan).part
        if isinstance(part, LoraLoader):
            levels = part.verify(job.slot, job.lora, job.levels)
        else:
            levels = part.run(job.levels, job.slot)
        return RankReport(rank=self.host.rank, levels=levels, verify_s=time.perf_counter() - started)

    def _examine(self, job: jobs.ExamineJob) -> RankReport:
        if self._loaded is None or self._loaded[0] not in self._plans:
            return RankReport(rank=self.host.rank)
        plan, slot = self._loaded
        return self._verify(jobs.VerifyJob(plan, slot, job.levels))

    def _read_back(self, job: jobs.ReadBackJob) -> jobs.RankReadBack:
        planned = self._planned(job.plan)
        if planned.arena is None or isinstance(planned.loader, LoraLoader):
            raise ProtocolError(
                "the plan of an adapter has no weights to read back",
                where=f"rank {self.host.rank}",
                expected="a plan of weights",
                got=str(job.plan),
                remedy=REPORT,
            )
        with Arena.open(planned.arena.path, planned.arena.manifest, writable=True) as arena:
            return jobs.RankReadBack(*version_zero.read_back(planned.loader, arena.tensors(job.slot), job.slot))
