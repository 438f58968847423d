"""Slots for the A and B of several LoRAs, and the slot that each token of the current forward uses (`LoraContext`).

Slots are stacked and zero-padded, for one part of one layer each. A part is the piece of an engine layer that one
checkpoint module becomes: q, k and v of a fused `qkv_proj` are three parts, gate, up and down of every expert one each.
Slots are plain tensors, not parameters: no weight sync sees them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from bridge.errors import ProtocolError
from engine_side.embedded.layers import add_to_rows
from engine_side.embedded.weights import Cut
from engine_side.protocol import LoraView

NO_LORA = -1
"""Slot of a token that uses the base model alone."""
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


class TokenGroup(NamedTuple):
    """The tokens of one LoRA: its slot and their rows [k], a slice for all rows."""

    slot: int
    rows: torch.Tensor | slice


class LoraContext:
    """Set by the runner around a forward, read by the layers inside it. Not for several threads at once: an engine runs
    one forward at a time."""

    def __init__(self) -> None:
        self._slots: torch.Tensor | None = None
        self._groups: tuple[TokenGroup, ...] = ()

    @contextmanager
    def select(self, slots: torch.Tensor) -> Iterator[None]:
        """Have token i use the LoRA of `slots[i]` ([n] int64, -1: none) inside the block. Nests; the former choice
        comes back, also after an error."""
        before = self._slots, self._groups
        used = sorted(set(slots.tolist()) - {NO_LORA})
        if len(used) == 1 and bool((slots == used[0]).all()):
            self._groups = (TokenGroup(used[0], slice(None)),)
        else:
            self._groups = tuple(TokenGroup(slot, (slots == slot).nonzero().squeeze(1)) for slot in used)
        self._slots = slots
        try:
            yield
        finally:
            self._slots, self._groups = before

    def narrow(self, index: torch.Tensor | slice) -> AbstractContextManager[None]:
        """Select only these rows of the current choice inside the block: the sampled ones, in front of the head."""
        return nullcontext() if self._slots is None else self.select(self._slots[index])

    def groups(self, n: int) -> tuple[TokenGroup, ...]:
        """Return the groups of tokens for which a layer that is called with n rows has to add something.

        Raises ProtocolError when another number of rows was selected: rows of the wrong LoRAs would be added.
        """
        if self._groups and self._slots is not None and len(self._slots) != n:
            raise ProtocolError(
                "a LoRA layer was called with other rows than LoRAs were selected for",
                where="a LoRA layer",
                expected=f"{len(self._slots)} rows",
                got=f"{n} rows",
                remedy="select (or narrow to) the rows that the layer is given",
            )
        return self._groups
