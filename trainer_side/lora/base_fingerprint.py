"""Fingerprint the base weights under LoRA, cheaply enough for every push.

A LoRA goes over a base that was compared once with the engines', bit for bit. What moves it afterwards: a merge and
unmerge (in bf16, fp16 and fp32 it never gives the old bits back), another model's weights copied in, a layer or
Parameter exchanged. PEFT writes through `.data`, which torch's version counters do not see, so a few elements of every
base tensor are kept as well: a merge changes most elements of a weight, and any fine-tuning step nearly all.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch

from bridge.errors import BridgeError
from trainer_side.names.tensor_checks import require_plain

SAMPLES = 32
"""Elements of each tensor that are read, spread evenly over it."""


@torch.no_grad()
def base_fingerprint(named: Iterable[tuple[str, torch.Tensor]]) -> Hashable:
    """Return a key that stays equal as long as names, addresses, shapes, dtypes and the sampled elements do.

    Some ten microseconds per tensor. A tensor without values here (offloaded, sharded) counts by name, shape and dtype.
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
            some = flat.reshape(-1)[:: max(1, flat.numel() // SAMPLES)]
            samples.setdefault((flat.dtype, flat.device), []).append(some)
    words = tuple(torch.cat(parts).cpu().contiguous().view(torch.uint8).numpy().tobytes() for parts in samples.values())
    return tuple(seen), words
