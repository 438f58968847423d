"""Can weights be brought into this engine at all? Asked when a bridge attaches to one whose weights are quantised, by
the experiments that a push would make, on the tensors of the checkpoint that the engine was started from."""

from __future__ import annotations

from bridge.errors import BridgeError, ConfigError
from bridge.protocol.deadline import Deadline
from bridge.protocol.rank_jobs import BakeJob, ForgetJob, RankBake, RankDone
from engine_side.driver.rank_client import RankClient
from engine_side.plan.unfilled import checkpoint_tensors
from engine_side.protocol import EngineDriver, MayBeQuantised

_PLAN = -1
"""Pushes count theirs from 0."""


def require_strategies(engine: str, driver: EngineDriver, ranks: RankClient, deadline: Deadline) -> None:
    """Raises ConfigError, with the first module's class, for a quantised engine that no push could update. An engine
    whose checkpoint is not at hand is asked by its first push. Blocks for the experiments; writes no live weight."""
    if not isinstance(driver, MayBeQuantised) or driver.quantisation is None or driver.checkpoint is None:
        return
    tensors = checkpoint_tensors(driver.checkpoint)
    if not tensors:
        return
    try:
        ranks.ask(BakeJob(_PLAN, tensors, False), RankBake, deadline)
    except BridgeError as error:
        raise ConfigError(
            f"weights quantised as {driver.quantisation} cannot be brought into this engine: {error.what}",
            where=error.where or engine,
            expected=error.expected,
            got=error.got,
            remedy="start the engine with weights that are not quantised",
            names=error.names,
        ) from error
    ranks.ask(ForgetJob(()), RankDone, deadline)
