"""Layers with LoRA adapters: wrappers that add B A x for each token's adapter to what the layer itself computes.

    out = W x + b + B_s (A_s x)        s: the slot that the LoraContext selects for the token

One class per kind of layer, found by `wrapper_of`. The layer's own `forward` is what runs: a subclass that brings its
own keeps it. Over several ranks a column-parallel layer has B cut like W, a row-parallel one A, an embedding A along
the vocabulary, a head B; what a layer sums or gathers over ranks includes the adapters' part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import nn

from bridge.errors import ConfigError
from engine_side.embedded.layers import (
    Adapter,
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from engine_side.embedded.lora.context import Group, LoraContext
from engine_side.embedded.lora.slots import ONLY, Part, PartKey, slot_dtype
from engine_side.embedded.moe import FusedMoE
from engine_side.embedded.weights import Cut
from engine_side.embedded.wrappers import WrappedLayer, unwrap


class BaseLayerWithLoRA(WrappedLayer):
    """What all of them share: the slots of each part, and which adapter lies in which slot.

    Attributes:
        parts: part of the layer -> its slots on this rank.
        reached: whether a forward has ever asked this layer for an adapter's part. An engine that uses a layer's weight
            without calling the layer would leave its adapters without effect.
    """

    kind: ClassVar[type[nn.Module]] = LinearBase
    """The class whose `forward` is `finish(local(x))`."""
    embedding: ClassVar[bool] = False
    """Adapters come as `lora_embedding_A` and `_B`."""

    def __init__(self, base_layer: nn.Module, context: LoraContext, slots: int, max_rank: int) -> None:
        super().__init__(base_layer)
        self.context = context
        self.reached = False
        self._loaded: dict[int, dict[PartKey, int]] = {}
        self._max_rank = max_rank
        self.parts: Mapping[PartKey, Part] = self._make_parts(slots)

    # ---- slots ----

    def _make_parts(self, slots: int) -> dict[PartKey, Part]:
        raise NotImplementedError

    def _part(self, slots: int, inputs: Cut, outputs: Cut, **more: Any) -> Part:
        core = cast(Any, self.core)
        like = next(p for p in self.core._parameters.values() if p is not None)
        return Part.allocate(slots, self._max_rank, inputs, outputs, like, slot_dtype(core.params_dtype), **more)

    def write(self, slot: int, key: PartKey, a: torch.Tensor, b: torch.Tensor) -> None:
        """Put whole A [rank, inputs] and B [outputs, rank] of one part into a slot and let tokens of it use them."""
        self.parts[key].write(slot, a, b)
        self._loaded.setdefault(slot, {})[key] = a.shape[0]

    def clear(self, slot: int) -> None:
        """Zero a slot, in all parts."""
        self._loaded.pop(slot, None)
        for part in self.parts.values():
            part.clear(slot)

    # ---- forward ----

    def active(self, n: int) -> tuple[Group, ...]:
        """What to add to a call with n rows."""
        groups = self.context.groups(n)
        if groups and not self.reached:
            self.reached = True
        return groups

    def adapters(self, n: int) -> Iterator[Adapter]:
        """See `LinearBase.adapters`."""
        for group in self.active(n):
            for key, rank in self._loaded.get(group.slot, {}).items():
                part = self.parts[key]
                a = part.a[group.slot, :rank, : part.inputs.size]
                yield group.rows, a, part.b[group.slot, : part.outputs.size, :rank]

    def _shrink(self, part: Part, slot: int, rank: int, x: torch.Tensor) -> torch.Tensor:
        return part.shrink(slot, rank, x)

    def _add(self, out: torch.Tensor, x: torch.Tensor, groups: tuple[Group, ...]) -> torch.Tensor:
        """Add the adapters' part to this rank's outputs, in place."""
        for group in groups:
            rows = group.take(x)
            for key, rank in self._loaded.get(group.slot, {}).items():
                part = self.parts[key]
                part.add(out, group.rows, part.expand(group.slot, self._shrink(part, group.slot, rank, rows)))
        return out

    def local(self, x: torch.Tensor) -> torch.Tensor:
        """What this rank alone contributes, adapters included."""
        core = cast(Any, self.core)
        return self._add(core.local(x), x, self.active(x.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = self.active(x.shape[0])
        if not groups:
            return super().forward(x)
        core = cast(Any, self.core)
        if core.tp.size == 1 or type(core).finish is LinearBase.finish:
            return self._add(super().forward(x), x, groups)
        if type(core).forward is self.kind.forward:
            return cast(torch.Tensor, core.finish(self._add(core.local(x), x, groups)))
        return self._beside(core, x, groups)

    def _beside(self, core: Any, x: torch.Tensor, groups: tuple[Group, ...]) -> torch.Tensor:
        """A sharded layer with a forward of its own: nothing can be put in front of its collective, so the adapters'
        part goes through one of its own."""
        out = super().forward(x)
        width = max(part.outputs.offset + part.b.shape[1] for part in self.parts.values())
        wide = torch.promote_types(out.dtype, torch.float32)
        effect = core.finish(self._add(torch.zeros(len(x), width, dtype=wide, device=out.device), x, groups))
        for group in groups:
            rows = slice(None) if group.rows is None else group.rows
            out[rows] = (out[rows].to(wide) + effect[rows]).to(out.dtype)
        return out


class LinearLayerWithLoRA(BaseLayerWithLoRA):
    """Any linear layer: a part for each of those that checkpoints hold one by one, cut as the layer cuts its weight."""

    def _make_parts(self, slots: int) -> dict[PartKey, Part]:
        core = cast(LinearBase, self.core)
        inputs = core.input_cut()
        return {(part, None): self._part(slots, inputs, core.output_cut(part)) for part in core.shard_ids}


class ColumnParallelLinearWithLoRA(LinearLayerWithLoRA):
    """B is cut like W; A is whole on every rank."""


class MergedColumnParallelLinearWithLoRA(ColumnParallelLinearWithLoRA):
    """One part for each of the stacked weights. Subclasses of the layer, such as a fused latent projection that every
    rank holds whole, keep their own forward."""


class QKVParallelLinearWithLoRA(ColumnParallelLinearWithLoRA):
    """Parts "q", "k" and "v", heads replicated as the layer replicates them."""


class RowParallelLinearWithLoRA(LinearLayerWithLoRA):
    """A sees this rank's inputs only; what it lacks comes with the layer's own sum over ranks."""


class VocabParallelEmbeddingWithLoRA(BaseLayerWithLoRA):
    """Called with ids [n]; A holds a column per token of this rank's part of the vocabulary."""

    kind = VocabParallelEmbedding
    embedding = True

    def _make_parts(self, slots: int) -> dict[PartKey, Part]:
        core = cast(VocabParallelEmbedding, self.core)
        here = (core.num_embeddings_per_partition, core.embedding_dim)
        return {ONLY: self._part(slots, _vocabulary(core), Cut.all_of(core.embedding_dim), here=here)}

    def _shrink(self, part: Part, slot: int, rank: int, x: torch.Tensor) -> torch.Tensor:
        return part.pick(slot, rank, x)


