"""Post-load layouts: how `process_weights_after_loading` stores a weight, and how `apply` reads it afterwards.

Every layer owns one method object. Post-load is the engine's step after loading. It is not idempotent: a second call on
a shuffled or transposed layer shuffles again, as in vLLM and SGLang.

    canonical    as in the checkpoint
    transposed   the same Parameter holds its transpose, input_dim and output_dim change places (storage moves)
    shuffled     tiles are reordered inside the same storage, loader and attributes stay
    packed       linear weights vanish into a closure `layer.cpu_linear`, leaving an empty Parameter without a loader;
                 heads keep their weight but read a packed copy; experts are packed once, behind a latch

Block-scaled fp8 layers (see `quant`) follow the same layouts: the codes are stored so, their scales stay canonical, and
a packed layer is dequantised once. Fp8 experts stay as in the checkpoint in every layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from engine_side.embedded.weights import set_attributes

Block = tuple[int, int]
"""Rows and columns of a weight that share one scale."""


def tile_of(rows: int, columns: int) -> tuple[int, int]:
    """Return the largest square tile that divides a matrix; (1, 1), where none does, leaves the matrix as it is."""
    return next(((t, t) for t in (16, 8, 4) if rows % t == 0 and columns % t == 0), (1, 1))


def shuffle(weight: torch.Tensor) -> torch.Tensor:
    """Lay the tiles of the last two dimensions out one after the other; same shape, new storage."""
    rows, columns = weight.shape[-2:]
    r, c = tile_of(rows, columns)
    tiles = weight.view(*weight.shape[:-2], rows // r, r, columns // c, c)
    return tiles.transpose(-3, -2).contiguous().view(weight.shape)


def unshuffle(weight: torch.Tensor) -> torch.Tensor:
    """Invert `shuffle`."""
    rows, columns = weight.shape[-2:]
    r, c = tile_of(rows, columns)
    tiles = weight.view(*weight.shape[:-2], rows // r, columns // c, r, c)
    return tiles.transpose(-3, -2).contiguous().view(weight.shape)


def dequantise(weight: torch.Tensor, scales: torch.Tensor, block: Block, dtype: torch.dtype) -> torch.Tensor:
    """Multiply codes [rows, columns] by the scales of their blocks; the values in `dtype`, rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    rows, columns = weight.shape
    spread = scales.to(wide).repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (weight.to(wide) * spread).to(dtype)


