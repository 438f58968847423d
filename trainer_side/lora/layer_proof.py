"""Prove that what is computed for a layer (merged, dequantised) is what the layer itself computes.

A dequantiser that misreads its library's storage gives weights that read back perfectly and mean nothing. The layer's
own forward knows better: a shielded copy of it is called with rows of random signs, or with token ids, and must give
what the computed weight gives. A layer that only its model can call is compared on what it gets in the forward for the
canary.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bridge.errors import UnsupportedLora
from bridge.protocol.deadline import Deadline
from trainer_side.lora.layer_compare import LayerReading, compare_layer
from trainer_side.lora.layers.dequant import quant_state
from trainer_side.lora.layers.values import ActiveLora
from trainer_side.lora.modes import EffectiveTensor
from trainer_side.lora.state import LoraState
from trainer_side.names.tensor_checks import addresses_of
from trainer_side.shielded.layer_calls import LayerCall, LayerCalls

SHARE = 0.05
"""Of a snapshot's time, for comparing layers whose structure is proven."""
LEAST_S = 0.005
"""What may be spent in each push of `MANY` layers, however little the snapshot takes."""
MANY = 20
_WORDS = (str, int, float, bool, torch.dtype, torch.Size)


@dataclass(frozen=True, eq=False)
class OpenLayer:
    """A layer that could not be called alone in this push.

    Attributes:
        key: what it stands for: a structure, or itself where its weight was packed anew.
        storage: where its packed weight lies.
        reason: why it could not be called.
        sampled: it is compared although its structure is proven.
    """

    key: Hashable
    layer: LayerReading
    storage: Hashable
    reason: str
    sampled: bool = False

    @property
    def name(self) -> str:
        """Return its weight's name in the base model."""
        return self.layer.tensor.place.clean


class LayerProof:
    """Remembers which structures of layers were found right. One per bound model; used by one push at a time.

    A structure is everything of a layer but its values: classes, forwards that were put on it, quantisation state,
    storage, shape, adapters that act, their scaling and whether they are merged. A packed weight that lies elsewhere
    than it did, or whose attributes have changed, was packed anew: it is compared itself, whatever was pushed in
    between.
    """

    def __init__(self) -> None:
        self._missing: dict[Hashable, frozenset[int]] = {}
        """Structure -> parts of its weight (experts) that were not compared yet; none once it is proven."""
        self._reasons: dict[Hashable, str] = {}
        """Structure -> why its layers cannot be called alone."""
        self._storage: dict[str, Hashable] = {}
        """Packed weight, by its clean name -> where it lay when it, or its structure, was compared."""
        self._wrong: set[str] = set()
        """Weights, by their clean names, that were found to differ: compared in each push until they agree."""
        self._last: tuple[Sequence[EffectiveTensor], LoraState, Hashable] | None = None
        self._open: tuple[OpenLayer, ...] = ()
        """Layers of the last push."""
        self._turn = 0
        self._credit_s = 0.0
        """What may be spent on one more layer; below zero after one that took longer."""

    def note_snapshot(self, seconds: float) -> None:
        """Add what one snapshot's time allows for. Called after each."""
        many = self._last is not None and len(self._last[0]) >= MANY
        allowed = max(SHARE * seconds, LEAST_S if many else 0.0)
        self._credit_s = min(self._credit_s + allowed, allowed)

    def require(
        self, computed: Sequence[EffectiveTensor], began: LoraState, deadline: Deadline | None = None
    ) -> tuple[OpenLayer, ...]:
        """Compare one layer of each structure that is new, each packed one that was packed anew, and in turn one more
        where the time allows.

        Returns the layers that only the model can call: to be compared in `settle`. Raises UnsupportedLora, naming
        layer and quantiser, for a difference; DeadlineExceeded.
        """
        forwards = tuple(_called(m) for one in computed for m in (*(w.module for w in one.place.wrappers), one.module))
        alike = self._last is not None and self._last[0] is computed and self._last[1:] == (began, forwards)
        waiting = {layer.name for layer in self._open}
        due = self._credit_s > 0
        self._turn += 1 if due else 0
        found: list[OpenLayer | None] = []
        for k, one in enumerate(computed):
            sampled = (due and k == self._turn % len(computed)) or one.place.clean in self._wrong
            if one.bias or (alike and not sampled and one.place.clean not in waiting and self._lies_where_it_did(one)):
                continue
            found.append(self._look_at(LayerReading.of(one, began), deadline, sampled=sampled))
        self._last = (computed, began, forwards)
        self._open = tuple(layer for layer in found if layer is not None)
        return self._open

    def settle(self, layers: Sequence[OpenLayer], calls: LayerCalls, deadline: Deadline | None = None) -> None:
        """Compare layers on what they got in the canary's forward. Raises UnsupportedLora as `require`."""
        for one in layers:
            given = calls.of(one.layer.outer)
            if not given or not (one.sampled or self._missing[one.key]):
                continue
            found = self._compare(one.layer, given, deadline, self._missing[one.key])
            if isinstance(found, str):
                self._reasons[one.key] = found
            else:
                self._note(one.layer, one.key, one.storage, found)

    def doubts(self, layers: Sequence[OpenLayer]) -> tuple[str, ...]:
        """Say why layers could not be compared, once for each structure; nothing for those that were in the end."""
        found: dict[Hashable, str] = {}
        for one in layers:
            missing, reason = self._missing[one.key], self._reasons.get(one.key, one.reason)
            if missing and missing < one.layer.parts:
                reason = f"no token of the canary reached its parts {', '.join(map(str, sorted(missing)))}"
            if missing or one.name in self._wrong:
                found.setdefault(one.key, f"{one.name} and layers like it were not compared: {reason}")
        return tuple(found.values())

    def _look_at(self, layer: LayerReading, deadline: Deadline | None, *, sampled: bool) -> OpenLayer | None:
        """Compare a layer if it has to be, and if it can be called alone."""
        name, parameters = layer.tensor.place.clean, layer.parameters
        storage = _describe_storage(parameters.weight, parameters.quant_state) if layer.packed else None
        moved = layer.packed and self._storage.get(name, storage) != storage
        key: Hashable = (name, storage) if moved else _structure(layer)
        missing = self._missing.setdefault(key, layer.parts)
        if missing or sampled:
            found = self._reasons.get(key) or self._compare(layer, (), deadline, missing)
            if isinstance(found, str):
                self._reasons[key] = found
                return OpenLayer(key, layer, storage, found, sampled)
            self._note(layer, key, storage, found)
        elif layer.packed:
            self._storage[name] = storage
        return None

    def _compare(
        self, layer: LayerReading, calls: Sequence[LayerCall], deadline: Deadline | None, missing: frozenset[int]
    ) -> frozenset[int] | str:
        """Compare a layer; one of a proven structure at the expense of the credit, and with its own factors if it is
        packed: the size of drawn ones would take one more reading of its weight."""
        started, name = time.thread_time(), layer.tensor.place.clean
        try:
            found = compare_layer(layer, calls, deadline, draw=bool(missing) or not layer.packed)
        except UnsupportedLora:
            self._wrong.add(name)
            raise
        finally:
            if not missing:
                self._credit_s -= time.thread_time() - started
        if not isinstance(found, str):
            self._wrong.discard(name)
        return found

    def _lies_where_it_did(self, one: EffectiveTensor) -> bool:
        """Tell whether a weight is stored as its values, or packed where it was when it was compared."""
        known, weight = self._storage.get(one.place.clean), one.place.tensor()
        return known is None or (
            weight is not None and known == _describe_storage(weight, quant_state(one.place.owner, weight))
        )

    def _note(self, layer: LayerReading, key: Hashable, storage: Hashable, parts: frozenset[int]) -> None:
        self._missing[key] -= parts
        if layer.packed and not self._missing[key]:
            self._storage[layer.tensor.place.clean] = storage


