"""A bound model with LoRA inside: its state, which mode can carry it, and what each mode sends."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from bridge.errors import ConfigError
from bridge.model.lora_format import LoraLimits, LoraSpec
from bridge.ports import Choice
from trainer_side.lora import modes, state
from trainer_side.lora.base_fingerprint import base_mark
from trainer_side.lora.capability import MODES, Feature, Finding, refusals, refuse
from trainer_side.lora.layers.findings import survey
from trainer_side.lora.layers.module_tree import BaseTensor, TreeTensor, read_tree
from trainer_side.lora.modes import BakedMode, EffectiveTensor
from trainer_side.lora.select import TensorSlot, assemble, items_of, refuse_plain_names, sent, slot_of
from trainer_side.lora.state import LoraState, Watch
from trainer_side.names.naming import CanonicalMap
from trainer_side.names.tensor_checks import nothing_sent
from trainer_side.names.tensor_layout import Computed

_T = TypeVar("_T")
EngineLimits = Sequence[LoraLimits | None] | None
_KEPT = 8
"""States that are remembered: a trainer goes back and forth between few (enabled, disabled, another adapter)."""


@dataclass(frozen=True, eq=False)
class ModeView:
    """What one push sends.

    Attributes:
        known: how the live names make up the checkpoint; the same object as long as nothing about them changed. None
            of an adapter: its names are canonical.
        named: tensors that travel as they stand, by clean live name.
        computed: tensors that are computed while the snapshot is written; their stand-ins stay the same objects.
        adapter: of an adapter push.
        state: what the model was set to.
        mark: of the stored tensors that a merge would move; see `LoraModel.changed_since`.
        notes: for the receipt.
    """

    known: CanonicalMap | None
    named: list[tuple[str, torch.Tensor]]
    computed: list[Computed]
    adapter: LoraSpec | None
    state: LoraState
    notes: tuple[str, ...] = ()
    mark: Hashable = None
    watched: tuple[tuple[str, TensorSlot], ...] = field(default=(), repr=False)


@dataclass(frozen=True, eq=False)
class _Findings:
    """What a survey said about one state."""

    common: tuple[Finding, ...]
    merged: tuple[Finding, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Last:
    """The last view; while the next ones are alike, nothing is resolved again. Holds no tensor."""

    mode: str
    partial: bool
    state: Hashable
    names: list[str]
    slots: list[TensorSlot]
    baked: BakedMode
    cleans: list[str]
    direct: list[TensorSlot]
    made: tuple[EffectiveTensor, ...]
    watched: tuple[tuple[str, TensorSlot], ...]
    notes: tuple[str, ...]


class LoraModel:
    """Made once when a model is bound. Not thread safe; never writes to the model and runs none of its forwards.

    Raises ConfigError for what is no module.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError("only a module can be bound", got=type(model).__name__, remedy="bind the trained model")
        self.model = model
        self._structure = 0
        self._forget()

    @staticmethod
    def present(model: nn.Module) -> bool:
        """Whether a model has PEFT-style wrappers inside, or is a PEFT model. By structure, without importing peft."""
        tree = read_tree(model)
        return bool(tree.wrappers) or tree.peft_root

    def state(self) -> LoraState:
        """What the wrappers are set to now. Compare with `==`; microseconds per wrapper, about one per module."""
        if not self._tree.unchanged():
            self._structure += 1
            self._forget()
        wrappers = self._tree.wrappers
        return LoraState(self._structure, tuple(map(state.read, wrappers)), tuple(map(state.scaling_of, wrappers)))

    def choose(self, mode: str, limits: EngineLimits) -> Choice:
        """The mode of a push in the state that the model is in now.

        Args:
            mode: "auto", "merged", "base" or "adapter".
            limits: of each attached engine, None for one that was started without LoRA; None for all: do not ask.

        Raises ConfigError ("full", or no mode at all), UnsupportedLora (what the mode cannot carry, by name, and the
        mode that can).
        """
        if mode not in ("auto", *MODES):
            raise ConfigError(
                "not a mode for a model with LoRA",
                where="mode",
                expected='"auto", "merged", "base" or "adapter"',
                got=repr(mode),
                remedy="the tensors of a model with LoRA are no checkpoint as they stand: push effective weights "
                '("merged"), the model without its adapters ("base"), or the adapters alone ("adapter")',
            )
        now = self.state()
        if mode == "auto":
            return self._automatic(now, limits)
        found = self._found(mode, now, limits)
        if refusals(found, mode):
            raise refuse(found, mode, lambda other: self._found(other, now, limits))
        return Choice(mode, f"{mode} was asked for", self._notes(mode, now))

    def view(self, mode: str, pairs: Sequence[tuple[str, torch.Tensor]], *, partial: bool = False) -> ModeView:
        """What a push of these pairs sends in a mode that `choose` gave.

        The values given count wherever a name came. What the model shares under a second name and the iterable left
        out is the same tensor; a persistent buffer that did not come is added, unless `partial`; an adapter always
        travels whole.

        Raises UnexpectedTensor (no name of the model), DuplicateTensor, MissingTensor (nothing at all, nothing that
        this mode sends, or not all of it unless `partial`), ShapeMismatch, ConfigError (a name that is no text), what
        `trainer_side.names.tensor_checks.plain` raises where a tensor has no values to copy, and IntegrityError when
        another thread switches the layers meanwhile; so may the view's `compute`s.
        """
        names = [name for name, _ in pairs]
        tensors = [tensor for _, tensor in pairs]
        if not names:
            raise nothing_sent()
        now = self.state()
        last = self._last
        if last is not None and last.mode == mode and last.partial == partial and last.state == now.unscaled:
            lives = (held.get(key) for held, key in last.slots)
            if last.names == names and all(map(operator.is_, lives, tensors)) and last.baked.current():
                return self._repeat(last, now)
        return self._resolve(mode, now, names, tensors, partial)

    def changed_since(self, view: ModeView) -> bool:
        """Whether the model is set to something else than when this view was made, or stored tensors under its adapters
        are not what they were. To be asked after the snapshot.

        What was computed for the view has been compared one by one (`Watch`). What travels as it stands (the base in
        base mode, a layer that is merged) is covered by this alone: a merge or unmerge that was taken back in between
        is seen by the rounding errors it left in some elements of every weight, so a small one in a small model may go
        unseen.
        """
        return self.state() != view.state or _mark(view.watched) != view.mark

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Every tensor that the model holds, named as `named_parameters` names it, shared ones under each name."""
        self.state()
        items: list[TreeTensor] = [*self._tree.places, *self._tree.extras]
        return [(item.raw, tensor) for item in items if (tensor := item.tensor()) is not None]

    # ---- inside ----

    def _forget(self) -> None:
        self._tree = read_tree(self.model)
        self._findings: OrderedDict[Hashable, _Findings] = OrderedDict()
        self._baked: OrderedDict[Hashable, BakedMode] = OrderedDict()
        self._ends: CanonicalMap | None = None
        self._items: tuple[list[str], list[TreeTensor]] = ([], [])
        self._last: _Last | None = None

    def _automatic(self, now: LoraState, limits: EngineLimits) -> Choice:
        adapter = self._found("adapter", now, limits)
        bad = refusals(adapter, "adapter")
        if not bad:
            rank = _rank(self._bake("adapter", now))
            reason = f"adapter: every engine can hold it (rank {rank}) and the capability table carries all of it"
            return Choice("adapter", reason, self._notes("adapter", now))
        against = f"adapter mode cannot carry {bad[0].where or 'the model'}: {bad[0].refuses('adapter')}"
        merged = self._found("merged", now, limits)
        if refusals(merged, "merged"):
            raise refuse(merged, "merged", lambda other: self._found(other, now, limits), also=against)
        return Choice("merged", f"merged: {against}", self._notes("merged", now))

    def _found(self, mode: str, now: LoraState, limits: EngineLimits) -> list[Finding]:
        """Everything that the capability table has to say about a mode."""
        survey = self._findings_of(now)
        found = [*survey.common, *survey.merged] if mode == "merged" else list(survey.common)
        if mode != "adapter" or refusals(found, mode):
            return found
        plan = self._bake("adapter", now).plan
        found += [Finding(Feature.NO_ROWS, path, (path,)) for path in (plan.unfit if plan else ())]
        if limits is None:
            return found
        ranks = [limit.max_rank for limit in limits if limit is not None]
        if not limits or len(ranks) < len(limits):
            found.append(Finding(Feature.RANK, reason="started without LoRA" if limits else "no engine is attached"))
        elif plan and plan.rank > min(ranks):
            found.append(Finding(Feature.RANK, reason=f"rank {plan.rank} where {min(ranks)} is the most"))
        return found

    def _findings_of(self, now: LoraState) -> _Findings:
        trained = tuple([tensor.requires_grad for p in self._tree.places if (tensor := p.tensor()) is not None])
        # factors that somebody resized in place may no longer fit
        shapes = tuple([tensor.shape for e in self._tree.extras if (tensor := e.tensor()) is not None])
        key = now.unscaled, trained, shapes
        found = self._findings.get(key)
        if found is None:
            read = survey(self._tree, self._watch(now))
            found = _Findings(read.findings, read.merged, read.notes)
        _keep(self._findings, key, found)
        return found

    def _notes(self, mode: str, now: LoraState) -> tuple[str, ...]:
        return self._findings_of(now).notes if mode == "merged" else ()

    def _bake(self, mode: str, now: LoraState) -> BakedMode:
        """What the mode sends in this state; baked again when shapes or dtypes changed."""
        key: Hashable = mode if mode == "base" else (mode, now.unscaled)
        found = self._baked.get(key)
        if found is None or not found.current():
            if mode == "base":
                found = modes.bake_base(self._tree)
            elif mode == "merged":
                found = modes.bake_merged(self._tree, survey(self._tree, self._watch(now)))
            else:
                self._ends = self._ends or modes.bake_ends(self._tree)
                found = modes.bake_lora(self._tree, survey(self._tree, self._watch(now)), self._ends)
        _keep(self._baked, key, found)
        return found

    def _resolve(
        self, mode: str, now: LoraState, names: list[str], tensors: list[torch.Tensor], partial: bool
    ) -> ModeView:
        watch = self._watch(now)
        if self._items[0] != names:
            self._items = names, items_of(self._tree, names)
        items = self._items[1]
        came = sent(items, names, tensors)
        baked = self._bake(mode, now)
        refuse_plain_names(self._tree, baked, items, names)
        chosen = assemble(mode, baked, came, partial=partial)
        as_it_lives = all(item.tensor() is tensor for item, tensor in zip(items, tensors, strict=True))
        self._last = None
        watched = _watched(mode, chosen.places, chosen.made)
        if as_it_lives:
            slots, direct = list(map(slot_of, items)), list(map(slot_of, chosen.places))
            cleans = [place.clean for place in chosen.places]
            made, notes = chosen.made, self._notes(mode, now)
            self._last = _Last(mode, partial, now.unscaled, names, slots, baked, cleans, direct, made, watched, notes)
        given = came if came.changed else None
        computed = modes.computed(baked, given, watch, chosen.made)
        if self.state() != now:  # ties and copies were resolved in between
            self._forget()
            raise state.changed_meanwhile()
        notes = self._notes(mode, now)
        return ModeView(baked.known, chosen.named, computed, _spec(baked), now, notes, _mark(watched), watched)

    def _repeat(self, last: _Last, now: LoraState) -> ModeView:
        tensors = [held[key] for held, key in last.direct]
        named = [(name, tensor) for name, tensor in zip(last.cleans, tensors, strict=True) if tensor is not None]
        computed = modes.computed(last.baked, None, self._watch(now), last.made)
        mark = _mark(last.watched)
        return ModeView(last.baked.known, named, computed, _spec(last.baked), now, last.notes, mark, last.watched)

    def _watch(self, now: LoraState) -> Watch:
        return Watch(self._tree.wrappers, now)


def _watched(
    mode: str, places: Sequence[BaseTensor], made: Sequence[EffectiveTensor]
) -> tuple[tuple[str, TensorSlot], ...]:
    """The tensors of the base that a merge writes to, among those that are read for a push."""
    read = [*places, *(one.place for one in made)] if mode != "adapter" else []
    return tuple((place.clean, slot_of(place)) for place in read if place.wrappers)


def _mark(watched: Sequence[tuple[str, TensorSlot]]) -> Hashable:
    live = [(name, held.get(key)) for name, (held, key) in watched]
    return base_mark((name, tensor) for name, tensor in live if tensor is not None)


def _rank(baked: BakedMode) -> int:
    return 0 if baked.plan is None else baked.plan.rank


def _spec(baked: BakedMode) -> LoraSpec | None:
    return None if baked.plan is None else LoraSpec(baked.plan.rank)


def _keep(kept: OrderedDict[Hashable, _T], key: Hashable, value: _T) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > _KEPT:
        kept.popitem(last=False)
