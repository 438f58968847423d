"""Block-scaled fp8: weights of one byte with a float32 scale per block, `weight` and `weight_scale_inv` in checkpoints.

`quantise` turns the layers of a built model into the fp8 layers that the checkpoint's `quantization_config` describes.
Values are `weight[i, j] * weight_scale_inv[i // rows, j // columns]`; products are computed in the engine's own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bridge.errors import ConfigError
from engine_side.embedded.layers import LinearBase
from engine_side.embedded.layouts import Block
from engine_side.embedded.moe import FusedMoE
from engine_side.embedded.weights import Cut, sharded_parameter

if TYPE_CHECKING:
    from engine_side.embedded.decoder import CausalLM

STORAGE = torch.float8_e4m3fn


def read_block(raw: Mapping[str, Any]) -> Block:
    """Read the block of one scale from a `quantization_config`. Raises ConfigError for another method, scales that are
    not per block, or activations with a fixed scale."""
    size: Any = raw.get("weight_block_size")
    whole = isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    scheme = raw.get("activation_scheme") or "dynamic"
    for name, fits, expected in (
        ("quant_method", raw.get("quant_method") == "fp8", "fp8"),
        ("weight_block_size", whole, "[rows, columns]"),
        ("activation_scheme", scheme == "dynamic", "dynamic"),
    ):
        if not fits:
            raise ConfigError(
                "unsupported quantisation",
                where=f"config.json: quantization_config.{name}",
                expected=expected,
                got=repr(raw.get(name)),
                remedy="use a checkpoint in bf16, or in fp8 with a scale per block",
            )
    return size[0], size[1]


def keeps_all(plain: Sequence[str], path: str, parts: Sequence[str]) -> bool:
    """Tell if the layer at `path`, which holds these parts of checkpoints, stays unquantised. Raises ConfigError where
    only some parts do. An entry of `plain` names a module by its path, by the path of something above it, or by its
    path's last segments."""

    def keeps(module: str) -> bool:
        return any(f"{module}.".startswith(f"{entry}.") or f".{module}".endswith(f".{entry}") for entry in plain)

    kept = [part for part in parts if keeps(part)]
    if keeps(path) or len(kept) in (0, len(parts)):
        return keeps(path) or bool(kept)
    other = next(part for part in parts if part not in kept)
    raise ConfigError(
        "a fused layer cannot be quantised in part",
        where=path,
        expected="all of its parts in modules_to_not_convert, or none",
        got=f"{kept[0]} there, {other} not",
        remedy="quantise the checkpoint with all parts of a fused layer alike",
    )


def quantise(model: CausalLM, raw: Mapping[str, Any] | None) -> None:
    """Give the layers that the config quantises their fp8 parameters. Called once, while the model is built.

    Raises ConfigError for blocks that a fused or sharded layer would cut through, and for a fused layer of which only
    some parts are quantised.
    """
    if raw is None:
        return
    block, plain = read_block(raw), [str(name) for name in raw.get("modules_to_not_convert") or ()]
    for path, module in model.named_modules():
        if isinstance(module, LinearBase) and module.quantizable:
            names, parts = ["weight"], model.parts_of(path)
            cuts = [(outputs, module.input_cut) for outputs in module.output_cuts.values()]
        elif isinstance(module, FusedMoE):
            names, cuts = ["w13_weight", "w2_weight"], list(module.cuts.values())
            parts = [f"{path}.{i}.{part}" for i in range(module.num_experts) for part in model.experts]
        else:
            continue
        if not keeps_all(plain, path, parts):
            _require_aligned(path, cuts, block)
            for name in names:
                _replace_weight(module, name, block)
            module.quant_method.block = block


def _require_aligned(path: str, matrices: Sequence[tuple[Cut, Cut]], block: Block) -> None:
    for cuts in matrices:
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


def _replace_weight(layer: LinearBase | FusedMoE, name: str, block: Block) -> None:
    """Put codes of the same shape, and a scale per block, in place of a layer's weight (or its experts')."""
    *lead, rows, columns = getattr(layer, name).shape
    scales = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    codes = sharded_parameter((*lead, rows, columns), STORAGE, layer.weight_loader, layer.tp)
    layer.register_parameter(name, codes)
    layer.register_parameter(
        f"{name}_scale_inv",
        sharded_parameter(scales, torch.float32, layer.weight_loader, layer.tp, block_shape=block),
    )
