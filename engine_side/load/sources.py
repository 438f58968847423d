"""The canonical tensors of modules, made from a version in the arena: to write them, to check against them, or to lend.

Takes no decision: a `ModuleStrategy` says how a module's tensors are stored, the plan says what reaches them.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor

import torch

from bridge.errors import REPORT, ConfigError
from bridge.model.regions import Fill, Move, dense
from engine_side.live.inplace import find_tensor
from engine_side.load.computed_targets import ComputedTargets
from engine_side.load.copies import batches, copy_all, make_pair
from engine_side.plan.bake import Baked
from engine_side.plan.clusters import Cluster, Role
from engine_side.plan.strategies import ModuleStrategy, StrategyTable
from engine_side.plan.twins import device_of

ArenaSlot = Sequence[torch.Tensor]
"""The tensors of one version in manifest order: views of the arena."""


class CanonicalTensors:
    """The canonical tensors of one plan's modules, by slot of the arena. One thread at a time.

    Args:
        baked, decided: the plan and the strategies found for it.
        computed: the targets that no move describes.
        pool, threads: the threads that copy.

    Attributes:
        moves, fills: those of the plan, by target.
        whole: targets of which every element comes from the arena.
    """

    def __init__(
        self,
        baked: Baked,
        decided: StrategyTable,
        computed: ComputedTargets,
        pool: ThreadPoolExecutor,
        threads: int,
    ) -> None:
        self.decided, self.computed = decided, computed
        self._pool, self._threads = pool, threads
        self.moves: dict[str, list[Move]] = {}
        self.fills: dict[str, list[Fill]] = {}
        for move in baked.plan.moves:
            self.moves.setdefault(move.target, []).append(move)
        for fill in baked.plan.fills:
            self.fills.setdefault(fill.target, []).append(fill)
        self.whole = {t.path for t in baked.plan.targets} - baked.coverage.holes.keys()
        self._parts: dict[str, list[tuple[str, str, Role]]] = {}
        for path, cluster in decided.clusters.items():
            names = cluster.places[cluster.paths.index(path)]
            self._parts[path] = [(name, cluster.targets[role], cluster.roles[role]) for name, role in names.items()]
        self._slots: Sequence[ArenaSlot] = ()
        self._made: Sequence[Mapping[str, torch.Tensor]] = ()
        self.index: Mapping[str, int] = {}
        self._blocks: dict[tuple[str, str, int, torch.device], tuple[torch.Tensor, ...]] = {}
        self._written: Set[int] = frozenset()
        self._filled: set[tuple[int, str]] = set()

    def map(
        self,
        slots: Sequence[ArenaSlot],
        index: Mapping[str, int],
        made: Sequence[Mapping[str, torch.Tensor]] = (),
    ) -> None:
        """Read from this arena from now on; without slots, let go of it.

        Args:
            index: a tensor's place in a slot; for one that was made of another, the place of that other.
            made: per slot, what this rank made of the arena's tensors, to be read instead of them.
        """
        self._slots, self.index, self._made = slots, index, made
        self._blocks.clear()
        self.computed.map(self.tensor)

    def begin(self, written: Set[int]) -> None:
        """Begin a load that has already written the live storages at these addresses; tied ones are written once."""
        self._written = written
        self._filled.clear()

    def parts(self, choice: ModuleStrategy) -> list[tuple[str, str, Role]]:
        """List (attribute, target of the plan, form) of a module's canonical tensors."""
        return self._parts[choice.path]

    def tensors_of(self, target: str) -> tuple[str, ...]:
        """Names of the sent tensors that reach a target."""
        moved = (move.tensor for move in self.moves.get(target, ()))
        return tuple(dict.fromkeys((*moved, *self.computed.sources.get(target, ()))))

    def sent(self, move: Move, slot: int) -> torch.Tensor:
        """The tensor from which a move reads. Raises ConfigError before `map`."""
        return self.tensor(move.tensor, slot)

    def tensor(self, name: str, slot: int) -> torch.Tensor:
        """A tensor of a version, as the engine's loader takes it. Raises ConfigError before `map`."""
        if not self._slots:
            raise ConfigError(
                "this plan is not mapped onto an arena yet",
                where="a plan",
                expected="an arena",
                got="none",
                remedy=REPORT,
            )
        made = self._made[slot].get(name) if self._made else None
        return self._slots[slot][self.index[name]] if made is None else made

    def values(
        self, choice: ModuleStrategy, slot: int, *, reuse: bool = False, without: Container[str] = ()
    ) -> dict[str, torch.Tensor]:
        """Make a module's canonical tensors, by name, in the engine's dtype on its device.

        Args:
            reuse: fill and return the tensors that the module still stores canonically, so that nothing is allocated
                and the objects survive; for a load. Otherwise the values are for reading, and may lie in the arena.
            without: names to leave out.
        """
        device, out = device_of(self.decided.live[choice.path]), dict[str, torch.Tensor]()
        for name, target, role in self.parts(choice):
            if name in without:
                continue
            sent = None if reuse else self._as_sent(target, role, slot, device)
            if sent is not None:
                out[name] = sent
                continue
            live, stored = find_tensor(self.decided.live[choice.path], name), choice.stored[name]
            reached = bool(self.tensors_of(target) or self.fills.get(target))
            if live is not None and stored.identity and (reuse or not reached):
                value = live.detach()
                if tuple(value.shape) != role.shape or value.stride() != role.strides:
                    value = value.as_strided(role.shape, role.strides, value.storage_offset())
            else:
                value = torch.empty_strided(role.shape, role.strides, dtype=role.dtype, device=device)
                if live is not None and target not in self.whole and stored.readable:
                    current, into = stored.side_by_side(live, value)
                    into.copy_(current)
            at = value.data_ptr()
            if reached and not (reuse and (at in self._written or (at, target) in self._filled)):
                self.fill(target, value, slot)
                if reuse and live is not None and at == live.data_ptr():
                    self._filled.add((at, target))
            out[name] = value
        return out

    def _as_sent(self, target: str, role: Role, slot: int, device: torch.device) -> torch.Tensor | None:
        """The arena's own tensor where it equals the target, element for element."""
        moves, whole = self.moves.get(target, ()), dense(role.shape)
        if target in self.computed.sources:
            return None
        if len(moves) != 1 or self.fills.get(target) or moves[0].dest != whole or moves[0].source != whole:
            return None
        sent = self.sent(moves[0], slot)
        same = sent.dtype == role.dtype and sent.device == device and tuple(sent.shape) == role.shape
        return sent if same else None

    def blocks(self, choice: ModuleStrategy, name: str, slot: int) -> tuple[torch.Tensor, ...]:
        """View a module's canonical matrix as blocks of rows that lie in the arena, one below the other.

        Neighbours in memory are one block. Empty where the matrix is not made of such blocks, in the engine's dtype on
        its device.
        """
        device = device_of(self.decided.live[choice.path])
        key = (choice.path, name, slot, device)
        if key not in self._blocks:
            target, role = next((target, role) for part, target, role in self.parts(choice) if part == name)
            self._blocks[key] = self._find_blocks(target, role, device, slot)
        return self._blocks[key]

    def _find_blocks(self, target: str, role: Role, device: torch.device, slot: int) -> tuple[torch.Tensor, ...]:
        if target in self.computed.sources or self.fills.get(target):
            return ()
        if len(role.shape) != 2 or role.strides != dense(role.shape).strides:
            return ()
        out, done = list[torch.Tensor](), 0
        for move in sorted(self.moves.get(target, ()), key=lambda move: move.dest.offset):
            sent = self.sent(move, slot)
            rows = _rows(sent, move, role.shape[1], done)
            if rows is None or sent.dtype != role.dtype or sent.device != device:
                return ()
            joined = _joined(out[-1], rows) if out else None
            out = [*out, rows] if joined is None else [*out[:-1], joined]
            done += len(rows)
        return tuple(out) if done == role.shape[0] else ()

    def in_one_piece(self, choice: ModuleStrategy, name: str, slot: int) -> torch.Tensor | None:
        """The arena's memory where it holds a canonical tensor whole, in the engine's dtype on its device."""
        target, role = next((target, role) for part, target, role in self.parts(choice) if part == name)
        if role.strides != dense(role.shape).strides:
            return None
        sent = self._as_sent(target, role, slot, device_of(self.decided.live[choice.path]))
        if sent is not None:
            return sent
        blocks = self.blocks(choice, name, slot)
        return blocks[0] if len(blocks) == 1 else None

    def fill(self, target: str, value: torch.Tensor, slot: int) -> None:
        """Write a target's moves and constants into a canonical tensor. Blocks."""
        with torch.no_grad():
            if target in self.computed.sources:
                value.copy_(self.computed.values(slot)[target])
                return
            for fill in self.fills.get(target, ()):
                at = fill.dest
                value.as_strided(at.shape, at.strides, value.storage_offset() + at.offset).fill_(fill.value)
            made = [
                make_pair(value, move.dest, self.sent(move, slot), move.source, self.index[move.tensor], target)
                for move in self.moves.get(target, ())
            ]
            pairs = [pair for pair in made if pair is not None]
            copy_all(self._pool, batches(pairs, self._threads))

    def fill_role(self, cluster: Cluster, role: int, into: torch.Tensor, slot: int) -> None:
        """Fill one canonical tensor of a twin; elements that a partial push leaves alone come from the live module."""
        target = cluster.targets[role]
        if target not in self.whole:
            for path, names in zip(cluster.paths, cluster.places, strict=True):
                choice, module = self.decided.choices[path], self.decided.live[path]
                found = [(find_tensor(module, n), choice.stored[n]) for n, r in names.items() if r == role]
                readable = [(live, stored) for live, stored in found if live is not None and stored.readable]
                if readable:
                    live, stored = readable[0]
                    current, part = stored.side_by_side(live, into)
                    part.copy_(current)
                    break
        self.fill(target, into, slot)


def _rows(sent: torch.Tensor, move: Move, columns: int, start: int) -> torch.Tensor | None:
    """View the source of a move that writes whole rows from row `start` on; None for any other move."""
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
    """View two blocks of rows as one, where the second lies right behind the first in the same memory."""
    end = above.data_ptr() + above.numel() * above.element_size()
    shared = above.untyped_storage().data_ptr() == below.untyped_storage().data_ptr()
    if not shared or end != below.data_ptr() or not (above.is_contiguous() and below.is_contiguous()):
        return None
    columns = above.shape[1]
    return above.as_strided((len(above) + len(below), columns), (columns, 1), above.storage_offset())
