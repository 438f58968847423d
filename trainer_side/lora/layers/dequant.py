"""Dequantise a weight that is stored in another form than numbers: bitsandbytes, torchao, scaled fp8, HQQ-like layers.

Everything is computed out of place. A form that cannot be read here is refused, never sent as it lies there.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.utils.parametrize import is_parametrized

from bridge.errors import UnsupportedLora
from trainer_side.lora.layers.values import SentValues

FP8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz})
_SCALES = ("weight_scale_inv", "weight_scale")


def quant_state(base: Any, weight: torch.Tensor) -> Any:
    """Return the scale or state that is needed to read a packed weight; None for a plain one."""
    state = _first(getattr(weight, "quant_state", None), getattr(base, "quant_state", None))
    if state is not None:
        return state
    if weight.dtype == torch.int8:
        state = _first(getattr(weight, "SCB", None), getattr(getattr(base, "state", None), "SCB", None))
        if state is not None:
            return state
    if weight.dtype in FP8:
        return _first(*(getattr(base, name, None) for name in _SCALES))
    if _reads_itself(weight):
        return weight
    if is_parametrized(base, "weight"):
        return None  # computed anew each time it is asked for, and never the tensor that was read before
    return base if weight is not getattr(base, "weight", weight) or hasattr(base, "W_q") else None


def is_quantized(base: Any, weight: torch.Tensor) -> bool:
    """Tell whether the stored numbers are not the weight's values."""
    return quant_state(base, weight) is not None or not weight.dtype.is_floating_point


def can_dequantize(base: Any, weight: torch.Tensor) -> bool:
    """Tell whether `dequantize` can read this weight."""
    return not is_quantized(base, weight) or _reader(base, weight) is not None


def dequantize(base: Any, weight: torch.Tensor, given: SentValues) -> torch.Tensor:
    """Compute the values of a base layer's weight, in a floating dtype; a plain weight is returned as it is.

    Raises UnsupportedLora for a form that has no dequantiser here.
    """
    if not is_quantized(base, weight):
        return given(weight)
    reader = _reader(base, weight)
    if reader is None:
        raise UnsupportedLora(
            "a packed weight cannot be read: there is no dequantiser for it",
            where=type(base).__name__,
            expected="a floating weight, or one of bitsandbytes (installed), torchao, scaled fp8 or HQQ",
            got=f"{type(weight).__name__} of {weight.dtype}",
            remedy="push the adapter alone (mode='adapter'), or load the base model in 16 bit",
        )
    return reader(given)


def _reader(base: Any, weight: torch.Tensor) -> Callable[[SentValues], torch.Tensor] | None:
    state = quant_state(base, weight)
    if state is weight:
        return lambda given: _own_values(given(weight), weight)
    if weight.dtype == torch.int8 and isinstance(state, torch.Tensor):
        # bitsandbytes' row-wise int8: each row's largest magnitude is 127.
        return lambda given: given(weight).float() * (given(state).to(weight.device).float().reshape(-1, 1) / 127)
    if weight.dtype in FP8 and isinstance(state, torch.Tensor) and weight.dim() == 2:
        blocks = getattr(base, "block_size", None) or getattr(weight, "block_size", None)
        return lambda given: _scaled(given(weight), given(state), blocks)
    if hasattr(state, "absmax") or hasattr(state, "quant_type"):
        if find_spec("bitsandbytes") is None:
            return None
        unpack = importlib.import_module("bitsandbytes.functional").dequantize_4bit
        # Its Parameter subclass quantises itself when moved: the kernel gets the plain tensor.
        return lambda given: unpack(given(weight).detach().as_subclass(torch.Tensor), state)
    if state is base and callable(getattr(base, "dequantize", None)):
        return lambda given: _module_values(base)
    return None


def _scaled(weight: torch.Tensor, scale: torch.Tensor, blocks: Any) -> torch.Tensor:
    """fp8 with one scale for the tensor, for each row, or for each block."""
    values, factor = weight.float(), scale.to(weight.device).float()
    if factor.numel() == 1:
        return values * factor.reshape(())
    rows, columns = values.shape
    if factor.numel() == rows:
        return values * factor.reshape(-1, 1)
    high, wide = (int(b) for b in blocks) if blocks else (-(-rows // factor.shape[0]), -(-columns // factor.shape[1]))
    spread = factor.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    if spread.shape != values.shape:
        raise UnsupportedLora(
            "the scales of a block-scaled fp8 weight do not cover it",
            where=f"an fp8 weight of shape {list(values.shape)}",
            expected=f"blocks of {high} x {wide} over {list(values.shape)}",
            got=f"scales {list(factor.shape)}",
            remedy="check the layer's block_size, or load the base model in 16 bit",
        )
    return values * spread


def _reads_itself(weight: torch.Tensor) -> bool:
    return type(weight).dequantize is not torch.Tensor.dequantize or weight.is_quantized


def _own_values(given: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    values: torch.Tensor = (given if _reads_itself(given) else weight).dequantize()
    return values


def _module_values(base: Any) -> torch.Tensor:
    """HQQ-like layers keep notes in a dictionary of theirs while they dequantise: they get a copy of it."""
    double = copy.copy(base)
    double.__dict__.update({k: dict(v) for k, v in vars(base).items() if type(v) is dict and k[:1] != "_"})
    values: torch.Tensor = double.dequantize()
    return values


def _first(*candidates: Any) -> Any:
    return next((c for c in candidates if c is not None), None)
