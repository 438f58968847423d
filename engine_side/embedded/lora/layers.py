"""Layers with LoRA: wrappers that add B A x for each token's LoRA to the output of the layer itself.

    out = W x + b + B_s (A_s x)        s: the slot that the LoraContext selects for the token

One class per kind of layer, found by `wrapper_of`. The layer's own `forward` is what runs: a subclass that brings its
own keeps it. Over several ranks a column-parallel layer has B cut like W, a row-parallel one A, an embedding A along
the vocabulary, a head B; sums and gathers of a layer over ranks include the LoRA's part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from bridge.errors import ConfigError
from engine_side.embedded.layers import LinearBase, LoraFactors, ParallelLMHead, VocabParallelEmbedding, add_to_rows
from engine_side.embedded.lora.slots import ONLY, LoraContext, LoraPart, PartKey, TokenGroup, slot_dtype
from engine_side.embedded.moe import FusedMoE
from engine_side.embedded.weights import Cut
from engine_side.embedded.wrappers import WrappedLayer, unwrap


class BaseLayerWithLoRA(WrappedLayer):
    """Base of the wrappers: the slots of each part.

    Attributes:
        parts: part of the layer -> its slots on this rank.
        reached: True once a forward has asked this layer for a LoRA's part. An engine that uses a layer's weight
            without calling the layer would leave its LoRAs without effect.
    """

    embedding: ClassVar[bool] = False
    """LoRAs come as `lora_embedding_A` and `_B`."""

    def __init__(self, base_layer: nn.Module, context: LoraContext, slots: int, max_rank: int) -> None:
        super().__init__(base_layer)
        self.context = context
        self.reached = False
        self._max_rank = max_rank
        self.parts: Mapping[PartKey, LoraPart] = self._make_parts(slots)

    def _make_parts(self, slots: int) -> dict[PartKey, LoraPart]:
        raise NotImplementedError

    def _part(self, slots: int, inputs: Cut, outputs: Cut, size: tuple[int, int] | None = None) -> LoraPart:
        """Allocate empty slots; `size` are this rank's (inputs, outputs) where padding makes them larger than cuts."""
        width, height = size or (inputs.size, outputs.size)
        dtype = slot_dtype(self.core.params_dtype)
        device = next(p.device for p in self.core._parameters.values() if p is not None)
        a = torch.zeros(slots, self._max_rank, width, dtype=dtype, device=device)
        b = torch.zeros(slots, height, self._max_rank, dtype=dtype, device=device)
        return LoraPart(a, b, inputs, outputs, by_id=self.embedding)

    def active(self, n: int) -> tuple[TokenGroup, ...]:
        """Return the groups of tokens for which a call with n rows has something to add."""
        groups = self.context.groups(n)
        if groups and not self.reached:
            self.reached = True
        return groups

    def lora_factors(self, n: int) -> Iterator[LoraFactors]:
        """Yield the LoRAs that a call with n rows would add; see `LinearBase.lora_factors`."""
        for slot, rows in self.active(n):
            for part in self.parts.values():
                if slot in part.ranks:
                    yield rows, *part.factors(slot)

    def _add(self, out: torch.Tensor, x: torch.Tensor, groups: tuple[TokenGroup, ...]) -> torch.Tensor:
        """Add the LoRAs' part to this rank's outputs, in place."""
        for slot, rows in groups:
            own = x[rows]
            for part in self.parts.values():
                part.add(slot, out, own, rows)
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = self.active(x.shape[0])
        if not groups:
            return super().forward(x)
        core = self.core
        if core.tp.size == 1 or type(core).finish is LinearBase.finish:
            return self._add(super().forward(x), x, groups)
        if type(core).forward in (LinearBase.forward, VocabParallelEmbedding.forward):  # finish(local(x))
            out: torch.Tensor = core.finish(self._add(core.local(x), x, groups))
            return out
        # A sharded layer with a forward of its own: nothing can be put in front of its collective, so the LoRAs' part
        # goes through a second one.
        out = super().forward(x)
        width = max(part.outputs.offset + part.b.shape[1] for part in self.parts.values())
        wide = torch.promote_types(out.dtype, torch.float32)
        effect = core.finish(self._add(torch.zeros(len(x), width, dtype=wide, device=out.device), x, groups))
        for _, rows in groups:
            add_to_rows(out, rows, effect[rows])
        return out


