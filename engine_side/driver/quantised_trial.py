"""Find out, when a bridge attaches to an engine with quantised weights, whether any push could update it.

Makes the experiments that a push would make, on the tensors of the checkpoint from which the engine was started.
"""

from __future__ import annotations

from bridge.errors import BridgeError, ConfigError, OutOfMemory, TransportError
from bridge.protocol.deadline import Deadline
from bridge.protocol.rank_jobs import BakeJob, ForgetJob, RankBake, RankDone
from engine_side.driver.rank_client import RankClient
from engine_side.protocol import EngineDriver, MayBeQuantised
from engine_side.quantise.reproduce import CheckpointSchemes

_PLAN = -1
"""Plan number of the trial; pushes count theirs from 0."""


def require_strategies(engine: str, driver: EngineDriver, ranks: RankClient, deadline: Deadline) -> None:
    """Raise ConfigError, with the first module's class, for a quantised engine that no push could update.

    Called once when a bridge attaches; blocks for the experiments; writes no live weight. Without a checkpoint at hand,
    the first push makes the experiments instead. Raises OutOfMemory, PeerLost and DeadlineExceeded as they come: these
    say nothing about the weights.
    """
    if not isinstance(driver, MayBeQuantised) or driver.quantisation is None or driver.checkpoint is None:
        return
    schemes = CheckpointSchemes(driver.checkpoint, {})
    tensors = tuple(info for name, info in schemes.tensors.items() if name not in schemes.calibrated)
    if not tensors:
        return
    try:
        ranks.ask(BakeJob(_PLAN, tensors, False), RankBake, deadline)
    except (OutOfMemory, TransportError):
        raise
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