def packed_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    """Return a function (x, bias) over private copies of weight and bias; the bias is held in float32."""
    packed = weight.detach().t().contiguous()
    held = None if bias is None else bias.detach().to(torch.float32, copy=True)

    def cpu_linear(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = torch.matmul(x, packed)
        return out if bias is None or held is None else (out.float() + held).to(x.dtype)

    return cpu_linear


class CanonicalStorage:
    """Stores the last two dimensions [outputs, inputs] of a weight as the checkpoint has them."""

    def store(self, param: nn.Parameter) -> None:
        """Bring a loaded, canonical Parameter into this storage, in place. Called once, by post-load."""

    def read(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the canonical form of a stored weight, or of some of its leading entries."""
        return stored


class TransposedStorage(CanonicalStorage):
    """Stores the transpose under the same Parameter, in new memory; `input_dim` and `output_dim` change places."""

    def store(self, param: nn.Parameter) -> None:
        param.data = param.data.transpose(-1, -2).contiguous()
        inputs, outputs = getattr(param, "input_dim", None), getattr(param, "output_dim", None)
        set_attributes(param, input_dim=outputs, output_dim=inputs)

    def read(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.transpose(-1, -2)


class ShuffledStorage(CanonicalStorage):
    """Stores tiles one after the other in the same memory."""

    def store(self, param: nn.Parameter) -> None:
        param.data.copy_(shuffle(param.data))

    def read(self, stored: torch.Tensor) -> torch.Tensor:
        return unshuffle(stored)


class PackedExpertStorage(CanonicalStorage):
    """Stores the [N, K] of an expert in the order of [K, N], under the same shape. `PackedFusedMoEMethod` stores."""

    def read(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.view(stored.shape[::-1]).t()


class LinearMethod:
    """Stores and applies the weight of a linear layer or an embedding.

    Attributes:
        block: of a scale, where the weight is fp8 codes; the layer's `weight_scale_inv` stays canonical.
    """

    def __init__(self, storage: CanonicalStorage) -> None:
        self.storage = storage
        self.block: Block | None = None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Run the post-load step of this one layer. Called by the engine once, after all weights were loaded."""
        self.storage.store(layer.weight)

    def values(self, layer: Any) -> torch.Tensor:
        """Return the layer's weight [outputs, inputs] in the dtype of its products."""
        weight = self.storage.read(layer.weight)
        if self.block is None:
            return weight
        return dequantise(weight, layer.weight_scale_inv, self.block, layer.params_dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute [n, inputs] -> [n, outputs], without collectives."""
        return functional.linear(x, self.values(layer), bias)


class PackedLinearMethod(LinearMethod):
    """Packs weight and bias into a closure; empty Parameters without a loader are left, of fp8 codes and scales too."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.cpu_linear = packed_linear(self.values(layer), layer.bias)
        for name in ("weight",) if self.block is None else ("weight", "weight_scale_inv"):
            held = getattr(layer, name)
            empty = torch.empty(0, dtype=held.dtype, device=held.device)
            setattr(layer, name, nn.Parameter(empty, requires_grad=False))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = layer.cpu_linear(x, bias)
        return out


class PackedHeadMethod(PackedLinearMethod):
    """Packs a copy of the weight, which stays where it is, tied or not, but is read no more."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.cpu_linear = packed_linear(layer.weight, None)


class FusedMoEMethod:
    """Stores and applies the experts of a FusedMoE layer: w13 [E, 2I, H], w2 [E, H, I] in canonical storage.

    Attributes:
        block: of a scale, where the weights are fp8 codes: they then stay as in the checkpoint, and an expert is
            dequantised when it is used.
    """

    def __init__(self, storage: CanonicalStorage) -> None:
        self.storage = storage
        self.block: Block | None = None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Run the post-load step of this one layer. Called by the engine once, after all weights were loaded."""
        if self.block is None:
            self.storage.store(layer.w13_weight)
            self.storage.store(layer.w2_weight)

    def values(self, layer: Any, name: str, index: int) -> torch.Tensor:
        """Return one of an expert's weights, [2I, H] or [H, I], in the dtype of its products."""
        weight: torch.Tensor = getattr(layer, name)[index]
        if self.block is None:
            return self.storage.read(weight)
        return dequantise(weight, getattr(layer, f"{name}_scale_inv")[index], self.block, layer.params_dtype)

    def apply(self, layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Compute [n, hidden], routing weights and expert ids [n, k] -> [n, hidden], without collectives."""
        out = torch.zeros_like(x)
        for index in sorted(set(ids.flatten().tolist())):
            rows, slot = torch.where(ids == index)
            routed, lora = x[rows], layer.lora
            both = functional.linear(routed, self.values(layer, "w13_weight", index))
            if lora is not None:
                lora("w1", index, both, routed, rows)
                lora("w3", index, both, routed, rows)
            gate, up = both.chunk(2, dim=-1)
            inner = layer.act(gate) * up
            y = functional.linear(inner, self.values(layer, "w2_weight", index))
            if lora is not None:
                lora("w2", index, y, inner, rows)
            y = y * weights[rows, slot].unsqueeze(-1)
            out.index_add_(0, rows, y.to(out.dtype))
        return out


class PackedFusedMoEMethod(FusedMoEMethod):
    """Packs once and never again: weights loaded later lie unpacked in packed storage."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.block is not None or isinstance(self.storage, PackedExpertStorage):
            return
        for name in ("w13_weight", "w2_weight"):
            held = getattr(layer, name)
            # As vLLM's replace_parameter: a new Parameter, the loader kept, every other attribute lost.
            packed = held.data.transpose(1, 2).contiguous().view(held.shape)
            setattr(layer, name, nn.Parameter(packed, requires_grad=False))
            set_attributes(getattr(layer, name), weight_loader=held.weight_loader)
        self.storage = PackedExpertStorage()


@dataclass(frozen=True)
class PostLoadLayout:
    """The storage and the method classes of one engine; every layer makes a method object of its own."""

    storage: CanonicalStorage
    linear: type[LinearMethod] = LinearMethod
    head: type[LinearMethod] = LinearMethod
    experts: type[FusedMoEMethod] = FusedMoEMethod


POST_LOAD_LAYOUTS = {
    "canonical": PostLoadLayout(CanonicalStorage()),
    "transposed": PostLoadLayout(TransposedStorage()),
    "shuffled": PostLoadLayout(ShuffledStorage()),
    "packed": PostLoadLayout(CanonicalStorage(), PackedLinearMethod, PackedHeadMethod, PackedFusedMoEMethod),
}
"""Name of a layout, as `EngineConfig` checks it -> the layout."""
