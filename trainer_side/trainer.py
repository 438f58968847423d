"""The trainer's model and tensors for one Bridge, behind `bridge.ports.TrainerPort`."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import nn

from bridge.errors import BridgeError, ConfigError, MissingTensor, UnexpectedTensor
from bridge.model import canary
from bridge.model.lora_format import LoraLimits
from bridge.model.manifest import TensorInfo
from bridge.ports import Choice, Snapshot, Written
from bridge.protocol.coordinator_messages import Reference
from bridge.shm.arena import Arena
from trainer_side.lora.base_fingerprint import base_fingerprint
from trainer_side.lora.model import LoraModel, ModeView
from trainer_side.lora.state import changed_meanwhile, require_still_forward
from trainer_side.lora.without_lora import copy_without_lora
from trainer_side.names.naming import CanonicalMap
from trainer_side.names.tensor_checks import NamedTensors, read_pairs
from trainer_side.names.tensor_layout import Collected, TensorLayout, WeightSource
from trainer_side.reference import reference_logprobs, vocabulary_size
from trainer_side.snapshot.snapshotter import WRITE_TIMEOUT_S, Snapshotter


class TrainerSide:
    """The trainer's model and tensors for one Bridge. Not thread safe; `Bridge` calls it from one push at a time."""

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._lora: LoraModel | None = None
        self._source = WeightSource()
        self._views: dict[str, tuple[CanonicalMap | None, WeightSource]] = {}
        """Mode -> names of the LoRA model in that mode, and the source that resolves them."""
        self._complete: TensorLayout | None = None
        self._snapshotters: dict[bool, Snapshotter] = {}
        """By whether they write adapters: each kind has an arena of its own."""
        self._storages: frozenset[int] = frozenset()
        self._addresses: list[int] = []

    @property
    def bound(self) -> bool:
        return self._model is not None

    def bind(self, model: nn.Module) -> None:
        """Bake the model's checkpoint names. Raises ConfigError or IntegrityError where `bake_names` does."""
        lora = LoraModel(model) if isinstance(model, nn.Module) and LoraModel.present(model) else None
        self._source = WeightSource() if lora is not None else WeightSource(model)
        self._lora, self._model = lora, model
        self._views.clear()

    # ---- names and tensors -------------------------------------------------------------------------------------------

    def choose(self, mode: str, limits: Sequence[LoraLimits | None]) -> Choice:
        """As `TrainerPort.choose`."""
        if self._lora is not None:
            return self._lora.choose(mode, limits)
        if mode == "auto":
            return Choice("full", "a model without LoRA: every tensor as it stands")
        if mode == "full":
            return Choice("full", "asked for")
        raise ConfigError(
            "this mode needs a model with LoRA",
            where="mode",
            expected="auto | full",
            got=repr(mode),
            remedy="bind the PEFT model (b.bind(model))" if self._model is None else "leave mode out",
        )

    def collect(self, named: Iterable[tuple[str, torch.Tensor]], *, partial: bool, mode: str = "full") -> Collected:
        """What travels in a mode, checked to be the whole bound model unless `partial`. Moves no bytes."""
        if self._lora is not None:
            return self._collect_lora(self._lora, named, partial, mode)
        try:
            collected = self._source.collect(named, partial=partial)
            if collected.layout is not self._complete and not partial:
                _require_all(self._source, collected.tensors)
                self._complete = collected.layout
        except (UnexpectedTensor, MissingTensor) as error:
            if self._model is not None and LoraModel.present(self._model):
                raise _wrapped_since(error) from error
            raise
        if collected.addresses != self._addresses:  # the same tensors as last time lie in the same storages
            self._storages = frozenset(t.untyped_storage().data_ptr() for t in collected.sources if t.numel())
            self._addresses = collected.addresses
        return collected

    def _collect_lora(self, lora: LoraModel, named: NamedTensors, partial: bool, mode: str) -> Collected:
        names, tensors = read_pairs(named)
        self._storages = frozenset(
            t.untyped_storage().data_ptr() for t in tensors if type(t) in (torch.Tensor, nn.Parameter) and not t.is_meta
        )
        view = lora.view(mode, list(zip(names, tensors, strict=True)), partial=partial)
        known, source = self._views.get(mode, (None, None))
        if source is None or known is not view.known:
            # an adapter's names are those of `lora_format`, made by us: there is no model's name to resolve
            source = WeightSource(None if view.known is None else lora.model, view.known)
            self._views[mode] = (view.known, source)
        collected = source.collect(view.named, partial=partial, computed=view.computed)
        if not partial and view.adapter is None:
            _require_all(source, collected.tensors)
        return dataclasses.replace(collected, adapter=view.adapter, notes=tuple(view.notes), state=view)

    def collect_base(self) -> Collected:
        """As `TrainerPort.collect_base`."""
        if self._lora is None or self._model is None:
            raise ConfigError("only a bound model with LoRA has a base", remedy="b.bind(peft_model)")
        self._lora.choose("base", None)
        kept = self._storages
        collected = self._collect_lora(self._lora, self._model.named_parameters(), False, "base")
        self._storages = kept
        return collected

    def base_mark(self, sent: Snapshot | None = None) -> Hashable | None:
        """As `TrainerPort.base_mark`."""
        if self._lora is None or self._model is None:
            return None
        view = self._lora.view("base", self._lora.tensors(), partial=False)
        live = [tensor for _, tensor in view.named]
        if isinstance(sent, Collected) and not {t.data_ptr() for t in live} >= set(sent.addresses) - {0}:
            return None
        return base_fingerprint(view.named)

    # ---- the snapshot ------------------------------------------------------------------------------------------------

    def write(
        self,
        snapshot: Snapshot,
        arena: Arena,
        slot: int,
        base: int | None,
        *,
        allow_nonfinite: bool,
        threads: int,
        timeout_s: float = WRITE_TIMEOUT_S,
    ) -> Written:
        """Copy the collected tensors into the unsealed slot; blocks for one pass over them, at most `timeout_s`.

        Raises as `Snapshotter.write`, and IntegrityError when the LoRA layers changed since the tensors were collected.
        """
        if not isinstance(snapshot, Collected):
            raise ConfigError(
                "only what this trainer side collected can be written",
                where="snapshot",
                expected="the value that collect() returned",
                got=type(snapshot).__name__,
                remedy="call collect() of the same TrainerSide",
            )
        kind = snapshot.adapter is not None
        writer = self._snapshotters.get(kind)
        if writer is None or writer.arena is not arena:
            if writer is not None:
                writer.close()
            writer = self._snapshotters[kind] = Snapshotter(arena, threads)
        try:
            written = writer.write(slot, snapshot, base=base, allow_nonfinite=allow_nonfinite, timeout_s=timeout_s)
        except (BridgeError, RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
            # what another thread takes away while it is read fails anywhere, in words that help nobody
            if self._changed_since(snapshot):
                raise changed_meanwhile() from error
            raise
        if self._changed_since(snapshot):
            raise changed_meanwhile()
        return written

    def _changed_since(self, snapshot: Collected) -> bool:
        view = snapshot.state
        return self._lora is not None and isinstance(view, ModeView) and self._lora.changed_since(view)

    def reference(self, max_tokens: int | None = None, mode: str = "full") -> tuple[Reference, Reference | None]:
        """One no-grad forward of the bound model (and one without its adapters) over the canary's prompts, at most
        `max_tokens` long."""
        if self._model is None:
            raise ConfigError("the canary needs the live model", remedy="b.bind(model)")
        rows = canary.prompts(vocabulary_size(self._model), max_tokens)

        def answers(model: nn.Module) -> Reference:
            return Reference(tuple(map(tuple, rows)), tuple(map(tuple, reference_logprobs(model, rows))))

        if mode == "base":
            return answers(copy_without_lora(self._model)), None
        if self._lora is not None:
            require_still_forward(self._model)
        return answers(self._model), answers(copy_without_lora(self._model)) if mode == "adapter" else None

    def storages(self) -> frozenset[int]:
        """Storage addresses of the last snapshot's tensors."""
        return self._storages

    def close(self) -> None:
        """Stop the copying threads and let go of the arenas. Idempotent."""
        for writer in self._snapshotters.values():
            writer.close()
        self._snapshotters.clear()


def _require_all(source: WeightSource, tensors: tuple[TensorInfo, ...]) -> None:
    expected = source.expected
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


def _wrapped_since(error: UnexpectedTensor | MissingTensor) -> ConfigError:
    return ConfigError(
        "the bound model was wrapped with LoRA after it was bound",
        where=error.where,
        expected="the model as it was bound",
        got="LoRA layers in it",
        remedy="bind the wrapped model: b.bind(peft_model)",
        names=error.names,
    )
