"""Plans of one engine service: each one's arena, and the proof that it covers the engine's ranks."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from bridge.errors import DigestMismatch, ProtocolError
from bridge.model.receipt import Failure, LevelResult, RankReport
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import EngineLoad, EngineReadBack, EngineVersionZero
from bridge.protocol.rank_jobs import AnyJob, BakeJob, ForgetJob, MapJob, RankBake, RankReadBack, RankReply
from bridge.shm.arena import Arena
from bridge.shm.seal import check_slot
from engine_side.driver.rank_client import RankClient
from engine_side.load.checkpoint import write_checkpoint, write_held


class Arenas:
    """Arenas that the driver's side has mapped, by plan. Used by one service, one request at a time."""

    def __init__(self, engine_id: str, threads: int, ranks: RankClient) -> None:
        self._id = engine_id
        self._threads = threads
        self._ranks = ranks
        self._arenas: dict[int, Arena] = {}
        self._coverage: dict[int, tuple[LevelResult, ...]] = {}  # by plan and rank, as the bake proved it

    def __len__(self) -> int:
        return len(self._arenas)

    def __getitem__(self, plan: int) -> Arena:
        try:
            return self._arenas[plan]
        except KeyError:
            raise ProtocolError(
                "this engine does not know that plan",
                where=self._id,
                expected="a plan that it has baked",
                got=str(plan),
                remedy="push again",
            ) from None

    def run(self, job: AnyJob, deadline: Deadline) -> list[RankReply]:
        """Run a job on every rank; what the ranks map or forget is mapped or forgotten here too. Blocks and raises as
        `RankClient.run`."""
        if isinstance(job, MapJob):
            self._arenas[job.plan] = Arena.open(Path(job.path), job.manifest)
        try:
            answers = self._ranks.run(job, deadline)
        except BaseException:
            if isinstance(job, MapJob):
                self._arenas.pop(job.plan).close()
            raise
        if isinstance(job, BakeJob):
            self._coverage[job.plan] = tuple(answer.coverage for answer in answers if isinstance(answer, RankBake))
        if isinstance(job, MapJob | ForgetJob):
            self.close_all_but((job.plan, *job.keep) if isinstance(job, MapJob) else job.keep)
        return answers

    def close_all_but(self, keep: Collection[int]) -> None:
        """Let go of all plans but `keep`, and of their arenas."""
        for plan in [p for p in self._arenas if p not in keep]:
            self._arenas.pop(plan).close()
        self._coverage = {plan: levels for plan, levels in self._coverage.items() if plan in keep}

    def stage(self, request: EngineLoad, ranks: int) -> tuple[RankReport, ...]:
        """Check a load before anything is written: the slot holds the announced version, its bytes are what was sealed
        (digested again if the request says so), and the plan covers every rank. Blocks for that pass.

        Raises ProtocolError for another version, DigestMismatch for other bytes.
        """
        arena, slot, levels = self[request.job.plan], request.job.slot, request.job.settings.levels
        seal = arena.seal_of(slot)
        if seal is None or seal.root != request.root or seal.version != request.sealed:
            raise ProtocolError(
                "the arena does not hold the announced version",
                where=f"{self._id} slot {slot}",
                expected=f"version {request.sealed}, root {request.root.hex()}",
                got="unsealed" if seal is None else f"version {seal.version}, root {seal.root.hex()}",
                remedy="push again",
            )
        note = "digests were checked by another engine of this node"
        if request.check:
            check_slot(arena, slot, self._threads, seal)
            note = ""
        total = len(arena.manifest.tensors)
        transfer = (LevelResult("transfer", True, total, note=note),) if "transfer" in levels else ()
        if "coverage" not in levels:
            return tuple(RankReport(rank, transfer) for rank in range(ranks))
        proven = self._coverage[request.job.plan]
        return tuple(RankReport(rank, (*transfer, found)) for rank, found in enumerate(proven))

    def check_level(self, plan: int, slot: int) -> LevelResult:
        """Digest a slot again, as the transfer level."""
        total = len(self[plan].manifest.tensors)
        try:
            check_slot(self[plan], slot, self._threads)
        except DigestMismatch as error:
            failures = tuple(Failure(name, "the sealed digest", "other bytes") for name in error.names)
            return LevelResult("transfer", False, total, failures)
        return LevelResult("transfer", True, total)

    def read_back(self, request: EngineReadBack, checkpoint: Path | None, deadline: Deadline) -> EngineVersionZero:
        """Write live weights into the slot. Tensors that post-load work packed away come from the last commit, and
        those that no push has brought from the engine's own checkpoint. Blocks for the ranks."""
        found = self._ranks.ask(request.job, RankReadBack, deadline)
        unreadable = {name for answer in found for name in answer.unreadable}
        arena, slot = self[request.job.plan], request.job.slot
        missing = list(arena.manifest.by_name)
        older = self._arenas.get(request.held_plan) if request.held_plan is not None else None
        if older is not None and request.held_slot is not None:
            # the version is what was pushed; live weights may have been written to since
            missing = write_held(older, request.held_slot, arena, slot, missing)
        missing = [name for name in missing if name in unreadable]
        if missing and checkpoint is None:
            got = f"{len(missing)} tensors packed away, {missing[0]} among them"
            return EngineVersionZero(False, "none", f"{got}, and the engine's checkpoint is not known")
        if missing and checkpoint is not None:
            missing = write_checkpoint(checkpoint, arena, slot, missing)
        if missing:
            return EngineVersionZero(False, "none", f"{checkpoint} does not hold {missing[0]}")
        stored = older is not None or unreadable or any(answer.stored for answer in found)
        return EngineVersionZero(True, "stored" if stored else "live")
