"""The canonical tensors of modules, made of what lies in the arena: to write them, to judge by them, or to lend them.

Pure of any decision: which module needs which tensor says its ModuleStrategy, what reaches a tensor says the plan.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor

import torch

from bridge.errors import ConfigError
from bridge.model.regions import Fill, Move, dense
from engine_side.live.inplace import held
from engine_side.live.storage_layout import Stored, flat
from engine_side.load.copies import CopyPair, batches, pair, run_all
from engine_side.plan.bake import Baked
from engine_side.plan.strategies import ModuleStrategy, StrategyTable
from engine_side.plan.twins import Cluster, Role, device_of

ArenaSlot = Sequence[torch.Tensor]
"""The tensors of one version in manifest order: views of the arena."""


class CanonicalTensors:
    """What one plan's modules hold, by slot of the arena. One thread at a time.

    Args:
        baked, decided: the plan and the strategies found for it.
        pool, threads: what copies.
    """

    def __init__(self, baked: Baked, decided: StrategyTable, pool: ThreadPoolExecutor, threads: int) -> None:
        self.decided = decided
        self._pool, self._threads = pool, threads
        self.moves: dict[str, list[Move]] = {}
        self.fills: dict[str, list[Fill]] = {}
        for move in baked.plan.moves:
            self.moves.setdefault(move.target, []).append(move)
        for fill in baked.plan.fills:
            self.fills.setdefault(fill.target, []).append(fill)
        self.whole = {t.path for t in baked.plan.targets} - baked.coverage.holes.keys()
        """Targets of which every element comes from the arena."""
        self._slots: Sequence[ArenaSlot] = ()
        self._index: Mapping[str, int] = {}
        self._blocks: dict[tuple[str, str, int, torch.device], tuple[torch.Tensor, ...]] = {}
        self._written: Set[int] = frozenset()
        self._filled: set[tuple[int, str]] = set()

    def map(self, slots: Sequence[ArenaSlot], index: Mapping[str, int]) -> None:
        """The arena to read: `index` gives a tensor's place in a slot by its name. Without slots: let go of it."""
        self._slots, self._index = slots, index
        self._blocks.clear()

    def begin(self, written: Set[int]) -> None:
        """A load begins that has written the live storages at these addresses already; tied ones are written once."""
        self._written = written
        self._filled.clear()

    def places(self, choice: ModuleStrategy) -> list[tuple[str, int]]:
        """(name, role) of a module's canonical tensors."""
        cluster = self.decided.clusters[choice.path]
        return list(cluster.places[cluster.paths.index(choice.path)].items())

    def _target(self, choice: ModuleStrategy, name: str) -> tuple[str, Role]:
        """The plan's target of a module's tensor, and what it looks like."""
        cluster = self.decided.clusters[choice.path]
        role = dict(self.places(choice))[name]
        return cluster.targets[role], cluster.roles[role]

    def sent(self, move: Move, slot: int) -> torch.Tensor:
        """The arena's tensor from which a move reads. Raises ConfigError before `map`."""
        if not self._slots:
            raise ConfigError("this plan is not mapped onto an arena yet")
        return self._slots[slot][self._index[move.tensor]]

    def values(
        self, choice: ModuleStrategy, slot: int, *, reuse: bool = False, without: Container[str] = ()
    ) -> dict[str, torch.Tensor]:
        """Name -> canonical tensor of a module, from the arena, in the engine's dtype on its device.

        With `reuse`, a tensor that the module still stores canonically is filled and returned itself, so that nothing
        is allocated and its object survives; only for `apply`. Without it the values are for reading: they may lie in
        the arena itself. Tensors named in `without` are left out.
        """
        module, cluster = self.decided.live[choice.path], self.decided.clusters[choice.path]
        out: dict[str, torch.Tensor] = {}
        for name, role in self.places(choice):
            if name in without:
                continue
            target, kind = cluster.targets[role], cluster.roles[role]
            sent = None if reuse else self._as_sent(target, kind, slot, device_of(module))
            if sent is not None:
                out[name] = sent
                continue
            live, stored = held(module, name), choice.stored[name]
            reached = bool(self.moves.get(target) or self.fills.get(target))
            if live is not None and stored.identity and (reuse or not reached):
                value = live.detach()
                if tuple(value.shape) != kind.shape or value.stride() != kind.strides:
                    value = value.as_strided(kind.shape, kind.strides, value.storage_offset())
            else:
                value = torch.empty_strided(kind.shape, kind.strides, dtype=kind.dtype, device=device_of(module))
                if live is not None and target not in self.whole:
                    _read_stored(live, stored, value)
            at = value.data_ptr()
            if reached and not (reuse and (at in self._written or (at, target) in self._filled)):
                self.fill(target, value, slot)
                if reuse and live is not None and at == live.data_ptr():
                    self._filled.add((at, target))
            out[name] = value
        return out

    def _as_sent(self, target: str, kind: Role, slot: int, device: torch.device) -> torch.Tensor | None:
        """The arena's own tensor where it is what the target holds, element for element."""
        moves, whole = self.moves.get(target, ()), dense(kind.shape)
        if len(moves) != 1 or self.fills.get(target) or moves[0].dest != whole or moves[0].source != whole:
            return None
        sent = self.sent(moves[0], slot)
        same = sent.dtype == kind.dtype and sent.device == device and tuple(sent.shape) == kind.shape
        return sent if same else None

    def blocks(self, choice: ModuleStrategy, name: str, slot: int) -> tuple[torch.Tensor, ...]:
        """The canonical matrix `name` of a module as blocks of rows that lie in the arena, one below the other; empty
        where it is not made of such blocks, in the engine's dtype on its device. Neighbours in memory are one block."""
        key = (choice.path, name, slot, device_of(self.decided.live[choice.path]))
        if key not in self._blocks:
            self._blocks[key] = self._find_blocks(choice, name, slot)
        return self._blocks[key]

    def _find_blocks(self, choice: ModuleStrategy, name: str, slot: int) -> tuple[torch.Tensor, ...]:
        target, kind = self._target(choice, name)
        if len(kind.shape) != 2 or kind.strides != dense(kind.shape).strides or self.fills.get(target):
            return ()
        device, done = device_of(self.decided.live[choice.path]), 0
        out: list[torch.Tensor] = []
        for move in sorted(self.moves.get(target, ()), key=lambda move: move.dest.offset):
            sent = self.sent(move, slot)
            rows = _rows(sent, move, kind.shape[1], done)
            if rows is None or sent.dtype != kind.dtype or sent.device != device:
                return ()
            joined = _joined(out[-1], rows) if out else None
            out = [*out, rows] if joined is None else [*out[:-1], joined]
            done += len(rows)
        return tuple(out) if done == kind.shape[0] else ()

    def fill(self, target: str, value: torch.Tensor, slot: int) -> None:
        """Write a target's moves and constants into a canonical tensor."""
        pairs: list[CopyPair] = []
        with torch.no_grad():
            for fill in self.fills.get(target, ()):
                at = fill.dest
                value.as_strided(at.shape, at.strides, value.storage_offset() + at.offset).fill_(fill.value)
            for move in self.moves.get(target, ()):
                made = pair(value, move.dest, self.sent(move, slot), move.source, self._index[move.tensor], target, "")
                if made is not None:
                    pairs.append(made)
            run_all(self._pool, [batch.copy for batch in batches(pairs, self._threads)])

    def in_one_piece(self, choice: ModuleStrategy, name: str, slot: int) -> torch.Tensor | None:
        """The arena's memory where it holds a canonical tensor whole, in the engine's dtype on its device."""
        target, kind = self._target(choice, name)
        if kind.strides != dense(kind.shape).strides:
            return None
        sent = self._as_sent(target, kind, slot, device_of(self.decided.live[choice.path]))
        if sent is not None:
            return sent
        blocks = self.blocks(choice, name, slot)
        return blocks[0] if len(blocks) == 1 else None

    def fill_or_keep(self, cluster: Cluster, role: int, target: str, into: torch.Tensor, slot: int) -> None:
        """From the arena; what a partial push leaves alone, a target or some of its elements, from the live module."""
        if target not in self.whole:
            self._keep(cluster, role, into)
        self.fill(target, into, slot)

    def _keep(self, cluster: Cluster, role: int, into: torch.Tensor) -> None:
        for path, names in zip(cluster.paths, cluster.places, strict=True):
            for name, r in names.items():
                live, stored = held(self.decided.live[path], name), self.decided.choices[path].stored[name]
                if r == role and live is not None and stored.readable:
                    _read_stored(live, stored, into)
                    return


