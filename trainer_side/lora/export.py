"""Yield the tensors of each mode under canonical names, one at a time: for people, tests and their own exports."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from bridge.model.regions import dense
from trainer_side.lora.model import LoraModel
from trainer_side.names.naming import CanonicalTensor
from trainer_side.names.tensor_layout import Computed


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
    if view.known is None:
        return ((one.name, _value(one)) for one in view.computed)
    ties = view.known.ties
    named = {ties.get(name, name): tensor.detach() for name, tensor in reversed(view.named)}
    computed = {ties.get(one.name, one.name): one for one in reversed(view.computed)}
    return _assembled(view.known.tensors, named, computed)


@torch.no_grad()
def _assembled(
    tensors: tuple[CanonicalTensor, ...], named: dict[str, torch.Tensor], computed: dict[str, Computed]
) -> Iterator[tuple[str, torch.Tensor]]:
    held: tuple[str, torch.Tensor] | None = None
    for tensor in tensors:
        parts: dict[str, torch.Tensor] = {}
        for live in {piece.live for piece in tensor.pieces}:
            if live in computed:
                # Experts are cut out of one live tensor: it is computed once for all of them.
                held = held if held is not None and held[0] == live else (live, _value(computed[live]))
                parts[live] = held[1]
            else:
                parts[live] = named[live]
        first, whole = next(iter(parts.values())), dense(tensor.shape)
        if tuple(first.shape) == tensor.shape and [(p.source, p.dest) for p in tensor.pieces] == [(whole, whole)]:
            yield tensor.name, first
            continue
        out = torch.empty(tensor.shape, dtype=first.dtype, device=first.device)
        for piece in tensor.pieces:
            source, into = piece.source, piece.dest
            taken = parts[piece.live].contiguous().view(-1)
            taken = taken.as_strided(source.shape, source.strides, taken.storage_offset() + source.offset)
            out.view(-1).as_strided(into.shape, into.strides, into.offset).copy_(taken)
        yield tensor.name, out


@torch.no_grad()
def _value(one: Computed) -> torch.Tensor:
    return one.compute(one.stand_in.dtype).to(one.stand_in.dtype)
