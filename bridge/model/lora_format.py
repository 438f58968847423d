"""What both sides say about a LoRA adapter: its tensors' names, its size, what an engine can hold. Values only.

An adapter travels in portable form (lora.md 10): per module of the *checkpoint* (`model.layers.0.self_attn.q_proj`,
`model.layers.0.mlp.experts.3.gate_proj`) one pair, whatever the trainer's framework calls it and however it stores it:

    <module>.lora_A.weight      [rank, inputs]
    <module>.lora_B.weight      [outputs, rank]     the scaling is folded in: the effect is W + B A, nothing else
    <module>.lora_embedding_A   [rank, vocabulary]  of an embedding
    <module>.lora_embedding_B   [hidden, rank]      W + (B A)^T

All pairs of an adapter have one rank; smaller ones are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from bridge.errors import UnexpectedTensor
from bridge.model.manifest import TensorInfo

LINEAR_A, LINEAR_B = ("lora_A", "weight"), ("lora_B", "weight")
EMBEDDING_A, EMBEDDING_B = ("lora_embedding_A",), ("lora_embedding_B",)


class LoraSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is announced of an adapter besides its tensors: the one rank of all its pairs."""

    rank: int


class LoraLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine was started with: the largest rank of an adapter, and how many it holds at once."""

    max_rank: int
    slots: int


class Pair(msgspec.Struct, frozen=True):
    """The two tensors of one module."""

    module: str
    a: TensorInfo
    b: TensorInfo
    embedding: bool


def names_of(module: str, *, embedding: bool = False) -> tuple[str, str]:
    """The names under which a module's A and B travel."""
    a, b = (EMBEDDING_A, EMBEDDING_B) if embedding else (LINEAR_A, LINEAR_B)
    return ".".join((module, *a)), ".".join((module, *b))


def split(name: str) -> tuple[str, str, bool] | None:
    """(module, "A" or "B", of an embedding) of an adapter tensor's name; None for any other name."""
    segments = tuple(name.split("."))
    for suffix, half, embedding in (
        (LINEAR_A, "A", False),
        (LINEAR_B, "B", False),
        (EMBEDDING_A, "A", True),
        (EMBEDDING_B, "B", True),
    ):
        if len(segments) > len(suffix) and segments[-len(suffix) :] == suffix:
            return ".".join(segments[: -len(suffix)]), half, embedding
    return None


def pairs(tensors: Iterable[TensorInfo]) -> tuple[Pair, ...]:
    """The modules of an adapter, in the order of their first tensor.

    Raises UnexpectedTensor for a name that is no adapter tensor's, and for a module with only one of its two.
    """
    found: dict[tuple[str, bool], dict[str, TensorInfo]] = {}
    for info in tensors:
        parts = split(info.name)
        if parts is None:
            raise UnexpectedTensor(
                "not a tensor of an adapter",
                where=info.name,
                expected="<module>.lora_A.weight, .lora_B.weight, .lora_embedding_A or .lora_embedding_B",
                got=info.name,
                names=(info.name,),
            )
        module, half, embedding = parts
        found.setdefault((module, embedding), {})[half] = info
    for (module, _), halves in found.items():
        if len(halves) != 2:
            raise UnexpectedTensor(
                "a module of an adapter came with only one of its two tensors",
                where=module,
                expected="A and B",
                got=" and ".join(sorted(halves)),
                names=tuple(info.name for info in halves.values()),
            )
    return tuple(Pair(module, h["A"], h["B"], embedding) for (module, embedding), h in found.items())
