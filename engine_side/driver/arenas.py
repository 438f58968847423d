"""Arenas of one engine service, by plan: opened, checked, and filled with what the engine serves."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from bridge.errors import DigestMismatch, ProtocolError
from bridge.model.receipt import Failure, LevelResult
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import EngineLoad, EngineReadBack, EngineVersionZero
from bridge.protocol.rank_jobs import MapJob, RankReadBack
from bridge.shm.arena import Arena
from bridge.shm.seal import check_slot
from engine_side.driver.rank_client import RankClient
from engine_side.load.checkpoint import write_checkpoint, write_held


class Arenas:
    """Arenas that the driver's side has mapped. Used by one service, one request at a time."""

    def __init__(self, engine_id: str, threads: int) -> None:
        self._id = engine_id
        self._threads = threads
        self._arenas: dict[int, Arena] = {}

    def __len__(self) -> int:
        return len(self._arenas)

    def __getitem__(self, plan: int) -> Arena:
        try:
            return self._arenas[plan]
        except KeyError:
            raise ProtocolError("this engine does not know that plan", where=self._id, got=str(plan)) from None

    def open(self, job: MapJob) -> None:
        """Map the arena that ranks are about to map."""
        self._arenas[job.plan] = Arena.open(Path(job.path), job.manifest)

    def close(self, plan: int) -> None:
        """Let go of one plan's arena."""
        self._arenas.pop(plan).close()

    def close_all_but(self, keep: Collection[int]) -> None:
        """Let go of the arenas of all plans but `keep`."""
        for plan in [p for p in self._arenas if p not in keep]:
            self.close(plan)

    def stage(self, request: EngineLoad) -> Arena:
        """Find the arena of a load, and digest the slot again if the request says so. Blocks for that pass.

        Raises ProtocolError unless the slot holds the announced version, DigestMismatch unless its bytes are what was
        sealed.
        """
        arena, slot = self[request.job.plan], request.job.slot
        seal = arena.seal_of(slot)
        if seal is None or seal.root != request.root or seal.version != request.sealed:
            raise ProtocolError(
                "the arena does not hold the announced version",
                where=f"{self._id} slot {slot}",
                expected=f"version {request.sealed}, root {request.root.hex()}",
                got="unsealed" if seal is None else f"version {seal.version}, root {seal.root.hex()}",
                remedy="push again",
            )
        if request.check:
            check_slot(arena, slot, self._threads, seal)
        return arena

    def check_level(self, plan: int, slot: int) -> LevelResult:
        """Digest a slot again, as the transfer level."""
        total = len(self[plan].manifest.tensors)
        try:
            check_slot(self[plan], slot, self._threads)
        except DigestMismatch as error:
            failures = tuple(Failure(name, "the sealed digest", "other bytes") for name in error.names)
            return LevelResult("transfer", False, total, failures)
        return LevelResult("transfer", True, total)

    def read_back(
        self, request: EngineReadBack, ranks: RankClient, checkpoint: Path | None, deadline: Deadline
    ) -> EngineVersionZero:
        """Write live weights into the slot. Tensors that post-load work packed away come from the last commit, and
        those that no push has brought from the engine's own checkpoint. Blocks for the ranks."""
        found = ranks.ask(request.job, RankReadBack, deadline)
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
        return EngineVersionZero(True, "live" if older is None and not unreadable else "stored")
