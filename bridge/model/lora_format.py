"""The form in which a LoRA travels: its tensors' names, its rank, and the limits of an engine. Values only.

There is one pair of tensors per module of the *checkpoint* (`model.layers.0.self_attn.q_proj`,
`model.layers.0.mlp.experts.3.gate_proj`), whatever the trainer's framework calls them and however it stores them:

    <module>.lora_A.weight      [rank, inputs]
    <module>.lora_B.weight      [outputs, rank]     the scaling is folded in: the effect is W + B A, nothing else
    <module>.lora_embedding_A   [rank, vocabulary]  of an embedding
    <module>.lora_embedding_B   [hidden, rank]      W + (B A)^T

All pairs of a LoRA have one rank; smaller ones are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from bridge.errors import UnexpectedTensor
from bridge.model.manifest import TensorInfo

LINEAR_A, LINEAR_B = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
_HALVES = {LINEAR_A: ("A", False), LINEAR_B: ("B", False), EMBEDDING_A: ("A", True), EMBEDDING_B: ("B", True)}


class LoraSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Announced with the tensors of a LoRA: the one rank of all its pairs."""

    rank: int


class LoraLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits that an engine was started with: the largest rank of a LoRA, and how many it holds at once."""

    max_rank: int
    slots: int


class LoraPair(msgspec.Struct, frozen=True):
    """The two tensors of one module."""

    module: str
    a: TensorInfo
    b: TensorInfo
    embedding: bool


def names_of(module: str, *, embedding: bool = False) -> tuple[str, str]:
    """Return the names under which a module's A and B travel."""
    a, b = (EMBEDDING_A, EMBEDDING_B) if embedding else (LINEAR_A, LINEAR_B)
    return module + a, module + b


def split(name: str) -> tuple[str, str, bool] | None:
    """Split the name of a LoRA tensor into module, "A" or "B", and True for an embedding's; None for any other name."""
    for suffix, (half, embedding) in _HALVES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), half, embedding
    return None


def pairs(tensors: Iterable[TensorInfo]) -> tuple[LoraPair, ...]:
    """Pair the tensors of a LoRA by module, in the order of each module's first tensor.

    Raises UnexpectedTensor for a name that is not a LoRA tensor's, and for a module with only one of its two.
    """
    found: dict[tuple[str, bool], dict[str, TensorInfo]] = {}
    for info in tensors:
        parts = split(info.name)
        if parts is None:
            raise UnexpectedTensor(
                "not a tensor of an adapter", where=info.name, got=info.name, names=(info.name,),
                expected="<module>.lora_A.weight, .lora_B.weight, .lora_embedding_A or .lora_embedding_B",
                remedy="push adapters of a bound model: b.bind(model), then mode='adapter'",
            )  # fmt: skip
        module, half, embedding = parts
        found.setdefault((module, embedding), {})[half] = info
    for (module, _), halves in found.items():
        if len(halves) != 2:
            raise UnexpectedTensor(
                "a module of an adapter came with only one of its two tensors", where=module, expected="A and B",
                got=" and ".join(sorted(halves)), names=tuple(info.name for info in halves.values()),
                remedy="push adapters of a bound model: b.bind(model), then mode='adapter'",
            )  # fmt: skip
    return tuple(LoraPair(module, h["A"], h["B"], embedding) for (module, embedding), h in found.items())
