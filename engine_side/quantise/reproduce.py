"""Find the scheme by which an engine's checkpoint was quantised, by experiment on the checkpoint itself.

The checkpoint declares a method and, where they do not follow from shapes, the sizes of its blocks; its tensors show
how each weight is stored. A scheme is reproduced when it explains the codes and scales that are there, bit for bit. A
method whose codes depend on data has no such scheme: it is refused by its name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bridge.errors import ConfigError, DtypeMismatch
from bridge.model.dtypes import CODES, NUMBERS
from bridge.model.manifest import TensorInfo
from bridge.model.torch_dtypes import dtype_of
from engine_side.plan.unfilled import checkpoint_tensors
from engine_side.quantise.scheme import Scheme

_BYTES = {name for name in CODES if dtype_of(name).itemsize == 1 and name != "uint8"}
"""Dtypes of codes that hold one weight each."""
_DIGITS = re.compile(r"\d+")
_SAMPLES = 2
"""Tensors that are read of each kind of weight: layers of one checkpoint were quantised alike."""
_KEPT = ("_scale", "_zero_point")
"""Ends of the names under which checkpoints hold calibrated values of activations and KV caches."""
_REMEDY = "push from a trainer of the quantised weights (codes and scales under their checkpoint names), or start the "
_REMEDY += "engine with a checkpoint that is not quantised or whose scales follow from the weights alone"


@dataclass(frozen=True)
class StoredWeight:
    """Names the tensors of one stored weight: its codes, under the weight's own name, and their scales."""

    weight: TensorInfo
    scales: TensorInfo


