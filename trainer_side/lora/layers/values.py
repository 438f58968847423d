"""Values that describe one LoRA layer, read once. The tensors in them are the live ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

SentValues = Callable[[torch.Tensor], torch.Tensor]
"""Maps a live tensor to the values that the caller of `push` sent for it."""


def as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """Stand for every live tensor's own values: the `SentValues` of a caller who sent none."""
    return tensor


class LayerState(Enum):
    """The tensors that the next forward of a layer computes with."""

    PLAIN = "plain"
    """No LoRA here: an ordinary layer."""
    ACTIVE = "active"
    """The base and every adapter in `LoraParameters.loras` (none: no active adapter is owned by this layer)."""
    DISABLED = "disabled"
    """The base alone."""
    MERGED = "merged"
    """The base's tensors as they are: adapters were merged into them in place."""
    MERGED_DISABLED = "merged and disabled"
    """PEFT's next forward unmerges by itself, so none may be run; the stored tensors are not what it computes with."""


@dataclass(frozen=True, eq=False)
class ActiveLora:
    """One adapter that acts in the forward now.

    Attributes:
        name: PEFT's name of it.
        a, b: as PEFT holds them: linear (r, in), (out, r); embedding (r, vocabulary), (hidden, r); convolution
            (r, in/groups, *kernel), (out, r, 1, ..); expert parameters (r * experts, in), (out, r * experts).
        scaling: the live factor, `set_scale` included.
        bias: that of `lora_B` (lora_bias); None without.
        magnitude: DoRA's; None without.
        variant: class name of PEFT's variant, "" for plain LoRA.
        extra: what is needed besides to read `a` and `b`: "diagonal" (KaSA's), "blocks_a"/"blocks_b" (BD-LoRA: the
            number of diagonal blocks), "experts", "swapped" and "layout" (expert parameters), "unknown" (names of
            tensors and settings that cannot be read here: such an adapter is refused).
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    variant: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """List the tensors that its effect is computed from."""
        held = (self.a, self.b, self.bias, self.magnitude, self.extra.get("diagonal"))
        return [tensor for tensor in held if tensor is not None]


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of a weight that trainable tokens replace (they do not add to it).

    Attributes:
        name: PEFT's name of the adapter.
        indices: the rows.
        values: (rows, hidden), what they are in the forward.
    """

    name: str
    indices: tuple[int, ...]
    values: torch.Tensor


@dataclass(frozen=True, eq=False)
class LoraParameters:
    """One layer's tensors and state; the same fields in every state.

    The first six fields, in this order on iteration, are those of Unsloth's `get_lora_parameters_bias`.

    Attributes:
        weight: of the innermost base layer, as stored.
        quant_state: what is needed to read a quantised weight; None for a plain one.
        A, B, scaling: of the first acting adapter; None when disabled, merged or without LoRA.
        bias: of the base layer, in every state; None where it has none.
        loras: all that act now, in the order of the forward.
        state: see `LayerState`.
        kind: "linear", "embedding", "conv", "parameter" (a `target_parameters` wrapper), "attention", "other".
        transposed: the weight is stored (in, out): fan_in_fan_out.
        merged: names of the adapters that lie in the weight now.
        owned: names of all adapters that this layer has, acting or not.
        rows: of trainable tokens, those that stand in the weight's place now.
    """

    weight: torch.Tensor
    quant_state: Any
    A: torch.Tensor | None
    B: torch.Tensor | None
    scaling: float | None
    bias: torch.Tensor | None
    loras: tuple[ActiveLora, ...] = ()
    state: LayerState = LayerState.PLAIN
    kind: str = "other"
    transposed: bool = False
    merged: tuple[str, ...] = ()
    owned: tuple[str, ...] = ()
    rows: tuple[TokenRows, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter((self.weight, self.quant_state, self.A, self.B, self.scaling, self.bias))
