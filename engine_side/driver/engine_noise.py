"""Engine noise: how far an engine answers from the trainer on the very same weights, as it was started.

It is measured once in an engine's life: before the first load of weights, when what the trainer sends is bit for bit
what the engine holds. Later nobody could tell noise from what a load broke.
"""

from __future__ import annotations

from bridge.errors import CanaryMismatch
from bridge.model.receipt import CanaryResult
from bridge.protocol.deadline import Deadline
from bridge.protocol.rank_jobs import NoiseJob, RankNoise
from engine_side.driver.rank_client import RankClient
from engine_side.protocol import DeclaresLosses, EngineDriver


class EngineNoise:
    """The noise of one engine. Used by its output checks.

    Attributes:
        losses: what the engine's configuration declares to be stored or computed more coarsely than in the trainer.
        fraction: mean |difference| over the spread of the trainer's log-probabilities; None while it is not known.
    """

    def __init__(self, engine_id: str, driver: EngineDriver, ranks: RankClient) -> None:
        self._id = engine_id
        self._ranks = ranks
        self.losses: tuple[str, ...] = driver.losses if isinstance(driver, DeclaresLosses) else ()
        self.fraction: float | None = None
        self._loaded = False

    def pristine(self, deadline: Deadline) -> bool:
        """Tell whether no load of weights has ever begun in this engine. Until one has, each call asks the ranks, which
        outlive bridges, and takes over the noise that an earlier bridge has measured; blocks for that."""
        if not self._loaded:
            answers = self._ranks.ask(NoiseJob(), RankNoise, deadline)
            self.fraction = answers[0].noise
            self._loaded = any(answer.loaded for answer in answers)
        return not self._loaded

    def judge(self, drift: CanaryResult, deadline: Deadline) -> None:
        """Take the difference in a pristine engine for its noise if its configuration declares losses, and have the
        ranks keep that. Raises CanaryMismatch for a difference above the limit that nothing declares."""
        if self.losses and drift.spread > 0:
            self.fraction = drift.mean_abs / drift.spread
            self._ranks.ask(NoiseJob(self.fraction), RankNoise, deadline)
        elif not drift.ok:
            raise undeclared_error(self._id, drift)

    def inconclusive(self, drift: CanaryResult) -> str:
        """Say in a receipt why the canary shows nothing."""
        return (
            f"the canary of {self._id} shows nothing: with {', '.join(self.losses)} it answered otherwise than the "
            f"trainer on the same weights, before anything was pushed, by {drift.noise or 0.0:.2f} of the trainer's "
            f"standard deviation; now by {drift.mean_abs:.4f} nats, at a standard deviation of {drift.spread:.4f}"
        )


def undeclared_error(engine: str, drift: CanaryResult) -> CanaryMismatch:
    """Make the error for an engine that answered otherwise than the trainer before anything was pushed."""
    return CanaryMismatch(
        "trainer and engine answered differently on the same weights before anything was pushed, and the engine's "
        "configuration declares no loss that would explain it",
        where=f"{engine}, {drift.tokens} canary tokens, weights equal bit for bit",
        expected=f"mean |difference| at most {drift.limit:.4f} nats",
        got=f"mean {drift.mean_abs:.4f}, max {drift.max_abs:.4f}; trainer's standard deviation {drift.spread:.4f}",
        remedy="start the engine with the trainer's configuration (rotary base, norm epsilon, scales, dtype)",
    )