def _rows(sent: torch.Tensor, move: Move, columns: int, start: int) -> torch.Tensor | None:
    """What a move writes, as whole rows from `start` on; None where it writes anything else."""
    count, rest = divmod(move.dest.numel, max(columns, 1))
    if rest or move.dest != dense(move.dest.shape, start * columns):
        return None
    source = move.source
    if source == dense(source.shape, source.offset):
        return sent.as_strided((count, columns), (columns, 1), sent.storage_offset() + source.offset)
    if source.shape == (count, columns):
        return sent.as_strided(source.shape, source.strides, sent.storage_offset() + source.offset)
    return None


def _joined(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor | None:
    """Two blocks of rows as one, where the second lies right behind the first in the same memory."""
    end = above.data_ptr() + above.numel() * above.element_size()
    shared = above.untyped_storage().data_ptr() == below.untyped_storage().data_ptr()
    if not shared or end != below.data_ptr() or not (above.is_contiguous() and below.is_contiguous()):
        return None
    columns = above.shape[1]
    return above.as_strided((len(above) + len(below), columns), (columns, 1), above.storage_offset())


def _read_stored(live: torch.Tensor, stored: Stored, into: torch.Tensor) -> None:
    """A live tensor's canonical values into a canonical tensor; nothing where it does not hold them any more."""
    if stored.held is None or stored.origin is None:
        return
    source, dest, at, of = flat(live), flat(into), stored.origin, stored.held
    dest.as_strided(of.shape, of.strides, dest.storage_offset() + of.offset).copy_(
        source.as_strided(at.shape, at.strides, source.storage_offset() + at.offset)
    )
