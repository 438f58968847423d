"""A bound model with LoRA inside: its state, the mode that can carry it, and the tensors of each mode."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from bridge.errors import ConfigError
from bridge.model.lora_format import LoraLimits, LoraSpec
from bridge.ports import ModeChoice
from bridge.protocol.deadline import Deadline
from trainer_side.lora import modes
from trainer_side.lora.base_fingerprint import base_fingerprint
from trainer_side.lora.capability import refusal_error, refused_by
from trainer_side.lora.findings import survey
from trainer_side.lora.layer_proof import LayerProof, OpenLayer
from trainer_side.lora.layers.features import MODES, Feature, Finding
from trainer_side.lora.layers.module_tree import BaseTensor, LoraTree, TreeTensor
from trainer_side.lora.layers.values import SentValues, as_stored
from trainer_side.lora.modes import BakedMode
from trainer_side.lora.select import SelectedTensors, match_sent, refuse_base_names, resolve_names, select_tensors
from trainer_side.lora.state import LoraState, changed_meanwhile
from trainer_side.names.naming import CanonicalMap
from trainer_side.names.tensor_checks import nothing_sent, require_module
from trainer_side.names.tensor_layout import Computed
from trainer_side.shielded.layer_calls import LayerCalls

_T = TypeVar("_T")
LoraLimitsPerEngine = Sequence[LoraLimits | None] | None
_KEPT = 8
"""States that are remembered: a trainer goes back and forth between few (enabled, disabled, another adapter)."""


@dataclass(frozen=True, eq=False)
class ModeView:
    """The tensors of one push, by the model's own names.

    Attributes:
        known: how the live names make up the checkpoint; the same object as long as nothing about them changed. None
            for a LoRA alone: its names are canonical.
        named: tensors that travel as they stand, by clean live name.
        computed: tensors that are computed while the snapshot is written; their stand-ins stay the same objects.
        adapter: rank of a LoRA that travels alone.
        merged: adapters act in some of the computed tensors.
        state: of the LoRA layers when the push began.
        notes: for the receipt.
        open: layers that are still to be compared with what is computed for them; see `LoraModel.settle`.
        fingerprint: of the stored tensors that a merge would move; see `LoraModel.changed_since`.
    """

    known: CanonicalMap | None
    named: list[tuple[str, torch.Tensor]]
    computed: list[Computed]
    adapter: LoraSpec | None
    state: LoraState
    notes: tuple[str, ...] = ()
    open: tuple[OpenLayer, ...] = ()
    merged: bool = False
    fingerprint: Hashable = None
    watched: tuple[BaseTensor, ...] = field(default=(), repr=False)


@dataclass(frozen=True, eq=False)
class _LastView:
    """The resolution of the last push, for the next ones that are alike. Holds no live tensor."""

    key: Hashable
    names: list[str]
    items: list[TreeTensor]
    baked: BakedMode
    selected: SelectedTensors
    notes: tuple[str, ...]


class LoraModel:
    """Made once when a model is bound. Not thread safe; never writes to the model, and calls copies of its layers only.

    Raises ConfigError for an object that is no module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = require_module(model)
        self._structure = 0
        self._last: _LastView | None = None
        self._proof = LayerProof()
        self._forget()

    @staticmethod
    def present(model: nn.Module) -> bool:
        """Tell by structure, without importing peft, whether a model has PEFT-style wrappers or is a PEFT model."""
        tree = LoraTree(model)
        return bool(tree.wrappers) or tree.peft_root

    def state(self) -> LoraState:
        """Read the wrappers' switches. Compare with `==`; microseconds per wrapper, about one per module."""
        if not self._tree.unchanged():
            self._structure += 1
            self._forget()
        return LoraState.read(self._structure, self._tree.wrappers)

    def choose(self, mode: str, limits: LoraLimitsPerEngine) -> ModeChoice:
        """Choose the mode of a push in the state that the model is in now.

        Args:
            mode: "auto", "merged", "base" or "adapter".
            limits: of each attached engine, None for one that was started without LoRA; None for all skips the check.

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
        against = ""
        if mode == "auto":
            bad = refused_by("adapter", self._find("adapter", now, limits))
            portable = None if bad else self._bake("adapter", now).portable
            if portable is not None:
                carried = f"(rank {portable.rank}) and the capability table carries all of it"
                return ModeChoice("adapter", f"adapter: every engine can hold it {carried}")
            against = f"adapter mode cannot carry {bad[0].where or 'the model'}: {bad[0].reason_against('adapter')}"
            mode = "merged"
        found = self._find(mode, now, limits)
        if refused_by(mode, found):
            raise refusal_error(found, mode, lambda other: self._find(other, now, limits), also=against)
        return ModeChoice(mode, f"{mode}: {against}" if against else f"{mode} was asked for", self._notes(mode, now))

    def view(
        self,
        mode: str,
        pairs: Sequence[tuple[str, torch.Tensor]],
        *,
        partial: bool = False,
        deadline: Deadline | None = None,
    ) -> ModeView:
        """Resolve the pairs of a push into the tensors that travel in a mode that `choose` gave.

        The values given count wherever a name came. A second name of a tensor that the iterable left out is the same
        tensor; a persistent buffer that did not come is added, unless `partial`; a LoRA always travels whole. What
        is computed for layers that can be called alone is compared with them, until the deadline.

        Raises:
            UnexpectedTensor: no name of the model.
            DuplicateTensor, ShapeMismatch: as `resolve_names` and `match_sent`.
            MissingTensor: nothing at all, nothing that this mode sends, or not all of it unless `partial`.
            ConfigError: a name that is no str; also what `require_plain` raises for a tensor without values.
            IntegrityError: another thread switches the layers meanwhile; the view's `compute`s raise it too.
            UnsupportedLora: what is computed for a layer is not what the layer computes.
            DeadlineExceeded: comparing outlasted the deadline.
        """
        names = [name for name, _ in pairs]
        tensors = [tensor for _, tensor in pairs]
        if not names:
            raise nothing_sent()
        now = self.state()
        key, last = (mode, partial, now.unscaled), self._last
        alike = last is not None and last.key == key and last.names == names and last.baked.current()
        if last is not None and alike and all(map(operator.is_, (item.tensor() for item in last.items), tensors)):
            return self._view(last, as_stored, now, deadline)
        items = last.items if last is not None and last.names == names else resolve_names(self._tree, names)
        sent = match_sent(items, names, tensors)
        baked = self._bake(mode, now)
        refuse_base_names(self._tree, baked, items, names)
        selected = select_tensors(mode, baked, sent, partial=partial)
        self._last = _LastView(key, names, items, baked, selected, self._notes(mode, now))
        view = self._view(self._last, sent, now, deadline)
        if self.state() != now:  # ties and copies were resolved in between
            self._forget()
            raise changed_meanwhile()
        return view

    def changed_since(self, view: ModeView) -> bool:
        """Compare the LoRA layers, and the stored tensors under them, with what they were when this view was made.

        Called after the snapshot. Tensors that were computed for the view were read by `LoraState.read_chain`, which
        compares. Those that travel as they stand (the base in base mode, a layer that is merged) are covered by this
        alone: a merge or unmerge that was taken back in between is seen by the rounding errors it left in some elements
        of every weight, so a small one in a small model may go unseen.
        """
        return self.state() != view.state or _fingerprint(view.watched) != view.fingerprint

    def settle(self, view: ModeView, calls: LayerCalls, deadline: Deadline | None = None) -> None:
        """Compare the layers that only the model can call, on what they got in the canary's forward.

        Raises UnsupportedLora for a difference, DeadlineExceeded.
        """
        self._proof.settle(view.open, calls, deadline)

    def note_snapshot(self, seconds: float) -> None:
        """Note how long a snapshot took: a share of it may be spent on comparing."""
        self._proof.note_snapshot(seconds)

    def doubts(self, view: ModeView) -> tuple[str, ...]:
        """Say which layers were not compared with what was computed for them, and why; after `settle`."""
        return self._proof.doubts(view.open)

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """List every tensor that the model holds, named as `named_parameters` names it, shared ones under each name."""
        self.state()
        items: list[TreeTensor] = [*self._tree.places, *self._tree.extras]
        return [(item.raw, tensor) for item in items if (tensor := item.tensor()) is not None]

    # ---- inside ----

    def _forget(self) -> None:
        self._tree = LoraTree(self.model)
        self._findings: OrderedDict[Hashable, tuple[tuple[Finding, ...], tuple[str, ...]]] = OrderedDict()
        self._baked: OrderedDict[Hashable, BakedMode] = OrderedDict()
        self._ends: tuple[Mapping[BaseTensor, torch.Tensor], CanonicalMap] | None = None
        """Stand-ins for packed weights, and the names that were baked with them."""
        self._last = None

    def _find(self, mode: str, now: LoraState, limits: LoraLimitsPerEngine) -> list[Finding]:
        """List every feature that matters to a mode."""
        found = list(self._survey(now)[0])
        if mode != "adapter" or refused_by(mode, found):
            return found
        portable = self._bake("adapter", now).portable
        subject = "an adapter of this weight"
        found += [
            Finding(Feature.NO_ROWS, path, (path,), subject=subject) for path in (portable.unfit if portable else ())
        ]
        if limits is None:
            return found
        ranks = [limit.max_rank for limit in limits if limit is not None]
        reason = ""
        if len(ranks) < len(limits) or not limits:
            reason = "started without LoRA" if limits else "no engine is attached"
        elif portable and portable.rank > min(ranks):
            reason = f"rank {portable.rank} where {min(ranks)} is the most"
        return [*found, Finding(Feature.RANK, reason=reason, subject="this adapter")] if reason else found

    def _survey(self, now: LoraState) -> tuple[tuple[Finding, ...], tuple[str, ...]]:
        """Find the features of the model in this state, and the notes for a push in merged mode; holds no tensor."""
        trained = tuple([tensor.requires_grad for p in self._tree.places if (tensor := p.tensor()) is not None])
        # factors that somebody resized in place may no longer fit
        shapes = tuple([tensor.shape for e in self._tree.extras if (tensor := e.tensor()) is not None])
        key = now.unscaled, trained, shapes
        found = self._findings.get(key)
        if found is None:
            read = survey(self._tree, now)
            found = read.findings, read.notes
        _remember(self._findings, key, found)
        return found

    def _notes(self, mode: str, now: LoraState) -> tuple[str, ...]:
        return self._survey(now)[1] if mode == "merged" else ()

    def _bake(self, mode: str, now: LoraState) -> BakedMode:
        """Bake what the mode sends in this state; again when shapes or dtypes changed."""
        key: Hashable = mode if mode == "base" else (mode, now.unscaled)
        found = self._baked.get(key)
        if found is None or not found.current():
            if mode == "base":
                found = modes.bake_base(self._tree)
            elif mode == "merged":
                found = modes.bake_merged(self._tree, survey(self._tree, now), now)
            else:
                read = survey(self._tree, now)
                unpacked = modes.unpacked_shapes(self._tree, read)
                if self._ends is None or self._ends[0].keys() != unpacked.keys():
                    self._ends = unpacked, modes.bake_ends(self._tree, unpacked)
                found = modes.bake_lora(self._tree, read, self._ends[1])
        _remember(self._baked, key, found)
        return found

    def _view(self, last: _LastView, given: SentValues, now: LoraState, deadline: Deadline | None) -> ModeView:
        baked, selected, watched = last.baked, last.selected, last.selected.under_wrappers
        waiting = self._proof.require(selected.computed, now, deadline)
        named = [(p.clean, given(tensor)) for p in selected.places if (tensor := p.tensor()) is not None]
        computed = baked.list_computed(given, now, selected.computed)
        adapter = None if baked.portable is None else LoraSpec(baked.portable.rank)
        marks = _fingerprint(watched)
        merged = any(one.needs for one in selected.computed)
        return ModeView(baked.known, named, computed, adapter, now, last.notes, waiting, merged, marks, watched)


def _fingerprint(watched: Sequence[BaseTensor]) -> Hashable:
    return base_fingerprint((place.clean, tensor) for place in watched if (tensor := place.tensor()) is not None)


def _remember(kept: OrderedDict[Hashable, _T], key: Hashable, value: _T) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > _KEPT:
        kept.popitem(last=False)
