"""Read an adapter's two factors as plain matrices, and view a layer's weight as a matrix of rows.

In every layer the effect of an adapter is `rows += scaling * left @ right` with one row per output, so that DoRA's norm
is a norm of rows everywhere. What differs between layers is only which view of the weight has those rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from bridge.errors import UnsupportedLora
from trainer_side.lora.layers.values import ActiveLora, LoraParameters, SentValues
from trainer_side.lora.layers.wrapper_chain import BY_EXPERT, RANK_MAJOR


def wide_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """Choose the dtype in which sums over these tensors are made: at least fp32."""
    wide = torch.float32
    for tensor in tensors:
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            wide = torch.promote_types(wide, tensor.dtype)
    return wide


def low_rank(lora: ActiveLora, wide: torch.dtype, given: SentValues) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [r, inputs] and B [outputs, r] as matrices in the dtype `wide`, without the scaling.

    Block diagonals are expanded, a diagonal between them is multiplied into B, convolutions are flattened; the factors
    of expert parameters stay as PEFT holds them.
    """
    a, b = (
        _block_diagonal(factor.chunk(lora.extra[key], 0)) if lora.extra.get(key) else factor
        for factor, key in ((given(lora.a).to(wide), "blocks_a"), (given(lora.b).to(wide), "blocks_b"))
    )
    diagonal = lora.extra.get("diagonal")
    if diagonal is not None:
        b = b * given(diagonal).to(b.device, wide)
    return a.flatten(1), b.flatten(1)


def expert_factors(
    lora: ActiveLora, expert: int, wide: torch.dtype, given: SentValues
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [r, inputs] and B [outputs, r] of one expert.

    The expert is A's slowest index, and B's fastest one unless the layer's `lora_B_layout` marker tells otherwise (as
    Unsloth before 2026-09-17).
    """
    experts = lora.extra["experts"]
    a, b = given(lora.a), given(lora.b)
    rank = a.shape[0] // experts
    a = a.reshape(experts, rank, -1)[expert]
    if lora.extra["layout"] == BY_EXPERT:
        b = b.reshape(b.shape[0], experts, rank)[:, expert]
    else:
        b = b.reshape(b.shape[0], rank, experts)[..., expert]
    return a.to(wide), b.to(wide)


def product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """Compute `scaling * left @ right` in full precision, whatever the trainer allows its own matrix products."""
    if left.dtype == torch.float32 and coarse_products():
        return ((left.double() @ right.double()) * scaling).to(left.dtype)
    return (left @ right).mul_(scaling)


def rows_of(weight: torch.Tensor, kind: str, transposed: bool) -> torch.Tensor:
    """View a layer's weight as a matrix with one row per output. Raises UnsupportedLora when it has no such view."""
    if kind == "embedding" or transposed:
        return weight.t()
    if weight.dim() == 2:
        return weight
    if kind == "conv" and weight.dim() > 2:
        return weight.view(weight.shape[0], -1)
    raise UnsupportedLora(
        "a weight of this shape has no rows that a product could be added to",
        where="a LoRA layer",
        expected="a matrix, an embedding or a convolution's kernel",
        got=f"{kind} of shape {list(weight.shape)}",
        remedy="push mode='base', or remove the adapter from this layer",
    )


def expert_rows(weight: torch.Tensor, expert: int, lora: ActiveLora | None) -> torch.Tensor:
    """View one expert's matrix with one row per output."""
    one = weight[expert]
    swapped = lora is None or lora.extra["swapped"] or lora.extra["experts"] == 1
    # PEFT adds B A to a lone expert as it is, whatever the orientation.
    return one if swapped else one.t()


def logical_shape(layer: LoraParameters) -> tuple[int, ...]:
    """Return the shape of a packed linear layer's or embedding's weight that its first acting adapter fits."""
    lora = layer.loras[0]
    inputs, outputs = lora.a.shape[1] * int(lora.extra.get("blocks_a", 1)), lora.b.shape[0]
    swapped = layer.kind == "embedding" or layer.transposed
    return (inputs, outputs) if swapped else (outputs, inputs)


def explain_misfit(lora: ActiveLora, weight: torch.Tensor, kind: str, transposed: bool) -> str | None:
    """Explain why an adapter's factors do not fit a weight; None when they do. Reads shapes only."""
    blocks = (int(lora.extra.get("blocks_a", 1)), int(lora.extra.get("blocks_b", 1)))
    a, b = list(lora.a.shape), list(lora.b.shape)
    shown = f"A {a}, B {b} for a weight of shape {list(weight.shape)}"
    if len(a) < 2 or len(b) < 2:
        return shown
    inputs, outputs = prod(a[1:]) * blocks[0], b[0]
    rank_a, rank_b = a[0], prod(b[1:]) * blocks[1]
    if weight.dim() == 3 and kind == "parameter":
        experts = lora.extra["experts"]
        if lora.extra["layout"] not in (RANK_MAJOR, BY_EXPERT):
            return f"lora_B_layout is {lora.extra['layout']!r}, known are {RANK_MAJOR!r} and {BY_EXPERT!r}"
        wanted = list(expert_rows(weight, 0, lora).shape) if weight.shape[0] == experts else None
        fits = rank_a % experts == 0
    else:
        wanted = [prod(weight.shape[1:]), weight.shape[0]][::-1]
        if kind == "embedding" or transposed:
            wanted = wanted[::-1]
        fits = True
    return None if fits and rank_a == rank_b and wanted == [outputs, inputs] else shown


def _block_diagonal(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    whole: torch.Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
    return whole


def coarse_products() -> bool:
    """Tell whether the trainer lets fp32 products be made in tf32 or bf16. Its setting is read, never changed."""
    settings = [
        getattr(backend.matmul, "fp32_precision", None) for backend in (torch.backends.cuda, torch.backends.mkldnn)
    ]
    if None in settings:
        return torch.get_float32_matmul_precision() != "highest"
    return any(setting not in ("none", "ieee") for setting in settings)
