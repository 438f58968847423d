"""Memory for the A and B of several LoRAs: stacked, zero-padded slots of one part of one layer.

A part is the piece of an engine layer that one checkpoint module becomes: q, k and v of a fused `qkv_proj` are three
parts, gate, up and down of every expert one each. Slots are plain tensors, not parameters: no weight sync sees them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from engine_side.embedded.layers import add_to_rows
from engine_side.embedded.weights import Cut
from engine_side.protocol import LoraView

PartKey = tuple[object, object]
"""(shard id, expert id) as the model's `resolve` gives them to a loader; None where there is none."""
ONLY: PartKey = (None, None)
"""The part of a layer that is not fused."""


def slot_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a layer's LoRAs are held in: the layer's own, float32 where nothing computes in that."""
    return dtype if dtype.is_floating_point and dtype.itemsize >= 2 else torch.float32


@dataclass(frozen=True)
class LoraPart:
    """The slots of one part on this rank.

    Attributes:
        a, b: [slots, max_rank, inputs here] and [slots, outputs here, max_rank], zero where no LoRA lies. They may be
            larger than the cuts: a padded vocabulary.
        inputs, outputs: the columns of A and rows of B that these are, and where the outputs begin in the layer's.
        by_id: the layer's inputs are token ids [n], each of which picks a column of A.
        ranks: slot -> rank of the LoRA that lies there; a LoRA may leave this part alone.
    """

    a: torch.Tensor
    b: torch.Tensor
    inputs: Cut
    outputs: Cut
    by_id: bool = False
    ranks: dict[int, int] = field(default_factory=dict)

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of the whole A and B, as they travel."""
        return (rank, self.inputs.whole), (self.outputs.whole, rank)

    def write(self, slot: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Store this rank's piece of the whole A [rank, inputs] and B [outputs, rank], for tokens of the slot to use;
        the rest becomes zero."""
        self.clear(slot)
        rank = a.shape[0]
        self.a[slot, :rank, : self.inputs.size].copy_(a[:, self.inputs.span])
        self.b[slot, : self.outputs.size, :rank].copy_(b[self.outputs.span])
        self.ranks[slot] = rank

    def clear(self, slot: int) -> None:
        """Zero a slot."""
        self.ranks.pop(slot, None)
        self.a[slot].zero_()
        self.b[slot].zero_()

    def factors(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the live A [rank, inputs here] and B [outputs here, rank] of a LoRA, without padding."""
        rank = self.ranks[slot]
        return self.a[slot, :rank, : self.inputs.size], self.b[slot, : self.outputs.size, :rank]

    def views(self, slot: int, names: tuple[str, str]) -> Iterator[LoraView]:
        """Yield the live A and B of a LoRA, and the padding around them."""
        a, b, rank, width, height = self.a[slot], self.b[slot], self.ranks[slot], self.inputs.size, self.outputs.size
        whole, (live_a, live_b) = slice(0, rank), self.factors(slot)
        for name, live, index, padding in (
            (names[0], live_a, (whole, self.inputs.span), (a[rank:], a[:rank, width:])),
            (names[1], live_b, (self.outputs.span, whole), (b[:, rank:], b[height:, :rank])),
        ):
            yield LoraView(name, live, index, tuple(p for p in padding if p.numel()))

    def add(self, slot: int, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | slice) -> None:
        """Add B A x of a slot's LoRA, if it has this part, to rows of the layer's output [n, outputs], in place; other
        rows keep their bits.

        `x` are the inputs of these rows: [k, inputs here] or ids [k]. Sums are in float32 or wider, rounded once.
        """
        if slot not in self.ranks:
            return
        a, b = self.factors(slot)
        wide = torch.promote_types(a.dtype, torch.float32)
        if self.by_id:  # columns of A; zeros for ids of other ranks
            here = x - self.inputs.start
            inside = (here >= 0) & (here < self.inputs.size)
            shrunk = self.a[slot, : self.ranks[slot]].t()[torch.where(inside, here, 0)].to(wide) * inside.unsqueeze(-1)
        else:
            shrunk = x.to(wide) @ a.to(wide).t()
        add_to_rows(out.narrow(-1, self.outputs.offset, self.outputs.size), rows, shrunk @ b.to(wide).t())
