"""The LoRA that each token of the current forward uses: one object per model, shared by all of its LoRA layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch

from bridge.errors import ProtocolError

NO_LORA = -1
"""Slot of a token that uses the base model alone."""


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
                expected=f"{len(self._slots)} rows",
                got=f"{n} rows",
                remedy="select (or narrow to) the rows that the layer is given",
            )
        return self._groups
