"""LoRA adapters that pushes have brought into one engine: the one that serves, the staged one, those to retire."""

from __future__ import annotations

import logging

from bridge.errors import BridgeError, NotFound
from bridge.protocol.deadline import Deadline
from bridge.protocol.rank_jobs import DropLoraJob, RankDone
from engine_side.driver.rank_client import RankClient
from engine_side.protocol import EngineDriver

log = logging.getLogger(__name__)


class LoraVersions:
    """Used by one service, one request at a time.

    Attributes:
        current: the adapter that "current" means; None is the base model. At the start what the engine was left with by
            a bridge before this one, which is then this one's to keep or to drop.
        staged: what the push under way has loaded and nobody uses yet.
    """

    def __init__(self, engine: EngineDriver, ranks: RankClient) -> None:
        self._engine = engine
        self._ranks = ranks
        self._label, self.current = engine.published
        self.staged: str | None = None
        self._ours = set() if self.current is None else {self.current}

    @property
    def loaded(self) -> frozenset[str]:
        """Those of this bridge that the engine still holds, those that wait for their last request included."""
        return frozenset(self._ours.intersection(self._engine.adapters()))

    @property
    def lost(self) -> bool:
        """Somebody else has unloaded the adapter that is served: requests for it fail, those of the base do not."""
        return self.current is not None and self.current not in self._engine.adapters()

    def require(self, name: str | None) -> None:
        """Raises NotFound when what is to be served is not loaded."""
        if name is not None and name not in self.loaded:
            raise NotFound(
                "this engine does not hold the adapter that would be served",
                where=name,
                expected="an adapter that a push has loaded",
                got=", ".join(sorted(self.loaded)) or "none",
                remedy="push merged weights, or the base and then the adapter",
            )

    def end_others(self, keep: str | None) -> None:
        """End the requests of every adapter but `keep`: the weights below it are about to become others."""
        others = self.loaded - {keep}
        if others:
            self._engine.end_users(sorted(others))

    def settle(self) -> str | None:
        """What was staged is committed: one of ours from now on. Its name."""
        staged, self.staged = self.staged, None
        if staged is not None:
            self._ours.add(staged)
        return staged

    def drop(self, deadline: Deadline, keep: str | None = None) -> None:
        """What was staged did not pass, and nothing ever used it; unless it is `keep`, which others have committed."""
        if self.staged is not None and self.staged == keep:
            self.settle()
        staged, self.staged = self.staged, None
        if staged is not None:
            self._ours.add(staged)  # should the drop fail, it is tried again when something is published
            self._ranks.ask(DropLoraJob(staged), RankDone, deadline)
            self._ours.discard(staged)

    def publish(self, version: int, name: str | None) -> None:
        """Serve `version` (0: what the engine called its own before this bridge) with this adapter."""
        self._engine.publish(version or self._label, name)
        self.current = name

    def tidy(self) -> None:
        """Retire what does not serve any more. A failure costs a slot until the next time, and nothing else."""
        old = self.loaded - {self.current}
        try:
            self._engine.retire(sorted(old))
        except BridgeError as error:
            log.warning("adapters could not be retired yet: %s", error)
        self._ours &= self.loaded
