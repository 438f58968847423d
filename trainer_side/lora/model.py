"""A bound model with LoRA inside: its state, which mode can carry it, and what each mode sends."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from bridge.errors import ConfigError, MissingTensor
from bridge.lora import AdapterSpec, LoraLimits
from trainer_side.lora import modes, state
from trainer_side.lora.capability import MODES, Feature, Finding, refusals, refuse
from trainer_side.lora.modes import Baked, Made
from trainer_side.lora.sent import Sent, items_of, plain_name, sent, shadowed
from trainer_side.lora.state import LoraState
from trainer_side.lora.survey import survey
from trainer_side.lora.tree import Item, Place, Tree, read_tree
from trainer_side.naming import CanonicalMap
from trainer_side.source import Computed

_KEPT = 8
"""Baked states that are kept: a trainer changes between few (enabled, disabled, another adapter)."""


@dataclass(frozen=True)
class Choice:
    """The mode of one push, why, and what its reader should know."""

    mode: str
    reason: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class View:
    """What one push sends.

    Attributes:
        known: how the live names make up the checkpoint; the same object as long as nothing about them changed. None
            of an adapter: its names are canonical.
        named: tensors that travel as they stand, by clean live name.
        computed: tensors that are computed while the snapshot is written; their stand-ins stay the same objects.
        adapter: of an adapter push.
        state: what the model was set to; compare with `LoraModel.state()` after the snapshot.
        notes: for the receipt.
    """

    known: CanonicalMap | None
    named: list[tuple[str, torch.Tensor]]
    computed: list[Computed]
    adapter: AdapterSpec | None
    state: LoraState
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Findings:
    """What a survey said about one state."""

    common: tuple[Finding, ...]
    merged: tuple[Finding, ...]
    notes: tuple[str, ...]

    def of(self, mode: str) -> list[Finding]:
        return [*self.common, *self.merged] if mode == "merged" else list(self.common)


@dataclass(frozen=True, eq=False)
class _Last:
    """The last view: when the next one is alike, nothing is resolved again."""

    mode: str
    partial: bool
    state: LoraState
    names: list[str]
    slots: list[tuple[dict[str, torch.Tensor | None], str]]
    baked: Baked
    direct: list[tuple[str, dict[str, torch.Tensor | None], str]]
    made: tuple[Made, ...]
    notes: tuple[str, ...] = field(default=())


class LoraModel:
    """Made once when a model is bound. Not thread safe; never writes to the model and runs none of its forwards.

    Raises ConfigError for a model that cannot be walked.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError("only a module can be bound", got=type(model).__name__, remedy="bind the trained model")
        self.model = model
        self._structure = 0
        self._tree = read_tree(model)
        self._findings: OrderedDict[Hashable, _Findings] = OrderedDict()
        self._baked: OrderedDict[Hashable, Baked] = OrderedDict()
        self._alike: dict[Hashable, Baked] = {}
        self._last: _Last | None = None

    @staticmethod
    def present(model: nn.Module) -> bool:
        """Whether a model has PEFT-style wrappers inside, or is a PEFT model. By structure, without importing peft."""
        tree = read_tree(model)
        return bool(tree.wrappers) or tree.peft_root

    def state(self) -> LoraState:
        """What the wrappers are set to now. Compare with `==`; a few microseconds per wrapper, one per module."""
        return LoraState(self._current().structure, tuple(map(state.read, self._tree.wrappers)))

    def choose(self, mode: str, limits: Sequence[LoraLimits | None]) -> Choice:
        """The mode of a push in the state that the model is in now.

        Args:
            mode: "auto", "merged", "base" or "adapter".
            limits: of each attached engine; None for one that was started without LoRA.

        Raises ConfigError ("full", or no mode at all), UnsupportedLora (what the mode cannot carry, by name, and the
        mode that can).
        """
        if mode == "full" or mode not in ("auto", *MODES):
            raise ConfigError(
                "not a mode for a model with LoRA",
                where="mode",
                expected='"auto", "merged", "base" or "adapter"',
                got=repr(mode),
                remedy="LoRA names are no checkpoint names, so the tensors as they stand are no model: use "
                '"merged" (effective weights), "base" (without the adapters) or "adapter" (the adapters alone)',
            )
        now = self.state()
        if mode == "auto":
            return self._automatic(now, limits)
        found = self._found_for(mode, now, limits)
        if refusals(found, mode):
            raise refuse(found, mode, lambda other: self._found_for(other, now, limits))
        return Choice(mode, f"{mode} was asked for", self._notes(mode, now))

    def view(self, mode: str, pairs: Sequence[tuple[str, torch.Tensor]], *, partial: bool = False) -> View:
        """What a push of these pairs sends in a mode that `choose` gave.

        The values given count wherever a name came; what the model shares under a second name and the iterable left
        out is the same tensor, and a persistent buffer that did not come is added, unless `partial`.

        Raises UnexpectedTensor (no name of the model), DuplicateTensor, MissingTensor (of the base or the acting
        adapters, unless `partial`), ShapeMismatch, UnsupportedLora, and where the tensors given cannot be copied what
        `trainer_side.tensors.plain` raises.
        """
        names = [name for name, _ in pairs]
        tensors = [tensor for _, tensor in pairs]
        now = self.state()
        last = self._last
        if last is not None and (last.mode, last.partial) == (mode, partial) and last.state == now:
            if last.names == names and last.baked.current():
                lives = [held.get(key) for held, key in last.slots]
                if all(map(operator.is_, lives, tensors)):
                    return self._again(last, now)
        return self._resolve(mode, now, names, tensors, partial)

    # ---- inside ----

    def _current(self) -> _Structure:
        if not self._tree.unchanged():
            self._tree = read_tree(self.model)
            self._structure += 1
            self._findings.clear()
            self._baked.clear()
            self._alike.clear()
            self._last = None
        return _Structure(self._structure)

    def _automatic(self, now: LoraState, limits: Sequence[LoraLimits | None]) -> Choice:
        found = {mode: self._found_for(mode, now, limits) for mode in ("adapter", "merged")}
        bad = refusals(found["adapter"], "adapter")
        if not bad:
            rank = self._bake("adapter", now).plan
            size = 0 if rank is None else rank.rank
            reason = f"adapter: every engine takes adapters, and the table carries all of this one (rank {size})"
            return Choice("adapter", reason, self._notes("adapter", now))
        against = f"{bad[0].where or 'the model'}: {bad[0].refuses('adapter')}"
        if refusals(found["merged"], "merged"):
            error = refuse(found["merged"], "merged", lambda other: self._found_for(other, now, limits))
            error.got = f"{error.got}; and in adapter mode {against}"
            error.args = (error._message(),)
            raise error
        return Choice("merged", f"merged: adapter mode cannot carry this ({against})", self._notes("merged", now))

    def _found_for(self, mode: str, now: LoraState, limits: Sequence[LoraLimits | None]) -> list[Finding]:
        found = self._survey(now).of(mode)
        if mode != "adapter":
            return found
        if refusals(found, mode):
            return found
        plan = self._bake("adapter", now).plan
        if plan is None:
            return found
        found += [Finding(Feature.NO_ROWS, path, (path,)) for path in plan.unfit]
        ranks = [limit.max_rank for limit in limits if limit is not None]
        if not limits or len(ranks) < len(limits):
            found.append(Finding(Feature.RANK, reason="started without LoRA" if limits else "no engine is attached"))
        elif plan.rank > min(ranks):
            found.append(Finding(Feature.RANK, reason=f"rank {plan.rank}, their maximum is {min(ranks)}"))
        return found

    def _survey(self, now: LoraState) -> _Findings:
        trained = tuple(t.requires_grad for p in self._tree.places if (t := p.tensor()) is not None)
        key = (now, trained)
        found = self._findings.get(key)
        if found is None:
            read = survey(self._tree)
            found = _Findings(read.findings, read.unreadable, read.notes)
            _keep(self._findings, key, found)
        return found

    def _notes(self, mode: str, now: LoraState) -> tuple[str, ...]:
        return self._survey(now).notes if mode != "adapter" else ()

    def _bake(self, mode: str, now: LoraState) -> Baked:
        """What the mode sends in this state; baked again when shapes or dtypes changed."""
        key: Hashable = (mode, now)
        found = self._baked.get(key)
        if found is not None and found.current():
            return found
        if mode == "base":
            found = self._same(("base", self._plain_shapes()), lambda: modes.bake_base(self._tree))
        elif mode == "merged":
            kind, found = modes.bake_merged(self._tree, survey(self._tree), self._alike.get)
            self._alike[kind] = found
        else:
            found = modes.bake_adapter(self._tree, survey(self._tree))
        _keep(self._baked, key, found)
        return found