class CheckpointSchemes:
    """The schemes of one quantised checkpoint. Reads a few of its tensors when a scheme is first asked for.

    Args:
        folder: the checkpoint's folder.
        config: its `quantization_config`.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, config
        tensors = checkpoint_tensors(folder)
        self.tensors = {info.name: info for info in tensors}
        self._modules: dict[str, list[TensorInfo]] = {}
        for info in tensors:
            self._modules.setdefault(info.name.rpartition(".")[0], []).append(info)
        self._proven: dict[object, Scheme] = {}

    @property
    def method(self) -> str:
        """The checkpoint's own word for how it is quantised, with its format where it has several."""
        words = (self.config.get("quant_method"), self.config.get("format"))
        return " ".join(str(word) for word in words if word) or "an undeclared method"

    def stored_as_codes(self, name: str) -> bool:
        """Tell if the checkpoint stores this weight, under whatever names, as codes."""
        held = self.tensors.get(name)
        if held is not None:
            return held.dtype in CODES
        module, _, last = name.rpartition(".")
        return last == "weight" and any(info.dtype in CODES for info in self._modules.get(module, ()))

    def parts(self, name: str) -> AbstractSet[str]:
        """Names of the checkpoint's tensors that belong to a weight: its scales, whatever else its codes need."""
        module = name.rpartition(".")[0]
        return {info.name for info in self._modules.get(module, ()) if info.name.startswith(f"{name}_")}

    def scheme(self, name: str) -> tuple[StoredWeight, Scheme]:
        """Find how a weight is stored, and the scheme that makes this form of its values.

        Raises DtypeMismatch, naming the method, where none does; the weight is one that `stored_as_codes`.
        """
        stored = self._stored(name)
        alike = (_DIGITS.sub("", name), stored.weight.shape, stored.scales.shape, stored.scales.dtype)
        if alike not in self._proven:
            self._proven[alike] = self._prove(stored)
        return stored, self._proven[alike]

    @cached_property
    def calibrated(self) -> frozenset[str]:
        """Names of the values that were calibrated, of activations and KV caches; they do not follow from weights."""
        out: set[str] = set()
        for module, infos in self._modules.items():
            codes = tuple(f"{name}_" for name in self._codes_in(module))
            last = {info.name: info.name.rpartition(".")[2] for info in infos}
            out.update(name for name, end in last.items() if end.endswith(_KEPT) and not end.startswith(codes))
        return frozenset(out)

    def kept(self, announced: AbstractSet[str], partial: bool) -> Iterator[tuple[str, str]]:
        """Find the calibrated values, of activations and KV caches, that nobody announced: few trainers have them.

        Yields (name, an announced tensor with which it belongs). Such a value lies in the module of an announced
        tensor, or (of a cache) in the one above. Of a `partial` push, only those beside announced codes count: the
        engine reads them together.
        """
        beside: dict[str, str] = {}
        for name in announced:
            module = name.rpartition(".")[0]
            if not partial:
                beside.setdefault(module.rpartition(".")[0], name)
            if not partial or self.stored_as_codes(name):
                beside[module] = name
        for name in self.tensors:
            module = name.rpartition(".")[0]
            if name in self.calibrated and name not in announced and module in beside:
                yield name, beside[module]

    def _codes_in(self, module: str) -> Iterator[str]:
        """The last segments of the names under which a module stores codes."""
        for info in self._modules.get(module, ()):
            if info.dtype in CODES and len(info.shape) > 1:
                yield info.name.rpartition(".")[2]

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Read tensors of the checkpoint. Raises ConfigError for one that is not there any more."""
        from safetensors import safe_open

        out: dict[str, torch.Tensor] = {}
        for file in sorted(self.folder.glob("*.safetensors")) if names else ():
            with safe_open(file, framework="pt") as handle:
                here = set(handle.keys())
                out.update({name: handle.get_tensor(name) for name in names if name in here})
        if len(out) < len(set(names)):
            missing = next(name for name in names if name not in out)
            raise ConfigError(
                "the engine's checkpoint no longer holds one of its tensors",
                where=f"{self.folder}: {missing}",
                expected="the tensors that it held when the engine was started",
                got=f"{len(out)} of {len(set(names))}",
                remedy="leave the checkpoint in place while the engine runs; put it back and push again",
                names=(missing,),
            )
        return out

    def _stored(self, name: str) -> StoredWeight:
        weight = self.tensors.get(name)
        parts = [self.tensors[part] for part in self.parts(name)]
        plain = weight is not None and weight.dtype in _BYTES and len(weight.shape) == 2
        if weight is None or not plain or len(parts) != 1 or parts[0].dtype not in NUMBERS:
            held = sorted(info.name for info in self._modules[name.rpartition(".")[0]])
            raise self._refusal(name, f"{', '.join(held)}: more than codes of a byte and one tensor of scales")
        return StoredWeight(weight, parts[0])

    def _prove(self, stored: StoredWeight) -> Scheme:
        """Find the scheme that explains a stored weight."""
        found = self.read([stored.weight.name, stored.scales.name])
        for scheme in self._candidates(stored):
            if scheme.explains(found[stored.weight.name], found[stored.scales.name]):
                return scheme
        got = f"{stored.weight.dtype} codes and scales {list(stored.scales.shape)} that it makes of no weight"
        raise self._refusal(stored.weight.name, got)

    def _candidates(self, stored: StoredWeight) -> Iterator[Scheme]:
        """List the schemes that would give these forms."""
        codes, scales = dtype_of(stored.weight.dtype), dtype_of(stored.scales.dtype)
        peak = torch.finfo(codes).max if codes.is_floating_point else self._integer_peak
        for block in self._blocks(stored):
            for powers_of_two in (False, True):
                yield Scheme(codes, scales, block, stored.scales.shape, peak, powers_of_two)

    @cached_property
    def _integer_peak(self) -> float:
        """The multiple of its scale that the largest value of a block is, in a checkpoint of int8 codes.

        Most quantisers give it the largest code. compressed-tensors gives it half of the range, from which every other
        negative one is rounded to the lowest code, that nothing else reaches.
        """
        limits = torch.iinfo(torch.int8)
        seen: Counter[tuple[str, tuple[int, ...]]] = Counter()
        for info in self.tensors.values():
            alike = (_DIGITS.sub("", info.name), info.shape)
            if info.dtype == "int8" and len(info.shape) == 2 and seen[alike] < _SAMPLES:
                seen[alike] += 1
                if bool((self.read([info.name])[info.name] == limits.min).any()):
                    return (limits.max - limits.min) / 2
        return float(limits.max)

    def _blocks(self, stored: StoredWeight) -> Iterator[tuple[int, int]]:
        """List the sizes of blocks that give a tensor of scales of this shape: declared ones, then what divides."""
        rows, columns = stored.weight.shape
        down, across = (*stored.scales.shape, 1, 1)[:2]
        for height, width in (*_declared_sizes(self.config), (-(-rows // down), -(-columns // across))):
            high = rows if down == 1 else 1 if down == rows else height
            wide = columns if across == 1 else 1 if across == columns else width
            if (-(-rows // high), -(-columns // wide)) == (down, across):
                yield high, wide

    def _refusal(self, name: str, got: str) -> DtypeMismatch:
        return DtypeMismatch(
            f"values cannot be quantised as this engine's checkpoint is ({self.method})",
            where=name,
            expected="codes and scales as rounding to the nearest makes them of the weight alone",
            got=got,
            remedy=_REMEDY,
            names=(name,),
        )


def _declared_sizes(config: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Find the sizes of blocks and groups that a `quantization_config` declares, at whatever depth."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _declared_sizes(value)
        elif key in ("weight_block_size", "block_structure") and isinstance(value, (list, tuple)) and len(value) == 2:
            yield int(value[0]), int(value[1])
        elif key == "group_size" and isinstance(value, int) and value > 0:
            yield 1, value
