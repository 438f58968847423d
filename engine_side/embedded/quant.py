"""Block-scaled fp8: weights of one byte with a float32 scale per block, `weight` and `weight_scale_inv` in checkpoints.

`quantise` turns the layers of a built model into what the checkpoint's `quantization_config` says they are. Values are
`weight[i, j] * weight_scale_inv[i // rows, j // columns]`; the products are computed in the engine's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from bridge.errors import ConfigError
from engine_side.embedded.layers import LinearBase
from engine_side.embedded.layouts import (
    Layout,
    LinearMethod,
    UnquantizedFusedMoEMethod,
    packed_linear,
    shuffle,
    swap_last,
    unshuffle,
)
from engine_side.embedded.moe import FusedMoE
from engine_side.embedded.weights import Cut, Loader, parameter

if TYPE_CHECKING:
    from engine_side.embedded.decoder import CausalLM

Block = tuple[int, int]
STORAGE = torch.float8_e4m3fn
_WHERE = "config.json: quantization_config"


@dataclass(frozen=True)
class BlockQuant:
    """What `quantization_config` says: the block of one scale, and the modules that stay as they are."""

    block: Block
    plain: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> BlockQuant:
        """Raises ConfigError for another method, scales that are not per block, or activations with a fixed scale."""
        method, size = raw.get("quant_method"), raw.get("weight_block_size")
        if method != "fp8":
            raise ConfigError(
                "unsupported quantisation", where=f"{_WHERE}.quant_method", expected="fp8", got=repr(method)
            )
        if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            where = f"{_WHERE}.weight_block_size"
            raise ConfigError(
                "fp8 needs a block of rows and columns", where=where, expected="[rows, columns]", got=repr(size)
            )
        scheme = raw.get("activation_scheme", "dynamic")
        if scheme not in (None, "dynamic"):
            where = f"{_WHERE}.activation_scheme"
            raise ConfigError("unsupported quantisation", where=where, expected="dynamic", got=repr(scheme))
        plain = tuple(tuple(str(name).split(".")) for name in raw.get("modules_to_not_convert") or ())
        return cls((size[0], size[1]), plain)

    def keeps(self, module: str) -> bool:
        """Does the module at this path stay unquantised? An entry names it by its path, by the path of something above
        it, or by the last segments of its path."""
        path = tuple(module.split("."))
        return any(path[: len(e)] == e or path[-len(e) :] == e for e in self.plain)


def quantise(model: CausalLM, raw: Mapping[str, Any] | None, layout: Layout) -> None:
    """Give the layers that the config quantises their fp8 parameters. Called once, while the model is built.

    Raises ConfigError for blocks that a fused or sharded layer would cut through, and for a fused layer of which only
    some parts are quantised.
    """
    if raw is None:
        return
    quant = BlockQuant.of(raw)
    for path, module in model.named_modules():
        if isinstance(module, LinearBase) and module.quantizable:
            if not _kept(path, model.parts_of(path), quant):
                _quantise_linear(path, module, quant.block, _METHODS[layout.name])
        elif isinstance(module, FusedMoE):
            parts = [f"{path}.{i}.{part}" for i in range(module.num_experts) for part in model.experts]
            if not _kept(path, parts, quant):
                _quantise_experts(path, module, quant.block)


def _kept(path: str, parts: Sequence[str], quant: BlockQuant) -> bool:
    if quant.keeps(path):
        return True
    plain = [part for part in parts if quant.keeps(part)]
    if plain and len(plain) < len(parts):
        other = next(part for part in parts if part not in plain)
        raise ConfigError(
            "a fused layer cannot be quantised in part",
            where=path,
            expected="all of its parts in modules_to_not_convert, or none",
            got=f"{plain[0]} there, {other} not",
        )
    return bool(plain)


def _quantise_linear(path: str, layer: LinearBase, block: Block, method: Callable[[Block], LinearMethod]) -> None:
    for shard_id in layer.shard_ids:
        _check(path, (layer.output_cut(shard_id), layer.input_cut()), block)
    rows, columns = layer.output_size_per_partition, layer.input_size_per_partition
    layer.weight, layer.weight_scale_inv = _pair(
        rows, columns, block, layer.weight_loader, layer.tp.rank, layer.tp.size
    )
    layer.quant_method = method(block)


def _quantise_experts(path: str, layer: FusedMoE, block: Block) -> None:
    for cuts in layer.cuts.values():
        _check(path, cuts, block)
    number, hidden, size = layer.num_experts, layer.hidden_size, layer.intermediate_size_per_partition
    for name, rows, columns in (("w13_weight", 2 * size, hidden), ("w2_weight", hidden, size)):
        made = _pair(rows, columns, block, layer.weight_loader, layer.tp.rank, layer.tp.size, number)
        layer.register_parameter(name, made[0])
        layer.register_parameter(f"{name}_scale_inv", made[1])
    layer.quant_method = Fp8FusedMoEMethod(block)


def _check(path: str, cuts: tuple[Cut, Cut], block: Block) -> None:
    for cut, size, what in zip(cuts, block, ("rows", "columns")):
        if not cut.aligned(size):
            raise ConfigError(
                "a block of scales would be cut through",
                where=path,
                expected=f"parts that begin and end at multiples of {size} {what}",
                got=f"{what} {cut.start} to {cut.start + cut.size} of {cut.whole}, at {cut.offset} here",
                remedy="choose another tensor_parallel_size, or list the module in modules_to_not_convert",
                names=(path,),
            )


def _pair(
    rows: int, columns: int, block: Block, loader: Loader, rank: int, size: int, *lead: int
) -> tuple[nn.Parameter, nn.Parameter]:
    """(weight, scales) of one matrix, or of `lead` of them."""
    marks = {"input_dim": len(lead) + 1, "output_dim": len(lead), "tp_rank": rank, "tp_size": size}
    scales = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    return (
        parameter((*lead, rows, columns), STORAGE, loader, **marks),
        parameter(scales, torch.float32, loader, block_shape=block, **marks),
    )


def dequantise(weight: torch.Tensor, scales: torch.Tensor, block: Block, dtype: torch.dtype) -> torch.Tensor:
    """Codes [rows, columns] and their scales -> values in `dtype`, rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    rows, columns = weight.shape
    spread = scales.to(wide).repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (weight.to(wide) * spread).to(dtype)