class ParallelLMHeadWithLoRA(BaseLayerWithLoRA):
    """Tied or not: its adapters are its own, the embedding's are the embedding's."""

    kind = VocabParallelEmbedding

    def _make_parts(self, slots: int) -> dict[PartKey, Part]:
        core = cast(ParallelLMHead, self.core)
        here = (core.embedding_dim, core.num_embeddings_per_partition)
        return {ONLY: self._part(slots, Cut.all_of(core.embedding_dim), _vocabulary(core), here=here)}


def _vocabulary(core: VocabParallelEmbedding) -> Cut:
    """Without the padding, of which a rank may have nothing else."""
    return Cut(0, min(core.start, core.num_embeddings), core.valid, core.num_embeddings)


class FusedMoEWithLoRA(BaseLayerWithLoRA):
    """Gate ("w1"), up ("w3") and down ("w2") of every expert are parts of their own, stacked over experts. Their effect
    lies inside the experts, in front of the activation, so the layer's method adds it (`FusedMoE.deltas`)."""

    kind = FusedMoE

    def _make_parts(self, slots: int) -> dict[PartKey, Part]:
        core = cast(FusedMoE, self.core)
        parts: dict[PartKey, Part] = {}
        for shard, (outputs, inputs) in core.cuts.items():
            # one stack [slots * experts, ...] each, of which every expert's part is a view
            stack = self._part(slots * core.num_experts, inputs, outputs)
            a = stack.a.view(slots, core.num_experts, *stack.a.shape[1:])
            b = stack.b.view(slots, core.num_experts, *stack.b.shape[1:])
            for expert in range(core.num_experts):
                parts[(shard, expert)] = Part(a[:, expert], b[:, expert], inputs, outputs)
        return parts

    def local(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        core = cast(FusedMoE, self.core)
        with self._adding(core, x):
            return core.local(x, weights, ids)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        with self._adding(cast(FusedMoE, self.core), x):
            return cast(torch.Tensor, self.base_layer(x, weights, ids))

    @contextmanager
    def _adding(self, core: FusedMoE, x: torch.Tensor) -> Iterator[None]:
        groups = self.active(x.shape[0])
        if not groups:
            yield
            return
        core.deltas = _Deltas(self.parts, self._loaded, groups, x)
        try:
            yield
        finally:
            # The class says None. The layer's own attributes stay what they were: the bridge compares them.
            del core.deltas


class _Deltas:
    """`ExpertDeltas` of one forward."""

    def __init__(
        self,
        parts: Mapping[PartKey, Part],
        loaded: Mapping[int, Mapping[PartKey, int]],
        groups: tuple[Group, ...],
        x: torch.Tensor,
    ) -> None:
        self._parts, self._loaded = parts, loaded
        self._used = [group.slot for group in groups]
        self._slots = torch.full((x.shape[0],), -1, device=x.device)
        for group in groups:
            self._slots[slice(None) if group.rows is None else group.rows] = group.slot

    def gate_up(self, out: torch.Tensor, x: torch.Tensor, tokens: torch.Tensor, expert: int) -> torch.Tensor:
        return self._add(out, x, tokens, ("w1", expert), ("w3", expert))

    def down(self, out: torch.Tensor, x: torch.Tensor, tokens: torch.Tensor, expert: int) -> torch.Tensor:
        return self._add(out, x, tokens, ("w2", expert))

    def _add(self, out: torch.Tensor, x: torch.Tensor, tokens: torch.Tensor, *keys: PartKey) -> torch.Tensor:
        slots = self._slots[tokens]
        for slot in self._used:
            loaded = self._loaded.get(slot, {})
            rows = (slots == slot).nonzero().squeeze(1)
            for key in keys:
                if key in loaded and len(rows):
                    part = self._parts[key]
                    part.add(out, rows, part.expand(slot, part.shrink(slot, loaded[key], x[rows])))
        return out


_WRAPPERS: tuple[tuple[type[nn.Module], type[BaseLayerWithLoRA]], ...] = (
    (FusedMoE, FusedMoEWithLoRA),
    (ParallelLMHead, ParallelLMHeadWithLoRA),
    (VocabParallelEmbedding, VocabParallelEmbeddingWithLoRA),
    (QKVParallelLinear, QKVParallelLinearWithLoRA),
    (MergedColumnParallelLinear, MergedColumnParallelLinearWithLoRA),
    (ColumnParallelLinear, ColumnParallelLinearWithLoRA),
    (RowParallelLinear, RowParallelLinearWithLoRA),
    (LinearBase, LinearLayerWithLoRA),
)
"""Class of layers, subclasses included -> wrapper; the most specific class first."""


def wrapper_of(layer: nn.Module) -> type[BaseLayerWithLoRA] | None:
    """The class that wraps this layer (not a wrapper of it), or None for one that cannot carry adapters."""
    return next((wrapper for cls, wrapper in _WRAPPERS if isinstance(layer, cls)), None)


def wrap(layer: nn.Module, context: LoraContext, slots: int, max_rank: int) -> BaseLayerWithLoRA:
    """Put `layer`, itself possibly wrapped, behind its LoRA class. Raises ConfigError for one that has none."""
    core = unwrap(layer)
    wrapper = wrapper_of(core)
    if wrapper is None:
        raise ConfigError(
            "this layer cannot carry LoRA adapters",
            expected=" | ".join(cls.__name__ for cls, _ in _WRAPPERS),
            got=type(core).__name__,
        )
    return wrapper(layer, context, slots, max_rank)
