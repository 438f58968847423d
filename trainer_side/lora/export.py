"""The tensors of each mode for people: canonical names and values, one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from trainer_side.lora.model import LoraModel, ModeView
from trainer_side.names.naming import CanonicalTensor
from trainer_side.names.tensor_layout import Computed


def merged_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical (name, tensor) of the effective weights: what the live forward computes with, in the base's dtypes.

    A tie is yielded once, under the name that stands for it. One tensor is computed at a time; some share memory with
    the live model: do not write to them. Errors as of `LoraModel.choose` and `view`, before the first tensor.
    """
    return _tensors(model, "merged")


def base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical (name, tensor) of the base model, without its adapters. As `merged_tensors` otherwise."""
    return _tensors(model, "base")


def adapter_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The acting adapters as one, in portable form: names of `lora_format`, the scaling folded into B, one rank.

    Errors as of `merged_tensors`.
    """
    return _tensors(model, "adapter")


def _tensors(model: nn.Module, mode: str) -> Iterator[tuple[str, torch.Tensor]]:
    lora = LoraModel(model)
    lora.choose(mode, None)
    return _stream(lora.view(mode, lora.tensors()))


@torch.no_grad()
def _stream(view: ModeView) -> Iterator[tuple[str, torch.Tensor]]:
    if view.known is None:
        for one in view.computed:
            yield one.name, one.compute(one.stand_in.dtype).to(one.stand_in.dtype)
        return
    named = {view.known.ties.get(name, name): tensor.detach() for name, tensor in reversed(view.named)}
    computed = {view.known.ties.get(one.name, one.name): one for one in reversed(view.computed)}
    held: tuple[str, torch.Tensor] | None = None
    for tensor in view.known.tensors:
        parts: dict[str, torch.Tensor] = {}
        for live in {piece.live for piece in tensor.pieces}:
            if live in computed:
                # Experts are cut out of one live tensor: it is computed once for all of them.
                held = held if held is not None and held[0] == live else (live, _value(computed[live]))
                parts[live] = held[1]
            else:
                parts[live] = named[live]
        yield tensor.name, _put_together(tensor, parts)


def _value(one: Computed) -> torch.Tensor:
    return one.compute(one.stand_in.dtype).to(one.stand_in.dtype)


def _put_together(tensor: CanonicalTensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    first = next(iter(parts.values()))
    if len(tensor.pieces) == 1 and tuple(first.shape) == tensor.shape and _whole(tensor):
        return first
    out = torch.empty(tensor.shape, dtype=first.dtype, device=first.device)
    for piece in tensor.pieces:
        source = parts[piece.live].contiguous().view(-1)
        taken = source.as_strided(
            piece.source.shape, piece.source.strides, source.storage_offset() + piece.source.offset
        )
        out.view(-1).as_strided(piece.dest.shape, piece.dest.strides, piece.dest.offset).copy_(taken)
    return out


def _whole(tensor: CanonicalTensor) -> bool:
    piece = tensor.pieces[0]
    return (
        piece.source == piece.dest
        and piece.source.offset == 0
        and piece.source.numel == torch.Size(tensor.shape).numel()
    )
