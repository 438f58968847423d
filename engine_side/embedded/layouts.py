"""Post-load layouts: what `process_weights_after_loading` makes of a weight, and how `apply` then reads it.

Every layer owns one method object. Post-load is the engine's step after loading; it is not idempotent: a second call on
a shuffled or transposed layer shuffles again, as in the engines this one stands for.

    canonical    as in the checkpoint
    transposed   the same Parameter holds its transpose, input_dim and output_dim change places (storage moves)
    shuffled     tiles are reordered inside the same storage, loader and attributes stay
    packed       linear weights vanish into a closure `layer.cpu_linear`, what is left is an empty Parameter without a
                 loader; heads keep their weight but read a packed copy; experts are packed once, behind a latch
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from engine_side.embedded.weights import set_attributes


class LinearMethod(Protocol):
    """What a linear layer, an embedding or a head owns."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """The post-load step of this one layer. Called by the engine once, after all weights were loaded."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[n, inputs] -> [n, outputs], without collectives."""
        ...


class ExpertsMethod(Protocol):
    """What a FusedMoE layer owns."""

    def process_weights_after_loading(self, layer: Any) -> None: ...

    def apply(self, layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[n, hidden], routing weights and expert ids [n, k] -> [n, hidden], without collectives."""
        ...


def swap_last(param: nn.Parameter) -> None:
    """Store the transpose of the last two dimensions under the same Parameter, and let its attributes follow."""
    param.data = param.data.transpose(-1, -2).contiguous()
    inputs, outputs = getattr(param, "input_dim", None), getattr(param, "output_dim", None)
    set_attributes(param, input_dim=outputs, output_dim=inputs)


def tile_of(rows: int, columns: int) -> tuple[int, int]:
    """The largest square tile that divides a matrix; (1, 1), where none does, leaves it as it is."""
    return next(((t, t) for t in (16, 8, 4) if rows % t == 0 and columns % t == 0), (1, 1))


def shuffle(weight: torch.Tensor) -> torch.Tensor:
    """Tiles of the last two dimensions laid out one after the other; same shape, new storage."""
    rows, columns = weight.shape[-2:]
    r, c = tile_of(rows, columns)
    tiles = weight.view(*weight.shape[:-2], rows // r, r, columns // c, c)
    return tiles.transpose(-3, -2).contiguous().view(weight.shape)


def unshuffle(weight: torch.Tensor) -> torch.Tensor:
    """The inverse of `shuffle`."""
    rows, columns = weight.shape[-2:]
    r, c = tile_of(rows, columns)
    tiles = weight.view(*weight.shape[:-2], rows // r, columns // c, r, c)
    return tiles.transpose(-3, -2).contiguous().view(weight.shape)


def packed_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    """A function (x, bias) over private copies of weight and bias; the bias is held in float32."""
    packed = weight.detach().t().contiguous()
    held = None if bias is None else bias.detach().to(torch.float32, copy=True)

    def cpu_linear(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = torch.matmul(x, packed)
        return out if bias is None or held is None else (out.float() + held).to(x.dtype)

    return cpu_linear


class UnquantizedLinearMethod:
    """Canonical: nothing to do."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, layer.weight, bias)


class TransposedLinearMethod(UnquantizedLinearMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        swap_last(layer.weight)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, layer.weight.t(), bias)


class ShuffledLinearMethod(UnquantizedLinearMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight.data.copy_(shuffle(layer.weight.data))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, unshuffle(layer.weight), bias)


class PackedLinearMethod(UnquantizedLinearMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        layer.cpu_linear = packed_linear(layer.weight, layer.bias)
        layer.weight = nn.Parameter(torch.empty(0, dtype=layer.weight.dtype), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = layer.cpu_linear(x, bias)
        return out


class TransposedHeadMethod(TransposedLinearMethod):
    """A tied head is left alone: its Parameter is the embedding's."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if not layer.tied:
            super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, layer.weight if layer.tied else layer.weight.t(), bias)


class ShuffledHeadMethod(ShuffledLinearMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        if not layer.tied:
            super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, layer.weight if layer.tied else unshuffle(layer.weight), bias)


class PackedHeadMethod(PackedLinearMethod):
    """The weight stays where it is, tied or not, but nobody reads it any more."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.cpu_linear = packed_linear(layer.weight, None)


class UnquantizedFusedMoEMethod:
    """Canonical experts: w13 [E, 2I, H], w2 [E, H, I]."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing."""

    def expert(self, layer: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Canonical [2I, H] and [H, I] of one expert."""
        return layer.w13_weight[index], layer.w2_weight[index]

    def apply(self, layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for index in sorted(set(ids.flatten().tolist())):
            rows, slot = torch.where(ids == index)
            w13, w2 = self.expert(layer, index)
            routed, deltas = x[rows], layer.deltas
            both = functional.linear(routed, w13)
            if deltas is not None:
                both = deltas.gate_up(both, routed, rows, index)
            gate, up = both.chunk(2, dim=-1)
            inner = layer.act(gate) * up
            y = functional.linear(inner, w2)
            if deltas is not None:
                y = deltas.down(y, inner, rows, index)
            y = y * weights[rows, slot].unsqueeze(-1)
            out.index_add_(0, rows, y.to(out.dtype))
        return out


class TransposedFusedMoEMethod(UnquantizedFusedMoEMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        swap_last(layer.w13_weight)
        swap_last(layer.w2_weight)

    def expert(self, layer: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.w13_weight[index].t(), layer.w2_weight[index].t()


class ShuffledFusedMoEMethod(UnquantizedFusedMoEMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        for weight in (layer.w13_weight, layer.w2_weight):
            weight.data.copy_(shuffle(weight.data))

    def expert(self, layer: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return unshuffle(layer.w13_weight[index]), unshuffle(layer.w2_weight[index])


class PackedFusedMoEMethod(UnquantizedFusedMoEMethod):
    """Packs when the kernel is first built and never again: weights loaded later lie unpacked in packed storage."""

    def __init__(self) -> None:
        self.moe_kernel: Callable[[torch.Tensor, int], torch.Tensor] | None = None

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.moe_kernel is not None:
            return
        for name in ("w13_weight", "w2_weight"):
            self._replace(layer, name, _pack_experts(getattr(layer, name).data))
        self.moe_kernel = _unpack_expert

    def _replace(self, layer: Any, name: str, value: torch.Tensor) -> None:
        """As vLLM's replace_parameter: a new Parameter, the loader kept, every other attribute lost."""
        param = nn.Parameter(value, requires_grad=False)
        setattr(layer, name, set_attributes(param, weight_loader=getattr(layer, name).weight_loader))

    def expert(self, layer: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.moe_kernel is None:
            return super().expert(layer, index)
        return self.moe_kernel(layer.w13_weight, index), self.moe_kernel(layer.w2_weight, index)


def _pack_experts(weight: torch.Tensor) -> torch.Tensor:
    """[E, N, K] in the order of [E, K, N], under the same shape."""
    return weight.transpose(1, 2).contiguous().view(weight.shape)


def _unpack_expert(weight: torch.Tensor, index: int) -> torch.Tensor:
    _, rows, columns = weight.shape
    return weight[index].view(columns, rows).t()


@dataclass(frozen=True)
class Layout:
    """Which method classes the layers of one engine are given; each layer makes its own object."""

    linear: Callable[[], LinearMethod]
    embedding: Callable[[], LinearMethod]
    head: Callable[[], LinearMethod]
    experts: Callable[[], ExpertsMethod]
    name: str


_LAYOUTS = {
    "canonical": Layout(
        UnquantizedLinearMethod,
        UnquantizedLinearMethod,
        UnquantizedLinearMethod,
        UnquantizedFusedMoEMethod,
        "canonical",
    ),
    "transposed": Layout(
        TransposedLinearMethod, UnquantizedLinearMethod, TransposedHeadMethod, TransposedFusedMoEMethod, "transposed"
    ),
    "shuffled": Layout(
        ShuffledLinearMethod, UnquantizedLinearMethod, ShuffledHeadMethod, ShuffledFusedMoEMethod, "shuffled"
    ),
    "packed": Layout(PackedLinearMethod, UnquantizedLinearMethod, PackedHeadMethod, PackedFusedMoEMethod, "packed"),
}


def layout_of(name: str) -> Layout:
    """The layout of a name that `EngineConfig` has checked."""
    return _LAYOUTS[name]
