"""Which adapter each token of the current forward uses: one object per model, shared by all of its LoRA layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bridge.errors import ProtocolError

NO_LORA = -1
"""Slot of a token that uses the base model alone."""


@dataclass(frozen=True)
class Group:
    """The tokens of one adapter: its slot and their rows [k]; None for all rows."""

    slot: int
    rows: torch.Tensor | None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """The group's rows of x [n, ...]."""
        return x if self.rows is None else x[self.rows]


class LoraContext:
    """Set by the runner around a forward, read by the layers inside it. Not for several threads at once: an engine runs
    one forward at a time."""

    def __init__(self) -> None:
        self._slots: torch.Tensor | None = None
        self._groups: tuple[Group, ...] = ()
        self._forced: int | None = None

    @contextmanager
    def select(self, rows: torch.Tensor) -> Iterator[None]:
        """Inside, token i uses the adapter of slot `rows[i]` ([n] int64, -1: none). Nests; the former choice comes
        back, also after an error."""
        before = self._slots, self._groups
        self._slots, self._groups = rows, _groups(rows)
        try:
            yield
        finally:
            self._slots, self._groups = before

    @contextmanager
    def narrow(self, index: torch.Tensor | slice) -> Iterator[None]:
        """Inside, only these rows of the current choice are computed: the sampled ones, in front of the head."""
        if self._slots is None:
            yield
            return
        with self.select(self._slots[index]):
            yield

    @contextmanager
    def force(self, slot: int) -> Iterator[None]:
        """Inside, every token uses this slot, whatever is selected: a warm-up's forward."""
        before, self._forced = self._forced, slot
        try:
            yield
        finally:
            self._forced = before

    def groups(self, n: int) -> tuple[Group, ...]:
        """What a layer that is called with n rows has to add; () where no adapter is in use.

        Raises ProtocolError when another number of rows was selected: rows of the wrong adapters would be added.
        """
        if self._forced is not None:
            return (Group(self._forced, None),)
        if self._groups and self._slots is not None and len(self._slots) != n:
            raise ProtocolError(
                "a LoRA layer was called with other rows than adapters were selected for",
                expected=f"{len(self._slots)} rows",
                got=f"{n} rows",
                remedy="select (or narrow to) the rows that the layer is given",
            )
        return self._groups


def _groups(rows: torch.Tensor) -> tuple[Group, ...]:
    slots = sorted(set(rows.tolist()) - {NO_LORA})
    if len(slots) == 1 and bool((rows == slots[0]).all()):
        return (Group(slots[0], None),)
    return tuple(Group(slot, (rows == slot).nonzero().squeeze(1)) for slot in slots)
