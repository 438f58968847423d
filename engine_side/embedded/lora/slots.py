"""Where the A and B of several adapters lie: stacked, zero-padded memory of one part of one layer.

A part is what one checkpoint module becomes in an engine layer: q, k and v of a fused `qkv_proj` are three parts, gate,
up and down of every expert one each. Slots are plain tensors, not parameters: no weight sync sees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from engine_side.embedded.weights import Cut
from engine_side.protocol import LoraView

PartKey = tuple[object, object]
"""(shard id, expert id) as the model's `resolve` gives them to a loader; None where there is none."""
ONLY: PartKey = (None, None)
"""The part of a layer that is not fused."""


def key_of(arguments: Mapping[str, object]) -> PartKey:
    """The part that a loader's further arguments mean."""
    return arguments.get("shard_id"), arguments.get("expert_id")


def slot_dtype(dtype: torch.dtype) -> torch.dtype:
    """What adapters of a layer are held in: the layer's own dtype, float32 where nobody computes in that."""
    return dtype if dtype.is_floating_point and dtype.itemsize >= 2 else torch.float32


@dataclass(frozen=True)
class Part:
    """One part's slots on this rank.

    `a` [slots, max_rank, inputs here] and `b` [slots, outputs here, max_rank], zero where no adapter lies. `inputs` and
    `outputs` say which columns of A and rows of B these are, and where the part's outputs begin in the layer's. The
    slots may be larger than the cuts: a padded vocabulary.
    """

    a: torch.Tensor
    b: torch.Tensor
    inputs: Cut
    outputs: Cut

    @classmethod
    def allocate(
        cls, slots: int, max_rank: int, inputs: Cut, outputs: Cut, like: torch.Tensor, dtype: torch.dtype,
        *, here: tuple[int, int] | None = None,
    ) -> Part:  # fmt: skip
        """Empty slots on the device of `like`; `here` are this rank's (inputs, outputs) where padding makes them more
        than the cuts say."""
        width, height = here or (inputs.size, outputs.size)
        a = torch.zeros(slots, max_rank, width, dtype=dtype, device=like.device)
        b = torch.zeros(slots, height, max_rank, dtype=dtype, device=like.device)
        return cls(a, b, inputs, outputs)

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The whole A and B, as they travel."""
        return (rank, self.inputs.whole), (self.outputs.whole, rank)

    def write(self, slot: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """This rank's piece of the whole A [rank, inputs] and B [outputs, rank]; the rest of the slot becomes zero."""
        self.clear(slot)
        rank = a.shape[0]
        self.a[slot, :rank, : self.inputs.size].copy_(a[:, _run(self.inputs)])
        self.b[slot, : self.outputs.size, :rank].copy_(b[_run(self.outputs)])

    def clear(self, slot: int) -> None:
        self.a[slot].zero_()
        self.b[slot].zero_()

    def views(self, slot: int, rank: int, names: tuple[str, str]) -> Iterator[LoraView]:
        """The live A and B of a slot, and the padding around them."""
        a, b, width, height = self.a[slot], self.b[slot], self.inputs.size, self.outputs.size
        whole = slice(0, rank)
        yield _view(names[0], a[:rank, :width], (whole, _run(self.inputs)), a[rank:], a[:rank, width:])
        yield _view(names[1], b[:height, :rank], (_run(self.outputs), whole), b[:, rank:], b[height:, :rank])

    def shrink(self, slot: int, rank: int, x: torch.Tensor) -> torch.Tensor:
        """x [n, inputs here] -> x A^T [n, rank], accumulated in float32 or better."""
        return x.to(self.wide) @ self.a[slot, :rank, : self.inputs.size].to(self.wide).t()

    def pick(self, slot: int, rank: int, ids: torch.Tensor) -> torch.Tensor:
        """An embedding's ids [n] -> columns of A [n, rank]; zeros for ids of other ranks."""
        here = ids - self.inputs.start
        inside = (here >= 0) & (here < self.inputs.size)
        rows = self.a[slot, :rank].t()[torch.where(inside, here, 0)]
        return rows.to(self.wide) * inside.unsqueeze(-1)

    def expand(self, slot: int, shrunk: torch.Tensor) -> torch.Tensor:
        """[n, rank] -> the effect on the outputs [n, outputs here], not yet rounded."""
        return shrunk @ self.b[slot, : self.outputs.size, : shrunk.shape[1]].to(self.wide).t()

    def add(self, out: torch.Tensor, rows: torch.Tensor | None, effect: torch.Tensor) -> None:
        """Add `effect` to rows of the layer's output [n, outputs], in place, rounding once; other rows keep their
        bits."""
        dest = out.narrow(-1, self.outputs.offset, self.outputs.size)
        if rows is None:
            dest.copy_(dest.to(self.wide) + effect)
        else:
            dest[rows] = (dest[rows].to(self.wide) + effect).to(dest.dtype)

    @property
    def wide(self) -> torch.dtype:
        """What effects are computed in."""
        return torch.promote_types(self.a.dtype, torch.float32)


def _run(cut: Cut) -> slice:
    return slice(cut.start, cut.start + cut.size)


def _view(name: str, live: torch.Tensor, index: tuple[slice, ...], *padding: torch.Tensor) -> LoraView:
    return LoraView(name, live, index, tuple(p for p in padding if p.numel()))
