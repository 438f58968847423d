"""The arenas of one engine service, by plan: mapped here and in every rank, checked, and filled with what is served."""

from __future__ import annotations

from pathlib import Path

from bridge.errors import BridgeError, DigestMismatch, ProtocolError
from bridge.model.receipt import Failure, LevelResult
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import EngineLoad, EngineMap, EngineReadBack, EngineVersionZero
from bridge.protocol.rank_jobs import ForgetJob, MapJob, RankDone, RankReadBack, ReadBackJob
from bridge.shm.arena import Arena
from bridge.shm.seal import check_slot
from engine_side.driver.rank_client import RankClient
from engine_side.load.checkpoint import write_checkpoint, write_held

CLOSE_TIMEOUT_S = 10.0


class Arenas:
    """Maps and lets go of arenas. Used by one service, one request at a time."""

    def __init__(self, engine_id: str, ranks: RankClient, threads: int) -> None:
        self._id = engine_id
        self._ranks = ranks
        self._threads = threads
        self._arenas: dict[int, Arena] = {}

    def __getitem__(self, plan: int) -> Arena:
        try:
            return self._arenas[plan]
        except KeyError:
            raise ProtocolError("this engine does not know that plan", where=self._id, got=str(plan)) from None

    def map(self, request: EngineMap) -> None:
        """Map an arena here and in every rank; forget those that are not to be kept."""
        arena = Arena.open(Path(request.path), request.manifest)
        try:
            job = MapJob(request.plan, request.path, request.manifest, request.keep)
            self._ranks.ask(job, RankDone, Deadline.after(request.timeout_s))
        except BaseException:
            arena.close()
            raise
        self._arenas[request.plan] = arena
        self._close((request.plan, *request.keep))

    def forget(self, keep: tuple[int, ...], timeout_s: float) -> None:
        """Let go of every plan but `keep`, here and in every rank."""
        self._ranks.ask(ForgetJob(keep), RankDone, Deadline.after(timeout_s))
        self._close(keep)

    def close(self) -> str | None:
        """Let go of all. What the ranks said, when they could not."""
        said = None
        if self._arenas:
            try:
                self._ranks.ask(ForgetJob(), RankDone, Deadline.after(CLOSE_TIMEOUT_S))
            except BridgeError as error:
                said = str(error)
        self._close(())
        return said

    def _close(self, keep: tuple[int, ...]) -> None:
        for plan in [p for p in self._arenas if p not in keep]:
            self._arenas.pop(plan).close()

    def require_sealed(self, request: EngineLoad) -> None:
        """Raises ProtocolError unless the slot holds the version that was announced."""
        seal = self[request.plan].seal_of(request.slot)
        if seal is None or seal.root != request.root or seal.version != request.sealed:
            raise ProtocolError(
                "the arena does not hold the announced version",
                where=f"{self._id} slot {request.slot}",
                expected=f"version {request.sealed}, root {request.root.hex()}",
                got="unsealed" if seal is None else f"version {seal.version}, root {seal.root.hex()}",
            )

    def check(self, plan: int, slot: int) -> None:
        """Raises DigestMismatch unless the bytes are what was sealed."""
        check_slot(self[plan], slot, self._threads)

    def transfer(self, plan: int, slot: int) -> LevelResult:
        """`check` as a level."""
        total = len(self[plan].manifest.tensors)
        try:
            self.check(plan, slot)
        except DigestMismatch as error:
            failures = tuple(Failure(name, "the sealed digest", "other bytes") for name in error.names)
            return LevelResult("transfer", False, total, failures)
        return LevelResult("transfer", True, total)

    def read_back(self, request: EngineReadBack, checkpoint: Path | None) -> EngineVersionZero:
        """Live weights into the slot; what post-load work packed away comes from the last commit, and what no push has
        brought from the engine's own checkpoint."""
        deadline = Deadline.after(request.timeout_s)
        found = self._ranks.ask(ReadBackJob(request.plan, request.slot), RankReadBack, deadline)
        unreadable = {name for answer in found for name in answer.unreadable}
        arena = self[request.plan]
        missing = list(arena.manifest.by_name)
        older = self._arenas.get(request.held_plan) if request.held_plan is not None else None
        if older is not None and request.held_slot is not None:
            # what was pushed is the version; what lies in the engine may have been written to since
            missing = write_held(older, request.held_slot, arena, request.slot, missing)
        missing = [name for name in missing if name in unreadable]
        if missing and checkpoint is None:
            got = f"{len(missing)} tensors packed away, {missing[0]} among them"
            return EngineVersionZero(False, "none", f"{got}, and the engine's checkpoint is not known")
        if missing and checkpoint is not None:
            missing = write_checkpoint(checkpoint, arena, request.slot, missing)
        if missing:
            return EngineVersionZero(False, "none", f"{checkpoint} does not hold {missing[0]}")
        return EngineVersionZero(True, "live" if older is None and not unreadable else "stored")
