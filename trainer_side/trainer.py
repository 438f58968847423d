"""The trainer's model and tensors for one Bridge, behind `bridge.ports.TrainerPort`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import cast

import torch
from torch import nn

from bridge.errors import BIND, SAME_MODEL, BridgeError, ConfigError, MissingTensor, UnexpectedTensor, some_names
from bridge.model import canary
from bridge.model.declared_losses import Rounding
from bridge.model.lora_format import LoraLimits
from bridge.model.manifest import TensorInfo
from bridge.ports import ModeChoice, Snapshot, Written
from bridge.protocol.coordinator_messages import Reference, Rounded
from bridge.protocol.deadline import Deadline
from bridge.shm.arena import Arena
from bridge.shm.seal import seal_slot
from trainer_side.independence import find_dependent
from trainer_side.lora.base_fingerprint import base_fingerprint
from trainer_side.lora.layers.module_tree import inner_model
from trainer_side.lora.model import LoraModel, ModeView
from trainer_side.lora.state import changed_meanwhile, require_still_forward
from trainer_side.lora.without_lora import WithoutLora
from trainer_side.names.naming import CanonicalMap, live_places
from trainer_side.names.parametrized import explain_unexpected
from trainer_side.names.policy import explain_around
from trainer_side.names.tensor_checks import NamedTensors, read_pairs, require_plain, stream_pairs
from trainer_side.names.tensor_layout import Collected, TensorLayout, WeightSource
from trainer_side.reference import reference_logprobs, rounded_logprobs, vocabulary_size
from trainer_side.shielded.layer_calls import LayerCalls
from trainer_side.shielded.model_copy import ModelCopier
from trainer_side.snapshot.snapshotter import Snapshotter

BIND_REMEDY = f"{BIND}; what its logits do not depend on may then stay unused"
REBIND_REMEDY = "bind the model again after changing its modules"


class TrainerSide:
    """The trainer's model and tensors for one Bridge. Not thread safe; `Bridge` calls it from one push at a time."""

    def __init__(self) -> None:
        self.bound = False
        """True once a model is bound."""
        self._model: nn.Module | None = None
        self._lora: LoraModel | None = None
        self._source = WeightSource()
        self._views: dict[str, WeightSource] = {}
        """Mode -> what resolves the names of the LoRA model in that mode."""
        self._complete: TensorLayout | None = None
        self._snapshotters: dict[bool, Snapshotter] = {}
        """By whether they write a LoRA alone: each kind has an arena of its own."""
        self._storages: frozenset[int] = frozenset()
        self._addresses: list[int] = []

    def bind(self, model: nn.Module) -> None:
        """Read the model's names, ties and buffers. Raises ConfigError or IntegrityError as `bake_names`."""
        lora = LoraModel(model) if isinstance(model, nn.Module) and LoraModel.present(model) else None
        self._source = WeightSource() if lora is not None else WeightSource(model)
        self._lora, self._model, self.bound = lora, model, True
        self._views.clear()

    # ---- names and tensors -------------------------------------------------------------------------------------------

    def choose(self, mode: str, limits: Sequence[LoraLimits | None]) -> ModeChoice:
        """Choose the mode in which the bound model travels to engines with these limits; see `LoraModel.choose`."""
        if self._lora is not None:
            return self._lora.choose(mode, limits)
        if mode == "auto":
            return ModeChoice("full", "a model without LoRA: every tensor as it stands")
        if mode == "full":
            return ModeChoice("full", "asked for")
        raise ConfigError(
            "this mode needs a model with LoRA",
            where="mode",
            expected="auto | full",
            got=repr(mode),
            remedy="bind the PEFT model (b.bind(model))" if self._model is None else "leave mode out",
        )

    def collect(
        self,
        named: Iterable[tuple[str, torch.Tensor]],
        *,
        partial: bool,
        mode: str = "full",
        deadline: Deadline | None = None,
    ) -> Collected:
        """Resolve the pairs given to `push` into what travels in a mode. Moves no bytes.

        Raises as `WeightSource.collect` and `LoraModel.view`; MissingTensor unless they are the whole bound model or
        `partial`.
        """
        if self._lora is not None:
            return self._collect_lora(self._lora, named, partial, mode, deadline)
        try:
            collected = self._source.collect(named, partial=partial)
            if collected.layout is not self._complete and not partial:
                self._require_all(collected.tensors)
                self._complete = collected.layout
        except (UnexpectedTensor, MissingTensor) as error:
            if self._model is not None and LoraModel.present(self._model):
                raise ConfigError(
                    "the bound model was wrapped with LoRA after it was bound",
                    where=error.where,
                    expected="the model as it was bound",
                    got="LoRA layers in it",
                    remedy="bind the wrapped model: b.bind(peft_model)",
                    names=error.names,
                ) from error
            raise
        if collected.addresses != self._addresses:  # the same tensors as last time lie in the same storages
            self._storages = frozenset(t.untyped_storage().data_ptr() for t in collected.sources if t.numel())
            self._addresses = collected.addresses
        return dataclasses.replace(collected, storages=self._storages)

    def _require_all(self, tensors: tuple[TensorInfo, ...]) -> None:
        came = {name for info in tensors for name in (info.name, *info.aliases)}
        expected = self._source.expected or ()
        beside = self._source.map.beside if self._source.map is not None else frozenset[str]()
        missing = tuple(info.name for info in expected if info.name not in came and info.name not in beside)
        if missing:
            raise MissingTensor(
                "tensors of the bound model were not sent",
                where=some_names(missing),
                expected=f"{len(expected)} tensors",
                got=f"{len(expected) - len(missing)}",
                remedy="push all of model.named_parameters(), or say partial=True when a subset is meant",
                names=missing,
            )

    def _collect_lora(
        self, lora: LoraModel, named: NamedTensors, partial: bool, mode: str, deadline: Deadline | None = None
    ) -> Collected:
        names, tensors = read_pairs(named)
        storages = frozenset(
            t.untyped_storage().data_ptr() for t in tensors if type(t) in (torch.Tensor, nn.Parameter) and not t.is_meta
        )
        view = lora.view(mode, list(zip(names, tensors, strict=True)), partial=partial, deadline=deadline)
        source = self._views.get(mode)
        if source is None or source.map is not view.known:
            # The names of a LoRA alone are those of `lora_format`: there is no model's name to resolve.
            source = self._views[mode] = WeightSource(None if view.known is None else lora.model, view.known)
        collected = source.collect(view.named, partial=partial, computed=view.computed)
        return dataclasses.replace(
            collected,
            adapter=view.adapter,
            merged=view.merged,
            notes=view.notes,
            state=view,
            storages=storages,
        )

    def keep(self, named: NamedTensors) -> list[tuple[str, torch.Tensor]]:
        """Copy tensors to host memory as they come. Raises ConfigError for what is no pair, and as `require_plain`."""
        return [(name, require_plain(name, t).detach().to("cpu", copy=True)) for name, t in stream_pairs(named)]

    def collect_base(self) -> Collected:
        """Collect the bound model's base weights as they stand, whatever was pushed last.

        Raises ConfigError without a bound model with LoRA, UnsupportedLora for packed weights.
        """
        if self._lora is None:
            raise ConfigError(
                "only a bound model with LoRA has base weights",
                where="the bound model",
                expected="a model with LoRA layers",
                got="no model" if self._model is None else type(self._model).__name__,
                remedy="bind it: b.bind(peft_model)",
            )
        self._lora.choose("base", None)
        return self._collect_lora(self._lora, self._lora.model.named_parameters(), False, "base")

    def base_mark(self, sent: Snapshot | None = None) -> Hashable | None:
        """Fingerprint the bound model's base weights; None without any, or when `sent` holds other values than them."""
        if self._lora is None:
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
        version: int,
        allow_nonfinite: bool,
        threads: int,
        deadline: Deadline,
        unused: Collection[str] = (),
    ) -> Written:
        """Copy the collected tensors into the slot and seal it; blocks for one pass over them, until the deadline.

        Raises as `Snapshotter.write`, and IntegrityError when the LoRA layers changed since the tensors were collected.
        """
        collected = cast("Collected", snapshot)
        kind = collected.adapter is not None
        writer = self._snapshotters.get(kind)
        if writer is None or writer.arena is not arena:
            if writer is not None:
                writer.close()
            writer = self._snapshotters[kind] = Snapshotter(arena, threads)
        arena.begin(slot)
        started = time.perf_counter()
        try:
            copied = writer.write(
                slot, collected, base=base, allow_nonfinite=allow_nonfinite, deadline=deadline, unused=unused
            )
        except (BridgeError, RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
            # A layer that another thread takes away while it is read fails anywhere, with errors that help nobody.
            if self._lora is not None:
                _require_unchanged(self._lora, collected, error)
            raise
        if self._lora is not None:
            _require_unchanged(self._lora, collected)
            self._lora.note_snapshot(time.perf_counter() - started)
        return Written(seal_slot(arena, slot, version, copied.digests), copied.nbytes)

    def reference(
        self,
        snapshot: Snapshot,
        max_tokens: int | None = None,
        mode: str = "full",
        roundings: Iterable[Rounding] = (),
        *,
        deadline: Deadline,
    ) -> tuple[Reference, Reference | None]:
        """Compute the canary's reference: one no-grad forward of the bound model over its prompts, cut to `max_tokens`,
        and one more for each of `roundings`.

        Of mode "adapter" also one without LoRA; of mode "base" that one alone. Layers of the snapshot that only the
        model can call are compared on what they get in it. Raises ConfigError when the model has no reference,
        DeadlineExceeded when the forward outlasts the deadline, UnsupportedLora as `collect`.
        """
        if self._model is None:
            raise ConfigError(
                "the canary needs the live model",
                where='verify="outputs"',
                expected="a bound model",
                got="none",
                remedy='bind it (b.bind(model)), or push with verify="weights"',
            )
        rows = canary.prompts(vocabulary_size(self._model), max_tokens)

        view = snapshot.state if isinstance(snapshot, Collected) else None
        waiting = view.open if isinstance(view, ModeView) else ()
        calls = LayerCalls(one.layer.outer for one in waiting)

        def answers(model: nn.Module, copier: type[ModelCopier] = ModelCopier) -> Reference:
            scores = reference_logprobs(model, rows, copier, calls=calls if waiting else None, deadline=deadline)
            others = ((how, rounded_logprobs(model, rows, how, copier, deadline=deadline)) for how in roundings)
            rounded = tuple(Rounded(how, tuple(map(tuple, those))) for how, those in others if those is not None)
            return Reference(tuple(map(tuple, rows)), tuple(map(tuple, scores)), rounded)

        if mode == "base":
            return answers(self._model, WithoutLora), None
        if self._lora is not None:
            require_still_forward(self._model)
        base = answers(self._model, WithoutLora) if mode == "adapter" else None
        found = answers(self._model)
        if self._lora is not None and isinstance(view, ModeView):
            self._lora.settle(view, calls, deadline)
        return found, base

    def explain(self, error: UnexpectedTensor) -> UnexpectedTensor:
        """Return the error with what the bound model knows of tensors for which engines have no place."""
        if self._model is None:
            return error
        inner = inner_model(self._model)
        if self._lora is not None:
            error = explain_around(self._model, inner, error)
        return explain_unexpected(inner, error)

    def doubts(self, snapshot: Snapshot) -> tuple[str, ...]:
        """Say which computed tensors were not compared with their layers, and why. Called after `reference`."""
        view = cast("Collected", snapshot).state
        return self._lora.doubts(view) if self._lora is not None and isinstance(view, ModeView) else ()

    def unsent(self, snapshot: Snapshot) -> tuple[str, ...]:
        """List the names of the bound model's other tensors, beside a snapshot of a subset; none without a model.
        What lies beside a policy is no part of what engines serve."""
        known = self._known(snapshot)
        came = {name for info in snapshot.layout.tensors for name in (info.name, *info.aliases)}
        rest = () if known is None else [t.name for t in known.tensors if came.isdisjoint((t.name, *t.aliases))]
        return tuple(name for name in rest if known is not None and name not in known.beside)

    def _known(self, snapshot: Snapshot) -> CanonicalMap | None:
        state = snapshot.state if isinstance(snapshot, Collected) else None
        return state.known if isinstance(state, ModeView) else self._source.map

    def prove_independent(self, names: Sequence[str], snapshot: Snapshot, engines: str) -> None:
        """Show that the bound model's text logits do not depend on these tensors of a snapshot, for which `engines`
        have no place. Raises UnexpectedTensor for those on which they depend, or where nothing can be shown."""
        known = self._known(snapshot)
        if self._model is None or known is None:
            raise _has_no_place(names, engines, "no bound model, so that it cannot be shown", BIND_REMEDY)
        found = live_places(self._model, known, names)
        strange = [name for name in names if name not in found]
        if strange:
            raise _has_no_place(strange, engines, "names that the bound model does not have now", REBIND_REMEDY)
        try:
            dependent = find_dependent(self._model, found)
        except ConfigError as error:
            raise _has_no_place(names, engines, f"nothing could be shown: {error}", SAME_MODEL) from error
        if dependent:
            raise _has_no_place(dependent, engines, "logits that change with them", SAME_MODEL)

    def close(self) -> None:
        """Stop the copying threads and let go of the arenas. Idempotent."""
        for writer in self._snapshotters.values():
            writer.close()
        self._snapshotters.clear()


def _has_no_place(names: Sequence[str], engines: str, got: str, remedy: str) -> UnexpectedTensor:
    return UnexpectedTensor(
        "the engine has no place for these tensors",
        where=f"{some_names(names)} -> {engines}",
        expected="tensors that its own loader uses, or on which the bound model's text logits do not depend",
        got=got,
        remedy=remedy,
        names=tuple(names),
    )


def _require_unchanged(lora: LoraModel, snapshot: Collected, cause: BaseException | None = None) -> None:
    """Raise IntegrityError when another thread changed the LoRA layers since the tensors were collected."""
    if isinstance(snapshot.state, ModeView) and lora.changed_since(snapshot.state):
        raise changed_meanwhile() from cause
