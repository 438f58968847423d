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
        kept: name of a value of the engine's checkpoint -> the announced tensor beside which it is kept.
        schemes: the checkpoint; None where nothing is quantised.
    """

    tensors: tuple[TensorInfo, ...]
    quantised: dict[str, QuantisedWeight]
    kept: dict[str, str]
    schemes: CheckpointSchemes | None = None

    @property
    def owner(self) -> dict[str, str]:
        """Name of a tensor that nobody announced -> the announced tensor with which it changes."""
        return {**{weight.scales: name for name, weight in self.quantised.items()}, **self.kept}


def checkpoint_form(host: RankHost, announced: Sequence[TensorInfo], partial: bool) -> CheckpointForm:
    """Find the form in which announced tensors reach the engine's loader.

    Reads some of the engine's checkpoint where values were announced for codes. Raises DtypeMismatch, naming the
    method, for a weight whose codes no scheme gives.
    """
    plain = CheckpointForm(tuple(announced), {}, {})
    source = host.quantised_checkpoint() if isinstance(host, ServesCodes) else None
    if source is None or not any(info.dtype in FLOATS for info in announced):
        return plain
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
    if not quantised:
        return plain
    kept: dict[str, str] = {}
    for name in schemes.kept(names, [weight.stored for weight in quantised.values()], partial):
        kept[name] = _beside(name, quantised)
        tensors.append(schemes.tensors[name])
    return CheckpointForm(tuple(tensors), quantised, kept, schemes)


def _beside(name: str, quantised: dict[str, QuantisedWeight]) -> str:
    """Find the quantised weight in whose module, or next below whose parent, a kept value lies."""
    module = name.rpartition(".")[0]
    return next(
        weight for weight in quantised if module in (found := weight.rpartition(".")[0], found.rpartition(".")[0])
    )
