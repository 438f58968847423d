"""Is the base still the one that the engines were compared with? A fingerprint that is cheap enough for every push.

Adapters go over a base that was proven once, bit for bit. What moves it afterwards: a merge and unmerge (which never
gives the old bits back, lora.md 4), another model's weights copied in, a layer or Parameter exchanged. PEFT writes
through `.data`, which torch's version counters do not see, so a few elements of every base tensor are kept as well: a
merge changes most elements of a weight, and any fine-tuning step nearly all.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch

from bridge.errors import BridgeError
from trainer_side.names.tensor_checks import require_plain

SAMPLES = 32
"""Elements of each tensor that are looked at, spread evenly over it."""


@torch.no_grad()
def base_mark(named: Iterable[tuple[str, torch.Tensor]]) -> Hashable:
    """Equal as long as names, places, shapes, dtypes and the sampled elements of the base tensors are.

    Some ten microseconds per tensor. A tensor without values here (offloaded, sharded) counts by its place alone.
    """
    seen: list[Hashable] = []
    samples: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for name, tensor in named:
        try:
            flat = require_plain(name, tensor).detach()
        except BridgeError:
            seen.append((name, tuple(tensor.shape), tensor.dtype))
            continue
        seen.append((name, flat.data_ptr(), tuple(flat.shape), flat.stride(), flat.dtype))
        if flat.numel():
            samples.setdefault((flat.dtype, flat.device), []).append(_some(flat))
    words = tuple(torch.cat(parts).cpu().contiguous().view(torch.uint8).numpy().tobytes() for parts in samples.values())
    return tuple(seen), words


def _some(tensor: torch.Tensor) -> torch.Tensor:
    """About SAMPLES elements, spread evenly: a view where the elements lie in order."""
    return tensor.reshape(-1)[:: max(1, tensor.numel() // SAMPLES)]
