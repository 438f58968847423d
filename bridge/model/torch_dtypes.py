"""The torch dtypes of the wire's names. A name from outside is looked up here, never resolved with `getattr`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bridge.errors import DtypeMismatch
from bridge.model.dtypes import itemsize

DTYPES: Mapping[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e8m0": torch.float8_e8m0fnu,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def dtype_of(name: str) -> torch.dtype:
    """Look up the torch dtype of a wire name. Raises DtypeMismatch for a name that is not in the table."""
    itemsize(name)
    return DTYPES[name]


def dtype_name(dtype: torch.dtype, where: str | None = None) -> str:
    """Look up the wire name of a torch dtype. Raises DtypeMismatch, naming `where`, for one that cannot travel."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise DtypeMismatch(
            "this dtype cannot travel", where=where, expected=", ".join(DTYPES), got=str(dtype),
            remedy="convert the tensor to one of the listed dtypes before the push",
        ) from None  # fmt: skip
