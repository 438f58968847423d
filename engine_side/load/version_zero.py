"""Version 0, an engine's own checkpoint: read back from the live model before the first load overwrites it.

Called while the live model still holds that version. Where weights are quantised, the codes that an engine was started
with are kept as they are, so that putting it back gives its own bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine_side.load.copies import CopyPair, batches, copy_all
from engine_side.load.live_pairs import moved_pairs
from engine_side.load.loader import Loader
from engine_side.load.sources import ArenaSlot


def read_back(loader: Loader, into: ArenaSlot, slot: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write the live weights into a writable slot (the tensors in manifest order), as version 0. Blocks.

    Returns (the tensors whose values the live model no longer holds in canonical form (packed, cast, computed), or
    holds in a dtype that the wire dtype cannot carry exactly; those that are quantised and were read from the
    engine's checkpoint instead). This rank writes only the regions it reads. Raises ConfigError when a module was
    replaced since the plan was made.

    Args:
        slot: the number of that slot.
    """
    loader.require_bound()
    pairs = _live_pairs(loader, into, slot)
    lost = _unreadable(loader, pairs)
    with torch.no_grad():
        copy_all(loader.pool, batches([pair.turned() for pair in pairs], loader.threads))
    stored = () if loader.codes is None else loader.codes.fill_originals(slot, lost)
    for name, values in () if loader.codes is None else loader.codes.original_values(slot):
        for move in (move for move in loader.baked.plan.moves if move.tensor == name):
            source, sent = move.source, into[loader.mapped.index[name]]
            made = values.as_strided(source.shape, source.strides, source.offset)
            sent.as_strided(source.shape, source.strides, sent.storage_offset() + source.offset).copy_(made)
    lost.difference_update(stored)
    return tuple(spec.name for spec in loader.mapped.manifest.tensors if spec.name in lost), stored


def keep_originals(loader: Loader, slot: int) -> None:
    """Take the codes of version 0, which `slot` holds the values of, from the live model that still serves it.

    Called before the first load, in an engine that another one's version 0 is compared with: each keeps its own.
    """
    if loader.codes is None or loader.codes.has_originals(slot):
        return
    pairs = _live_pairs(loader, loader.mapped.slots[slot], slot)
    own = {tensor.untyped_storage().data_ptr() for tensor in loader.codes.made[slot].values()}
    turned = [pair.turned() for pair in pairs if pair.sent.untyped_storage().data_ptr() in own]
    with torch.no_grad():
        copy_all(loader.pool, batches(turned, loader.threads))
    loader.codes.fill_originals(slot, _unreadable(loader, pairs))


def _live_pairs(loader: Loader, into: ArenaSlot, slot: int) -> list[CopyPair]:
    """Pair the live model with `into` and with the codes of `slot`, which become those of version 0."""
    mapped, extra = loader.mapped, len(loader.mapped.slots)
    mapped.slots.append(into)
    if loader.codes is not None:
        loader.codes.made.append(loader.codes.begin_originals(slot))
    try:
        return list(moved_pairs(loader.canonical, loader.decided.choices.values(), extra))
    finally:
        mapped.slots.pop()
        if loader.codes is not None:
            loader.codes.made.pop()


def _unreadable(loader: Loader, pairs: Sequence[CopyPair]) -> set[str]:
    """Find the announced tensors that these pairs with the live model do not show whole."""
    mapped, names = loader.mapped, [spec.name for spec in loader.mapped.manifest.tensors]
    lost: set[str] = {name for sources in loader.computed.sources.values() for name in sources}
    lost |= {names[p.tensor] for p in pairs if torch.promote_types(p.live.dtype, p.sent.dtype) != p.sent.dtype}
    covered = {(p.tensor, p.target) for p in pairs}
    moved = {(mapped.index[m.tensor], m.target) for m in loader.baked.plan.moves}
    return lost | {names[tensor] for tensor, _ in moved - covered}