def _structure(layer: LayerReading) -> Hashable:
    levels = tuple(
        (*_called(lv.wrapper), lv.state, lv.names, lv.owned, lv.setting, lv.tokens, tuple(map(_form, lv.loras)))
        for lv in layer.chain.levels
    )
    parameters, weight = layer.parameters, layer.parameters.weight
    held = (_words(weight), weight.dtype, weight.shape, weight.stride(), weight.device, tuple(sorted(vars(weight))))
    kind = (parameters.kind, parameters.transposed, parameters.bias is not None, layer.tensor.place.attribute)
    return _called(layer.chain.base), levels, held, kind, _words(parameters.quant_state), layer.tensor.copies


def _called(module: nn.Module) -> tuple[type, object]:
    """Find what computes when a module is called: its class, and the code of a forward that was put on it alone."""
    forward = vars(module).get("forward")
    function = getattr(forward, "__func__", forward)
    return type(module), getattr(function, "__code__", type(function))


def _form(lora: ActiveLora) -> Hashable:
    """Everything of an adapter but its values: shapes, variant, how its factors are to be read."""
    held = tuple((t.shape, t.dtype) for t in lora.tensors)
    read = tuple((k, str(v)) for k, v in sorted(lora.extra.items()) if not isinstance(v, torch.Tensor))
    return lora.variant, held, read, lora.bias is not None, lora.magnitude is not None


def _describe_storage(weight: torch.Tensor, state: Any) -> Hashable:
    """Describe where a packed weight lies and what its library has noted on it."""
    return tuple(addresses_of([weight]) or ()), weight.shape, weight.dtype, _words(weight), _words(state)


def _words(state: Any) -> Hashable:
    """The class of a quantisation state or weight and the settings on it, without its tensors."""
    found = vars(state).items() if hasattr(state, "__dict__") and not isinstance(state, nn.Module) else ()
    return type(state), tuple(sorted((k, str(v)) for k, v in found if isinstance(v, _WORDS)))
