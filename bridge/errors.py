"""The one tree of errors.

Every error says what went wrong, where, what was expected, what came instead, and how to mend it. Each class carries
the exit code that the command line uses for it. Errors cross process boundaries as plain data
(`bridge.protocol.codec.ErrorInfo`), never pickled, and are rebuilt from `ERRORS_BY_NAME`.

    BridgeError
    ├── ConfigError 2            NotFound, Busy, LeaseHeld, Closed, OutOfMemory
    ├── TransportError 3         PeerLost, DeadlineExceeded, ArenaFull
    ├── ProtocolError 4
    ├── IntegrityError 5         MissingTensor, UnexpectedTensor, DuplicateTensor, ShapeMismatch, DtypeMismatch,
    │                            NonFinite, DigestMismatch, CanaryMismatch, UnsupportedLora
    ├── StaleVersion 6
    └── PushAborted 7            EngineQuarantined
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from bridge.model.receipt import Receipt

UNHEALTHY_EXIT = 1
"""Exit code of a command that ran and found something unhealthy."""
BUG_EXIT = 70
"""Exit code for anything that is not in this tree: a bug of ours."""

SAME_MODEL = (
    "start the engine from a checkpoint of this model (model.save_pretrained), or push a model of the engine's "
    "configuration"
)
"""Remedy where trainer and engine hold models of different configurations."""
BIND = "bind the model (b.bind(model)), so that live names become checkpoint names"
"""Remedy where nobody knows what the trainer's names mean."""
REPORT = "this is a fault of weighbridge: please report it"
"""Remedy where no action of a user leads to the error."""
GATHER = (
    "gather it and push the whole tensor: push inside of deepspeed.zero.GatheredParameters(list(model.parameters())) "
    "or FSDP.summon_full_params(model), or push tensor.full_tensor()"
)
"""Remedy for a tensor whose values lie in other processes."""


def some_names(names: Sequence[str]) -> str:
    """Join the first few names for a message; `names` of the error has all."""
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


class BridgeError(Exception):
    """Root of the tree.

    Args:
        what: one sentence; ends without a full stop.
        where: the tensor, file, engine, rank or option.
        expected: the right value.
        got: the value that came.
        remedy: the reader's next step.
        names: every tensor (or module) concerned, for programs.
    """

    exit_code: int = BUG_EXIT

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        remedy: str | None = None,
        names: tuple[str, ...] = (),
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.got = got
        self.remedy = remedy
        self.names = tuple(names)
        super().__init__(self._message())

    def _message(self) -> str:
        return "; ".join((self.what, *(f"{label}: {value}" for label, value in self.facts().items())))

    def facts(self) -> dict[str, str]:
        """List where, expected, got and remedy, as far as they are known."""
        known = {"where": self.where, "expected": self.expected, "got": self.got, "remedy": self.remedy}
        return {label: value for label, value in known.items() if value is not None}

    def amended(self, **changes: Any) -> Self:
        """Copy the error with other text, when a caller knows more: `changes` are arguments of the constructor."""
        fields = {name: getattr(self, name) for name in ("what", "where", "expected", "got", "remedy", "names")}
        return type(self)(**{**fields, **changes})


class ConfigError(BridgeError):
    """The call, option or environment is wrong; nothing was attempted."""

    exit_code = 2


class NotFound(ConfigError):
    """No daemon, engine, file or version of that name."""


class Busy(ConfigError):
    """Another push is in flight."""


class LeaseHeld(ConfigError):
    """Another trainer process holds the right to push."""


class Closed(ConfigError):
    """The Bridge (or daemon) was closed."""


class OutOfMemory(ConfigError):
    """The engine's host or device has no memory left for an experiment or a rebuild of one of its modules."""


class TransportError(BridgeError):
    """Bytes or messages could not be moved."""

    exit_code = 3


class PeerLost(TransportError):
    """A process on the other side is gone."""


class DeadlineExceeded(TransportError):
    """A wait outlasted its deadline."""


class ArenaFull(TransportError):
    """Not enough shared memory for the arena; raised before anything is created."""


class ProtocolError(BridgeError):
    """A message, frame, plan or version does not fit the protocol."""

    exit_code = 4


class IntegrityError(BridgeError):
    """Weights are incomplete, of another form, or other than the trainer's."""

    exit_code = 5


class MissingTensor(IntegrityError):
    """The engine needs a tensor that was not sent."""


class UnexpectedTensor(IntegrityError):
    """A tensor was sent that no engine has a place for."""


class DuplicateTensor(IntegrityError):
    """One name was sent twice, or one engine element is written twice."""


class ShapeMismatch(IntegrityError):
    """A tensor's shape does not fit its destination."""


class DtypeMismatch(IntegrityError):
    """A tensor's dtype cannot travel, or changed since the plan was made."""


class NonFinite(IntegrityError):
    """A tensor holds NaN or infinity."""


class DigestMismatch(IntegrityError):
    """Bytes differ from those that were sealed, or that the trainer sent."""


class CanaryMismatch(IntegrityError):
    """The engine's log-probabilities are not the trainer's."""


class UnsupportedLora(IntegrityError):
    """A LoRA module that no mode can carry."""


class StaleVersion(BridgeError):
    """The pushed version is not newer than every version issued before."""

    exit_code = 6


class PushAborted(BridgeError):
    """A push failed after the first engine write; every engine was put back or quarantined.

    Attributes:
        receipt: the record of the failed push, or None when it could not be written.
        serving: engine id -> version that it serves now (None = quarantined, serves nothing).
    """

    exit_code = 7

    def __init__(
        self,
        what: str,
        *,
        receipt: Receipt | None = None,
        serving: Mapping[str, int | None] | None = None,
        **facts: Any,
    ) -> None:
        """`facts` are the arguments of every error: where, expected, got, remedy, names."""
        super().__init__(what, **facts)
        self.receipt = receipt
        self.serving: dict[str, int | None] = dict(serving or {})


class EngineQuarantined(PushAborted):
    """An engine holds unverified weights; it refuses to generate."""


ERRORS_BY_NAME: Mapping[str, type[BridgeError]] = {
    name: cls for name, cls in list(vars().items()) if isinstance(cls, type) and issubclass(cls, BridgeError)
}
"""Class name -> class, for errors that arrive as data from another process."""
