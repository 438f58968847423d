"""Turn what a trainer announces into the form of the engine's quantised checkpoint, for a plan of the engine's loader.

A weight that is announced as values, and that the checkpoint stores as codes, is replaced by codes and scales; values
that were calibrated for the checkpoint, which no trainer has, are added as they are there. Everything else is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bridge.model.dtypes import FLOATS
from bridge.model.manifest import TensorInfo
from engine_side.protocol import RankHost, ServesCodes
from engine_side.quantise.reproduce import CheckpointSchemes, StoredWeight
from engine_side.quantise.scheme import Scheme


@dataclass(frozen=True)
class QuantisedWeight:
    """One announced weight that becomes codes (under its own name) and scales; `cast` is the dtype of the values that
    the engine's loader would make of it first."""

    stored: StoredWeight
    scheme: Scheme
    cast: str

    @property
    def name(self) -> str:
        return self.stored.weight.name

    @property
    def scales(self) -> str:
        return self.stored.scales.name


@dataclass(frozen=True)
class CheckpointForm:
    """The tensors for which a plan is baked.

    Attributes:
        tensors: those in the form of the checkpoint.
        quantised: name of an announced weight -> what becomes of it.
        kept: name of a calibrated value of the checkpoint -> an announced tensor with which it belongs.
        schemes: the checkpoint; None for an engine whose checkpoint is not quantised.
    """

    tensors: tuple[TensorInfo, ...]
    quantised: dict[str, QuantisedWeight]
    kept: dict[str, str]
    schemes: CheckpointSchemes | None = None

    @property
    def owner(self) -> dict[str, str]:
        """Name of a tensor that nobody announced -> the announced tensor with which it changes."""
        return {**{weight.scales: name for name, weight in self.quantised.items()}, **self.kept}

    def sendable(self, names: Sequence[str]) -> tuple[str, ...]:
        """Leave out, of names of the checkpoint, what a trainer of values has not: scales, calibrated values."""
        if self.schemes is None or not self.quantised:
            return tuple(names)
        made = {part for name in names for part in self.schemes.parts(name)} | self.schemes.calibrated
        return tuple(name for name in names if name not in made)


def checkpoint_form(host: RankHost, announced: Sequence[TensorInfo], partial: bool) -> CheckpointForm:
    """Find the form in which announced tensors reach the engine's loader.

    Called once per plan. Reads some of the engine's checkpoint where values were announced for codes. Raises
    DtypeMismatch, naming the method, for a weight whose codes no scheme gives.
    """
    source = host.quantised_checkpoint() if isinstance(host, ServesCodes) else None
    if source is None:
        return CheckpointForm(tuple(announced), {}, {})
    schemes = CheckpointSchemes(source.folder, source.config)
    names = {info.name for info in announced}
    quantised: dict[str, QuantisedWeight] = {}
    tensors: list[TensorInfo] = []
    for info in announced:
        weight = None
        if info.dtype in FLOATS and not names & schemes.parts(info.name):
            weight = schemes.scheme(info.name) if schemes.stored_as_codes(info.name) else None
        if weight is None:
            tensors.append(info)
            continue
        stored, scheme = weight
        quantised[info.name] = QuantisedWeight(stored, scheme, source.dtype)
        tensors += [TensorInfo(info.name, stored.weight.dtype, info.shape, info.aliases), stored.scales]
    kept = dict(schemes.kept(names, partial))
    return CheckpointForm((*tensors, *(schemes.tensors[name] for name in kept)), quantised, kept, schemes)