class LinearLayerWithLoRA(BaseLayerWithLoRA):
    """Any linear layer: a part for each of those that checkpoints hold one by one, cut as the layer cuts its weight."""

    def _make_parts(self, slots: int) -> dict[PartKey, LoraPart]:
        core: LinearBase = self.core
        return {(part, None): self._part(slots, core.input_cut, cut) for part, cut in core.output_cuts.items()}


class VocabParallelEmbeddingWithLoRA(BaseLayerWithLoRA):
    """Called with ids [n]; A holds a column per token of this rank's part of the vocabulary."""

    embedding = True

    def _make_parts(self, slots: int) -> dict[PartKey, LoraPart]:
        size = (self.core.num_embeddings_per_partition, self.core.embedding_dim)
        return {ONLY: self._part(slots, self.core.vocab_cut, Cut.all_of(self.core.embedding_dim), size)}


class ParallelLMHeadWithLoRA(BaseLayerWithLoRA):
    """An output projection. Its LoRAs are its own, also where it is tied to an embedding that has some."""

    def _make_parts(self, slots: int) -> dict[PartKey, LoraPart]:
        size = (self.core.embedding_dim, self.core.num_embeddings_per_partition)
        return {ONLY: self._part(slots, Cut.all_of(self.core.embedding_dim), self.core.vocab_cut, size)}


class FusedMoEWithLoRA(BaseLayerWithLoRA):
    """Gate ("w1"), up ("w3") and down ("w2") of every expert are parts of their own, stacked over experts. Their effect
    lies inside the experts, in front of the activation, so the layer's method adds it (`FusedMoE.lora`)."""

    def _make_parts(self, slots: int) -> dict[PartKey, LoraPart]:
        experts: int = self.core.num_experts
        parts: dict[PartKey, LoraPart] = {}
        for shard, (outputs, inputs) in self.core.cuts.items():
            # one stack [slots * experts, ...] each, of which every expert's part is a view
            stack = self._part(slots * experts, inputs, outputs)
            a, b = (t.view(slots, experts, *t.shape[1:]) for t in (stack.a, stack.b))
            for expert in range(experts):
                parts[(shard, expert)] = LoraPart(a[:, expert], b[:, expert], inputs, outputs)
        return parts

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        groups, core = self.active(x.shape[0]), self.core
        if groups:
            slots = torch.full((x.shape[0],), -1, device=x.device)
            for slot, rows in groups:
                slots[rows] = slot
            core.lora = partial(self._add_to_expert, [slot for slot, _ in groups], slots)
        try:
            out: torch.Tensor = self.base_layer(x, weights, ids)
        finally:
            # The class says None. The layer's own attributes stay as they were: the bridge compares them.
            core.__dict__.pop("lora", None)
        return out

    def _add_to_expert(
        self, used: list[int], slots: torch.Tensor, shard_id: str, expert: int, out: torch.Tensor, x: torch.Tensor,
        tokens: torch.Tensor,
    ) -> None:  # fmt: skip
        """Do what `ExpertLora` says, where token i of the forward uses `slots[i]`, one of `used` or none."""
        part, own = self.parts[shard_id, expert], slots[tokens]
        for slot in used:
            rows = (own == slot).nonzero().squeeze(1)
            if len(rows):
                part.add(slot, out, x[rows], rows)


_WRAPPERS: Mapping[type[nn.Module], type[BaseLayerWithLoRA]] = {
    FusedMoE: FusedMoEWithLoRA,
    ParallelLMHead: ParallelLMHeadWithLoRA,
    VocabParallelEmbedding: VocabParallelEmbeddingWithLoRA,
    LinearBase: LinearLayerWithLoRA,
}
"""Class of layers, subclasses included -> wrapper; the most specific class first."""


def wrapper_of(layer: nn.Module) -> type[BaseLayerWithLoRA] | None:
    """Return the class that wraps this layer, itself possibly wrapped; None for one that cannot carry LoRA."""
    core = unwrap(layer)
    return next((wrapper for cls, wrapper in _WRAPPERS.items() if isinstance(core, cls)), None)


def wrap(layer: nn.Module, context: LoraContext, slots: int, max_rank: int) -> BaseLayerWithLoRA:
    """Put `layer`, itself possibly wrapped, behind its LoRA class. Raises ConfigError for one that has none."""
    wrapper = wrapper_of(layer)
    if wrapper is None:
        raise ConfigError(
            "this layer cannot carry LoRA",
            where="lora_targets",
            expected=" | ".join(cls.__name__ for cls in _WRAPPERS),
            got=type(unwrap(layer)).__name__,
            remedy="take it out of lora_targets",
        )
    return wrapper(layer, context, slots, max_rank)
