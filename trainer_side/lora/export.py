"""Yield the tensors of each mode under canonical names, one at a time: for people, tests and their own exports."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from trainer_side.lora.model import LoraModel
from trainer_side.names.tensor_layout import Collected, WeightSource


def merged_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield canonical (name, tensor) of the weights that the live forward computes with, in the base's dtypes.

    A tie is yielded once, under the name that stands for it. One tensor is computed at a time; some share memory with
    the live model: do not write to them. Raises as `LoraModel.choose` and `view`, before the first tensor.
    """
    return _tensors(model, "merged")


def base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield canonical (name, tensor) of the base model, without its adapters. As `merged_tensors` otherwise."""
    return _tensors(model, "base")


def adapter_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the acting adapters as one, in portable form: names of `lora_format`, the scaling folded into B, one rank.

    Raises as `merged_tensors`.
    """
    return _tensors(model, "adapter")


def _tensors(model: nn.Module, mode: str) -> Iterator[tuple[str, torch.Tensor]]:
    lora = LoraModel(model)
    lora.choose(mode, None)
    view = lora.view(mode, lora.tensors())
    source = WeightSource(None if view.known is None else model, view.known)
    return _assembled(source.collect(view.named, computed=view.computed))


@torch.no_grad()
def _assembled(collected: Collected) -> Iterator[tuple[str, torch.Tensor]]:
    held: dict[int, torch.Tensor] = {}
    for info, parts in zip(collected.layout.tensors, collected.layout.parts, strict=True):
        # Experts are cut out of one live tensor: it is computed once for all of them.
        held = {p.index: held[p.index] if p.index in held else _value(collected, p.index) for p in parts}
        out = held[parts[0].index]
        if parts[0].source is not None:
            out = torch.empty(info.shape, dtype=out.dtype, device=out.device)
        for part in parts:
            source, into = part.source, part.dest
            if source is not None and into is not None:
                taken = held[part.index].contiguous().view(-1)
                taken = taken.as_strided(source.shape, source.strides, taken.storage_offset() + source.offset)
                out.view(-1).as_strided(into.shape, into.strides, into.offset).copy_(taken)
        yield info.name, out


def _value(collected: Collected, index: int) -> torch.Tensor:
    source, computed = collected.sources[index], collected.computed.get(index)
    return source.detach() if computed is None else computed.compute(source.dtype).to(source.dtype)
