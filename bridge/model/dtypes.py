"""The fixed table of dtypes that may travel, and the one decision about what becomes of a tensor of one dtype in an
engine's tensor of another. A name from outside is looked up here, never resolved with `getattr`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from bridge.errors import DtypeMismatch

ITEM_SIZES: Mapping[str, int] = {
    "bf16": 2,
    "fp16": 2,
    "fp32": 4,
    "fp64": 8,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
    "fp8_e8m0": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "bool": 1,
}
"""Wire dtype -> bytes per element. `torch_dtypes` holds torch's own, so that this file does not load torch."""
CODES = frozenset({"fp8_e4m3", "fp8_e5m2", "int8", "int16", "int32", "uint8"})
"""Dtypes in which quantised weights are stored: codes that mean nothing without their scales."""
FLOATS = frozenset({"bf16", "fp16", "fp32", "fp64"})
"""Dtypes in which layers compute; they convert among each other, with one rounding."""
INTEGERS = frozenset({"int8", "int16", "int32", "int64", "uint8"})
"""Dtypes of counters and positions, where they are buffers."""
_POWERS_OF_TWO = "fp8_e8m0"
_HOLDS_POWERS_OF_TWO = FLOATS - {"fp16"}
NUMBERS = FLOATS | {_POWERS_OF_TWO}
"""Dtypes of values and of scales, which mean something by themselves."""


class Landing(StrEnum):
    """Says how a sent tensor gets into the engine's tensor that it lands in, or that it does not."""

    CARRIED = "carried"
    """Bit for bit."""
    CONVERTED = "converted"
    """By value: with one rounding among floats, else only where every value survives."""
    DEQUANTISED = "dequantised"
    """Codes for a tensor of values: only as what the library that owns the trainer's layer makes of them."""
    QUANTISED = "quantised"
    """Values for a tensor of codes: only by the engine's own quantiser."""
    REFUSED = "refused"
    """The two mean different things."""


def landing(sent: str, into: str, *, buffer: bool = False) -> Landing:
    """Decide what becomes of a tensor of dtype `sent` in an engine's tensor of dtype `into`. Pure.

    Args:
        sent: the wire dtype in which the trainer's side announces the tensor.
        into: the dtype of the engine's tensor in the form of its checkpoint, before post-load packs it; torch's own
            word where it cannot travel.
        buffer: the engine's tensor is a buffer: an integer there is a number, in a parameter it is a code.
    """
    if sent == into:
        return Landing.CARRIED
    if sent in FLOATS and into in FLOATS:
        return Landing.CONVERTED
    if sent == _POWERS_OF_TWO and into in _HOLDS_POWERS_OF_TWO:
        return Landing.CONVERTED
    if buffer and sent in INTEGERS and into in INTEGERS:
        return Landing.CONVERTED
    if sent in CODES and into in FLOATS:
        return Landing.DEQUANTISED
    if sent in FLOATS and into in CODES:
        return Landing.QUANTISED
    return Landing.REFUSED


def itemsize(name: str) -> int:
    """Return the bytes per element of a wire dtype. Raises DtypeMismatch for a name that is not in the table."""
    try:
        return ITEM_SIZES[name]
    except KeyError:
        remedy = "run one version of weighbridge on both sides"
        raise DtypeMismatch(
            "unknown wire dtype", where="a manifest", expected=", ".join(ITEM_SIZES), got=repr(name), remedy=remedy
        ) from None
