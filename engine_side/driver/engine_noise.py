"""Engine noise: how far an engine answers from the trainer on the very same weights, as it was started.

It is measured once in an engine's life: before the first write to a weight, when what the trainer sends is bit for bit
what the engine holds. Later nobody could tell noise from what a load broke.
"""

from __future__ import annotations

from bridge.errors import CanaryMismatch
from bridge.model.declared_losses import DeclaredLosses, Noise
from bridge.model.receipt import CanaryResult
from bridge.protocol.coordinator_messages import Reference
from bridge.protocol.deadline import Deadline
from bridge.protocol.rank_jobs import NoiseJob, RankNoise
from engine_side.driver.rank_client import RankClient
from engine_side.protocol import DeclaresLosses, EngineDriver

ROUNDING_MARGIN = 2.5
"""How much more an engine's declared losses may change than rounding does in the trainer: a KV cache that cuts digits
off, as vLLM's on CPU does for fp8_e5m2, makes errors twice as large."""


class EngineNoise:
    """The noise of one engine. Used by its output checks.

    Attributes:
        losses: what the engine's configuration declares.
        measured: None while it is not known.
    """

    def __init__(self, engine_id: str, driver: EngineDriver, ranks: RankClient) -> None:
        self._id = engine_id
        self._ranks = ranks
        self.losses = driver.losses if isinstance(driver, DeclaresLosses) else DeclaredLosses()
        self.measured: Noise | None = None
        self._settled = False  # judged, or too late for that

    def measurable(self, deadline: Deadline) -> bool:
        """Tell whether the noise can be measured now: no load of weights has ever begun to write in this engine, and it
        was not judged yet. As long as it can, each call asks the ranks, which outlive bridges, and takes over what an
        earlier bridge has measured; blocks for that."""
        if not self._settled:
            answers = self._ranks.ask(NoiseJob(), RankNoise, deadline)
            self.measured = answers[0].noise
            self._settled = self.measured is not None or any(answer.written for answer in answers)
        return not self._settled

    def judge(self, drift: CanaryResult, reference: Reference, deadline: Deadline) -> None:
        """Take the difference in an engine as it was started for its noise if losses are declared, and have the ranks
        keep that.

        Raises CanaryMismatch for a difference above the limit without a declared loss, or above what the declared ones
        explain, if that is known.
        """
        rounding = reference.rounding_of(self.losses)
        explained = None if rounding is None else ROUNDING_MARGIN * rounding * drift.spread
        if not drift.ok and (not self.losses or (explained is not None and drift.mean_abs > explained)):
            raise undeclared_error(self._id, drift, self.losses, explained)
        if self.losses and drift.spread > 0:
            fraction = drift.mean_abs / drift.spread
            self.measured = Noise(fraction, fraction / rounding if rounding else None)
            self._ranks.ask(NoiseJob(self.measured), RankNoise, deadline)
        self._settled = True

    def expected(self, reference: Reference) -> float | None:
        """Tell the noise to expect of the reference's weights, as a fraction of its spread; None while unknown."""
        return None if self.measured is None else self.measured.expected(reference.rounding_of(self.losses))

    def inconclusive(self, drift: CanaryResult) -> str:
        """Say in a receipt why the canary shows nothing."""
        return (
            f"the canary of {self._id} shows nothing: with {self.losses}, and by how it answered before anything was "
            f"pushed, it may be {drift.noise or 0.0:.2f} of the trainer's standard deviation off; it is "
            f"{drift.mean_abs:.4f} nats off, at a standard deviation of {drift.spread:.4f}"
        )


def undeclared_error(
    engine: str, drift: CanaryResult, losses: DeclaredLosses, explained: float | None
) -> CanaryMismatch:
    """Make the error for an engine that answered otherwise than the trainer before anything was pushed.

    Args:
        losses, explained: what its configuration declares, and the nats that this explains.
    """
    why = f"by more than {losses} can explain" if losses else "and the engine's configuration declares no loss"
    limit = drift.limit if explained is None else max(drift.limit, explained)
    return CanaryMismatch(
        f"trainer and engine answered differently on the same weights before anything was pushed, {why}",
        where=f"{engine}, {drift.tokens} canary tokens, weights equal bit for bit",
        expected=f"mean |difference| at most {limit:.4f} nats",
        got=f"mean {drift.mean_abs:.4f}, max {drift.max_abs:.4f}; trainer's standard deviation {drift.spread:.4f}",
        remedy="start the engine with the trainer's configuration (rotary base, norm epsilon, scales, dtype)",
    )