class Fp8LinearMethod:
    """Codes and scales as in the checkpoint."""

    def __init__(self, block: Block) -> None:
        self.block = block

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing."""

    def codes(self, layer: Any) -> torch.Tensor:
        """The weight's codes [outputs, inputs], whatever post-load made of them."""
        codes: torch.Tensor = layer.weight
        return codes

    def values(self, layer: Any) -> torch.Tensor:
        """The weight [outputs, inputs] in the dtype of the layer's products."""
        return dequantise(self.codes(layer), layer.weight_scale_inv, self.block, layer.params_dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, self.values(layer), bias)


class TransposedFp8LinearMethod(Fp8LinearMethod):
    """The codes are turned, the scales stay."""

    def process_weights_after_loading(self, layer: Any) -> None:
        swap_last(layer.weight)

    def codes(self, layer: Any) -> torch.Tensor:
        codes: torch.Tensor = layer.weight.t()
        return codes


class ShuffledFp8LinearMethod(Fp8LinearMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight.data.copy_(shuffle(layer.weight.data))

    def codes(self, layer: Any) -> torch.Tensor:
        return unshuffle(layer.weight)


class PackedFp8LinearMethod(Fp8LinearMethod):
    """Dequantised once, into a closure; of codes and scales nothing is left."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.cpu_linear = packed_linear(self.values(layer), layer.bias)
        for name in ("weight", "weight_scale_inv"):
            empty = torch.empty(0, dtype=getattr(layer, name).dtype, device=getattr(layer, name).device)
            setattr(layer, name, nn.Parameter(empty, requires_grad=False))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = layer.cpu_linear(x, bias)
        return out


class Fp8FusedMoEMethod(UnquantizedFusedMoEMethod):
    """Codes and scales as in the checkpoint, in every layout; an expert is dequantised when it is used."""

    def __init__(self, block: Block) -> None:
        self.block = block

    def expert(self, layer: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = layer.params_dtype
        return (
            dequantise(layer.w13_weight[index], layer.w13_weight_scale_inv[index], self.block, dtype),
            dequantise(layer.w2_weight[index], layer.w2_weight_scale_inv[index], self.block, dtype),
        )


_METHODS: Mapping[str, Callable[[Block], LinearMethod]] = {
    "canonical": Fp8LinearMethod,
    "transposed": TransposedFp8LinearMethod,
    "shuffled": ShuffledFp8LinearMethod,
    "packed": PackedFp8LinearMethod,
}
"""Name of a layout -> how fp8 linear layers are kept in it."""
