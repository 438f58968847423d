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
        current: the adapter that "current" means; None is the base model. At the start it is the one that a bridge
            before this one left behind, which is then this one's to keep or to drop.
        ours: adapters that this bridge has loaded, whether or not the engine still holds them.
        staged: the adapter that the push under way has loaded, and that no request uses yet.
    """

    def __init__(self, driver: EngineDriver, ranks: RankClient) -> None:
        self._driver = driver
        self._ranks = ranks
        self._label, self.current = driver.published
        self.staged: str | None = None
        self.ours = set() if self.current is None else {self.current}

    @property
    def loaded(self) -> frozenset[str]:
        """Adapters of this bridge that the engine still holds, including those that wait for their last request."""
        return frozenset(self.ours.intersection(self._driver.loaded_loras())) if self.ours else frozenset()

    @property
    def lost(self) -> bool:
        """True when somebody else has unloaded the adapter that is served: requests for it fail, those of the base do
        not."""
        return self.current is not None and self.current not in self._driver.loaded_loras()

    def require(self, name: str) -> None:
        """Raise NotFound when the adapter that is to be served is not loaded."""
        if name not in self.loaded:
            raise NotFound(
                "this engine does not hold the adapter that would be served",
                where=name,
                expected="an adapter that a push has loaded",
                got=", ".join(sorted(self.loaded)) or "none",
                remedy="push merged weights, or the base and then the adapter",
            )

    def end_others(self, keep: str | None) -> None:
        """End the requests of every adapter but `keep`, because the weights below them are about to change."""
        others = self.loaded - {keep}
        if others:
            self._driver.end_users(sorted(others))

    def settle(self) -> None:
        """Count the staged adapter, which was committed, among this bridge's own."""
        if self.staged is not None:
            self.ours.add(self.staged)
            self.staged = None

    def drop(self, deadline: Deadline, keep: str | None = None) -> None:
        """Drop the staged adapter, which did not pass and which no request ever used; unless it is `keep`, which the
        other engines have committed."""
        if self.staged is not None and self.staged == keep:
            self.settle()
        staged, self.staged = self.staged, None
        if staged is not None:
            self.ours.add(staged)  # should the drop fail, it is tried again when something is published
            self._ranks.ask(DropLoraJob(staged), RankDone, deadline)
            self.ours.discard(staged)

    def publish(self, version: int, name: str | None) -> None:
        """Serve `version` (0: what the engine called its own before this bridge) with this adapter. An adapter that
        is served and that somebody else has unloaded cannot be published again."""
        if self.staged is not None:
            self.settle()
        if name is None or name != self.current or not self.lost:
            self._driver.publish(version or self._label, name)
            self.current = name

    def tidy(self) -> None:
        """Retire adapters that do not serve any more. A failure costs a slot until the next time, and nothing else."""
        old = sorted(self.loaded - {self.current}) if self.ours else []
        try:
            self._driver.retire(old)
        except BridgeError as error:
            log.warning("adapters could not be retired yet: %s", error)
        if self.ours:
            self.ours &= self.loaded
