"""`TrainerSide`: everything one Bridge needs from the trainer's process, behind `bridge.ports.TrainerPort`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from bridge import canary
from bridge.arena import Arena
from bridge.errors import ConfigError, MissingTensor
from bridge.manifest import TensorInfo
from bridge.messages import Reference
from bridge.ports import Snapshot, Written
from trainer_side.reference import reference_logprobs, vocabulary_size
from trainer_side.snapshot import Snapshotter
from trainer_side.source import Collected, Layout, WeightSource


class TrainerSide:
    """The trainer's model and tensors for one Bridge. Not thread safe; `Bridge` calls it from one push at a time."""

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._source = WeightSource()
        self._complete: Layout | None = None
        self._snapshotter: Snapshotter | None = None
        self._storages: frozenset[int] = frozenset()
        self._addresses: list[int] = []

    @property
    def bound(self) -> bool:
        return self._model is not None

    def bind(self, model: nn.Module) -> None:
        """Bake the model's checkpoint names. Raises ConfigError or IntegrityError where `bake_names` does."""
        self._source = WeightSource(model)
        self._model = model

    def collect(self, named: Iterable[tuple[str, torch.Tensor]], *, partial: bool) -> Collected:
        """What `WeightSource.collect` gives, checked to be the whole bound model unless `partial`."""
        collected = self._source.collect(named, partial=partial)
        if collected.layout is not self._complete and not partial:
            self._require_all(collected.tensors)
            self._complete = collected.layout
        addresses = collected.addresses
        if addresses != self._addresses:  # the same tensors as last time lie in the same storages
            self._storages = frozenset(t.untyped_storage().data_ptr() for t in collected.sources if t.numel())
            self._addresses = addresses
        return collected

    def _require_all(self, tensors: tuple[TensorInfo, ...]) -> None:
        expected = self._source.expected
        if expected is None:
            return
        came = {name for info in tensors for name in (info.name, *info.aliases)}
        missing = tuple(info.name for info in expected if info.name not in came)
        if missing:
            raise MissingTensor(
                "tensors of the bound model were not sent",
                where=f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}",
                expected=f"{len(expected)} tensors",
                got=f"{len(expected) - len(missing)}",
                remedy="push all of model.named_parameters(), or say partial=True when a subset is meant",
                names=missing,
            )

    def write(
        self, snapshot: Snapshot, arena: Arena, slot: int, base: int | None, *, allow_nonfinite: bool, threads: int
    ) -> Written:
        """Blocks for one pass over the tensors. Raises NonFinite, ProtocolError."""
        if not isinstance(snapshot, Collected):
            raise ConfigError("a snapshot of another trainer side", got=type(snapshot).__name__)
        if self._snapshotter is None or self._snapshotter.arena is not arena:
            self.close()
            self._snapshotter = Snapshotter(arena, threads)
        return self._snapshotter.write(slot, snapshot, base=base, allow_nonfinite=allow_nonfinite)

    def reference(self, max_tokens: int | None = None) -> Reference:
        """One no-grad forward of the bound model over the canary's prompts, at most `max_tokens` long."""
        if self._model is None:
            raise ConfigError("the canary needs the live model", remedy="b.bind(model)")
        rows = canary.prompts(vocabulary_size(self._model), max_tokens)
        scores = reference_logprobs(self._model, rows)
        return Reference(tuple(map(tuple, rows)), tuple(map(tuple, scores)))

    def storages(self) -> frozenset[int]:
        """Storage addresses of the last snapshot's tensors."""
        return self._storages

    def close(self) -> None:
        """Stop the copying threads and let go of the arena. Idempotent."""
        if self._snapshotter is not None:
            self._snapshotter.close()
            self._snapshotter = None
