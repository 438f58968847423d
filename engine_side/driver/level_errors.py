"""Turn failed verification levels into the errors that a person reads."""

from __future__ import annotations

from collections.abc import Mapping

from bridge.errors import CanaryMismatch, DigestMismatch, IntegrityError, MissingTensor
from bridge.model.declared_losses import DeclaredLosses
from bridge.model.receipt import CanaryResult, Failure, LevelResult

ERROR_OF_LEVEL: Mapping[str, type[IntegrityError]] = {
    "transfer": DigestMismatch,
    "coverage": MissingTensor,
    "attributes": IntegrityError,
    "read-back": DigestMismatch,
    "probe": IntegrityError,
    "change": IntegrityError,
    "canary": CanaryMismatch,
    "cache": CanaryMismatch,
}


def level_error(engine: str, rank: int, level: LevelResult) -> IntegrityError:
    """Make the error of a failed level: its first failure in the message, the tensors of all in `names`."""
    first = level.failures[0] if level.failures else Failure("?", "", "")
    more = f" (and {len(level.failures) - 1} more)" if len(level.failures) > 1 else ""
    kind = ERROR_OF_LEVEL[level.level]
    return kind(
        f"the {level.level} check failed",
        where=f"{first.name}{more} on {engine} rank {rank}",
        expected=first.expected,
        got=first.got,
        remedy="push again; if it fails again, start the engine anew (weighbridge explain NAME TENSOR shows where a "
        "tensor goes and by which strategy)",
        names=tuple(dict.fromkeys(failure.tensor or failure.name for failure in level.failures)),
    )


def canary_error(engine: str, drift: CanaryResult, losses: DeclaredLosses) -> CanaryMismatch:
    """Make the error of a canary above its limit. `losses` are those that the engine's configuration declares."""
    remedy = (
        "bits and probes passed: start the engine anew from a checkpoint of this model; if it fails again, derived "
        "state that a load does not reach is wrong (rope, caches, scales)"
    )
    if losses and drift.noise is None:
        remedy = (
            f"this engine has {losses}, and its noise is not known: it is measured by a first push of the "
            "very weights that the engine was started with. Start it from the trainer's present weights and push those "
            "first, or pass canary_limit=NATS"
        )
    return CanaryMismatch(
        "the canary check failed: the engine's log-probabilities are not the trainer's",
        where=f"{engine}, {drift.tokens} canary tokens",
        expected=f"mean |difference| at most {drift.limit:.4f} nats",
        got=f"mean {drift.mean_abs:.4f}, max {drift.max_abs:.4f}",
        remedy=remedy,
    )
