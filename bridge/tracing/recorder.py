"""Follow weights through somebody else's loader, by storage.

A loader (an engine's `load_weights`, transformers' weight conversion) is run on meta stand-ins under a `Recorder`.
Views share their storage, so at each write the region that is read and the region that is written are known, whatever
names, slices, transposes or experts the loader deals in. Every storage that matters has a *log* of what was written
into it; the last writer of an element supplies it. Casts, clones and concatenations make storages whose logs point back
to the sent tensors; arithmetic leaves a taint with the name of the operation.

Nothing here reads values: everything runs on the meta device. Used by the engine's bake and by the trainer's naming.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.errors import REPORT, ConfigError
from bridge.model.regions import Fill, Move, Region, dense, follow
from bridge.tracing.ops import HANDLERS, REWRITES, default_handler
from bridge.tracing.provenance import (
    NOT_AFFINE,
    NOT_SENT,
    LoggedWrite,
    Provenance,
    ResolvedWrites,
    StorageLog,
    entry_for,
    extent,
    region_of,
    resolve,
    storage_key,
    why_not,
)

__all__ = ["NOT_AFFINE", "NOT_SENT", "Provenance", "Recorder"]


class Recorder:
    """Context manager that records how sent tensors reach parameters while a loader runs. One use, one thread.

    Args:
        sources: name -> contiguous meta tensor that stands in for a sent tensor, each with a storage of its own.
        targets: path -> meta parameter or buffer. Paths that share a region of storage are ties: the moves go to the
            first path, see `ties`.

    Attributes:
        moves, fills: in the order of the writes; repeated writes are all kept, so that coverage can find the overlap.
            `dest` counts in the target's own storage, from the target's first element. Valid after the `with` block.
        tainted: target path -> why its value is not a plain copy of sent elements.
        current: the name last handed out by `feed`, for errors that say at which tensor the loader failed.
        streamed: the loader has been handed everything, one after the other as it wrote: it is done with each.
        ties: path -> the earlier path that has the same storage.
        mode: in it operations are recorded; for handlers that carry an operation out by others.
        rebound: target paths whose tensor got another storage (`param.data = ...`); their moves are what the new
            storage held at the end, with `dest` in the target's former layout.

    Raises ConfigError for a source that is not a plain contiguous meta tensor.
    """

    def __init__(self, sources: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor] | None = None) -> None:
        self.moves: list[Move] = []
        self.fills: list[Fill] = []
        self.tainted: dict[str, str] = {}
        self.ties: dict[str, str] = {}
        self.rebound: list[str] = []
        self.current: str | None = None
        self.streamed = False
        self.storages: dict[int, StorageLog] = {}
        self._targets = dict(targets or {})
        self._layout = {path: region_of(tensor) for path, tensor in self._targets.items()}
        self._first: dict[str, int] = {}
        for path, tensor in self._targets.items():
            self._first[path] = storage_key(tensor)
            storage, region = self.track(tensor), region_of(tensor)
            earlier = next((other for other, place in storage.targets if place == region), None)
            if earlier is not None:
                self.ties[path] = earlier
            else:
                storage.targets.append((path, region))
        for name, tensor in sources.items():
            self._add_source(name, tensor)
        self.mode = _Mode(self)

    def __enter__(self) -> Self:
        self.mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: object) -> None:
        self.mode.__exit__(*exc)  # type: ignore[no-untyped-call]
        if exc[0] is None:
            self._settle_rebound()

    def feed(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Hand (name, tensor) pairs to the loader, keeping `current` at the last one handed out."""
        self.streamed, before = False, len(self.moves)
        for name, tensor in weights:
            self.current = name
            yield name, tensor
        self.streamed = len(self.moves) > before

    def provenance(self, tensor: torch.Tensor) -> Provenance:
        """Find the sources of a tensor's elements. May be called inside or after the `with` block."""
        other = dense(tuple(tensor.shape))
        result = Provenance([], [], None)
        for write, origin, held in self.read(tensor, other):
            reason = why_not(write, tensor.dtype)
            if reason is not None:
                result.taint = result.taint or reason
            elif write is not None and write.name is not None:
                result.pieces.append((write.name, held, origin))
            elif write is not None and write.value is not None:
                result.fills.append((held, write.value))
        return result

    def read(self, tensor: torch.Tensor, other: Region) -> ResolvedWrites:
        """Find the write behind each element of a tensor; the companion region `other` is split alongside."""
        view = region_of(tensor)
        storage = self.storages.get(storage_key(tensor))
        if storage is None:
            return [(None, view, other)] if view.numel else []
        if storage.dtype != tensor.dtype:
            return [(LoggedWrite(view, taint=f"reinterprets {storage.dtype} as {tensor.dtype}"), view, other)]
        return resolve(storage.log, view, other)

    def write(self, dest: torch.Tensor, found: ResolvedWrites) -> None:
        """Log a write into `dest`; the companions of `found` are regions of `dest`'s storage."""
        storage = self.storages.get(storage_key(dest))
        if storage is None:
            if all(write is None for write, _, _ in found):
                return
            storage = self.track(dest)
        if storage.dtype != dest.dtype:
            reason = f"reinterprets {storage.dtype} as {dest.dtype}"
            found = [(LoggedWrite(held, taint=reason), held, held) for _, _, held in found]
        for write, origin, held in found:
            entry = entry_for(write, origin, held, dest.dtype)
            storage.log.append(entry)
            if storage.targets:
                self.emit(storage, entry)

    def track(self, tensor: torch.Tensor) -> StorageLog:
        """The log of a tensor's storage, made when it is new."""
        keep = tensor.untyped_storage()
        return self.storages.setdefault(keep._cdata, StorageLog(keep, tensor.dtype))

    def knows(self, tensor: torch.Tensor) -> bool:
        """True when anything was logged for this tensor's storage."""
        storage = self.storages.get(storage_key(tensor))
        return storage is not None and bool(storage.log)

    def derived(self, tensor: torch.Tensor) -> bool:
        """True when this tensor's storage holds anything that came from a sent tensor."""
        storage = self.storages.get(storage_key(tensor))
        return storage is not None and any(w.name is not None or w.taint is not None for w in storage.log)

    def _add_source(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta" or not tensor.is_contiguous() or tensor.storage_offset():
            raise ConfigError(
                "a stand-in must be a contiguous meta tensor with a storage of its own",
                where=name,
                expected="a contiguous meta tensor",
                got=f"{tensor.device}, strides {tuple(tensor.stride())}, offset {tensor.storage_offset()}",
                remedy=REPORT,
            )
        whole = dense(tuple(tensor.shape))
        self.track(tensor).log.append(LoggedWrite(whole, name=name, origin=whole, dtype=tensor.dtype))

    def emit(self, storage: StorageLog, entry: LoggedWrite) -> None:
        """Turn one write into moves, fills or taints of the targets whose elements it touches."""
        rest = [(entry.origin or entry.held, entry.held)]
        for path, place in storage.targets:
            low, high = place.offset, place.offset + extent(place)
            if low <= entry.low and entry.high <= high:
                for origin, held in rest:
                    self._record(path, entry, origin, Region(held.offset - low, held.shape, held.strides))
                return
        for path, place in storage.targets:
            later: list[tuple[Region, Region]] = []
            for origin, held in rest:
                split = follow(held, origin, place, place)
                if split is None:
                    self.tainted.setdefault(path, NOT_AFFINE)
                    continue
                for at, source in split.inside:
                    self._record(path, entry, source, Region(at.offset - place.offset, at.shape, at.strides))
                later += [(source, at) for at, source in split.outside]
            rest = later

    def _record(self, path: str, entry: LoggedWrite, origin: Region, dest: Region) -> None:
        reason = why_not(entry, self._targets[path].dtype)
        if reason is not None:
            self.tainted.setdefault(path, reason)
        elif entry.name is not None:
            self.moves.append(Move(entry.name, origin, path, dest))
        elif entry.value is not None:
            self.fills.append(Fill(path, dest, entry.value))

    def _settle_rebound(self) -> None:
        """Replace the moves of targets that were given another storage by those that this storage holds at the end."""
        for path, tensor in self._targets.items():
            if storage_key(tensor) == self._first[path]:
                continue
            self.rebound.append(path)
            self.moves = [move for move in self.moves if move.target != path]
            self.fills = [fill for fill in self.fills if fill.target != path]
            self.tainted.pop(path, None)
            layout = self._layout[path]
            if tuple(tensor.shape) != layout.shape:
                self.tainted[path] = f"replaced by a tensor of shape {tuple(tensor.shape)}, was {layout.shape}"
                continue
            place = Region(0, layout.shape, layout.strides)
            for write, origin, held in self.read(tensor, place):
                self._record(path, entry_for(write, origin, held, tensor.dtype), origin, held)


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled under this mode, and torch would import its compiler, for seconds, to skip it."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        rewrite = REWRITES.get(func)
        if rewrite is not None:
            with self:
                return rewrite(*args, **(kwargs or {}))
        return (HANDLERS.get(func) or default_handler(func))(self.recorder, func, args, kwargs or {})
