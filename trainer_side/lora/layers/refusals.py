"""Find out why a layer has no effective weight that could be sent.

Every reason is about the layer as it acts now: an adapter that is not active, or lies merged in the base, is no reason.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from trainer_side.lora.layers.dequant import FP8, can_dequantize, is_quantized, quant_state
from trainer_side.lora.layers.factors import explain_misfit
from trainer_side.lora.layers.features import Feature, Finding
from trainer_side.lora.layers.read import is_transposed, kind_of, stored, stored_bias
from trainer_side.lora.layers.values import ActiveLora, LayerState
from trainer_side.lora.layers.wrapper_chain import Chain, Level

PLAIN_VARIANTS = frozenset(
    {
        "", "MiCALinearVariant", "MiCAEmbeddingVariant", "VeloraLinearVariant", "MontecloraLinearVariant",
        "BdLoraLinearVariant", "KasaLinearVariant",
    }
)  # fmt: skip
"""Variants of PEFT whose eval-mode forward adds one product of two (expanded) factors."""
DORA_VARIANTS = frozenset(
    {"DoraLinearVariant", "DoraEmbeddingVariant", "DoraConv1dVariant", "DoraConv2dVariant", "DoraConv3dVariant"}
)
PER_TOKEN_VARIANTS = {"ALoraLinearVariant": "aLoRA", "ArrowLinearVariant": "Arrow"}
"""Variants that act on some tokens only, or weigh adapters per token, and their usual names."""


def reason_of(chain: Chain, copies: int | None = None, attribute: str | None = None) -> Finding | None:
    """Return the first reason that a layer which was read, or one parameter of it, gives; None when there is none.

    Its place and names are left to the caller. Reads attributes and shapes, no values; cheap enough for every push.
    """
    for name in dict.fromkeys(level.attribute for level in chain.levels) if attribute is None else (attribute,):
        weight = stored(chain.base, name)
        found = next(_reasons(chain, name, weight, copies), None)
        if found is not None and found.feature is Feature.UNREADABLE and weight is not None:
            # What merged alone needs is the values of the base: an adapter does without.
            packed = quant_state(chain.base, weight) is not None or weight.dtype in FP8
            return replace(found, feature=Feature.NO_VALUES, modes=("adapter",)) if packed else found
        if found is not None:
            return found
    return None


def _unreadable(subject: str, reason: str, way_out: str = "") -> Finding:
    return Finding(Feature.UNREADABLE, reason=reason, subject=subject, way_out=way_out)


def _reasons(chain: Chain, name: str, weight: torch.Tensor | None, copies: int | None) -> Iterator[Finding]:
    levels = [level for level in chain.on(name) if level.names]
    if not levels:
        return
    if weight is None:
        yield _unreadable("LoRA", f"the layer has no parameter {name}: {type(chain.base).__name__}")
        return
    for level in levels:
        for lora in level.loras:
            yield from of_variant(lora, experts=level.of_parameter and weight.dim() == 3)
    where = _elsewhere(weight)
    if where is not None:
        reason = f"its values are not here ({where})"
        found = _unreadable("a sharded, offloaded or empty weight", reason, "gather it first")
        yield replace(found, modes=())
        return
    yield from _of_base(chain.base, name, weight, levels, copies)
    yield from _of_levels(chain, name, weight, levels, copies)


def of_variant(lora: ActiveLora, *, experts: bool) -> Iterator[Finding]:
    """List the reasons that lie in what an adapter computes, whatever the layer."""
    variant, unknown, subject = lora.variant, lora.extra.get("unknown"), f"adapter {lora.name}"
    if variant in PER_TOKEN_VARIANTS:
        yield Finding(Feature.PER_TOKEN, reason=f"{subject}, {variant}", subject=PER_TOKEN_VARIANTS[variant])
    elif unknown:
        reason = f"the layer holds something that is not understood: {', '.join(unknown)}"
        yield Finding(Feature.AMBIGUOUS if experts else Feature.UNKNOWN, reason=reason, subject=subject)
    elif variant not in PLAIN_VARIANTS | DORA_VARIANTS:
        yield Finding(Feature.UNKNOWN, reason=f"this variant is not known: {variant}", subject=subject)


def _of_base(base: Any, name: str, weight: torch.Tensor, levels: list[Level], copies: int | None) -> Iterator[Finding]:
    """List the reasons that lie in the base layer."""
    kind = type(base).__name__
    if is_parametrized(base, name):
        reason = f"the parameter is already computed by a parametrization: {kind}"
        yield _unreadable("LoRA on a parametrized weight", reason, "remove the parametrization first")
    if not can_dequantize(base, weight):
        reason = f"there is no dequantiser for it: {kind}, {type(weight).__name__} of {weight.dtype}"
        yield _unreadable("LoRA on a quantised base", reason, "load the base model in 16 bit")
    if weight.dtype in FP8 and not is_quantized(base, weight):
        reason = f"the forward adds in high precision and clamps: {weight.dtype}"
        yield _unreadable("LoRA on an fp8 parameter", reason)
    if any(level.state is LayerState.MERGED_DISABLED for level in levels) and is_quantized(base, weight):
        reason = f"taking the merged adapters out of packed weights would round them again: {weight.dtype}"
        yield _unreadable("a quantised base that is merged and disabled", reason, "unmerge it first")
    if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear) and copies is None:
        reason = f"its forward is never called, so that only the attention layer knows what its adapters do: {kind}"
        yield _unreadable("LoRA on an attention layer's output projection", reason)


def _of_levels(
    chain: Chain, name: str, weight: torch.Tensor, levels: list[Level], copies: int | None
) -> Iterator[Finding]:
    """List the reasons that lie in the adapters on this layer."""
    names = ", ".join(n for level in levels for n in level.names)
    if len(levels) > 1 and any(level.tokens for level in levels):
        reason = f"one hides the other in the forward: {names}"
        yield _unreadable("trainable tokens beside LoRA on one layer", reason)
    kind = kind_of(chain, name, weight)
    transposed = kind == "linear" and is_transposed(chain, weight)
    of_layer = [level for level in levels if not level.of_parameter]
    dora = any(a.magnitude is not None for level in of_layer for a in level.loras)
    if kind == "parameter" and of_layer and (dora or is_transposed(chain, weight)):
        reason = f"which of them the norm sees, or in which orientation they add, depends on their order: {names}"
        yield _unreadable("DoRA or a transposed layer beside an adapter on its parameter", reason)
    # A packed weight is stored in another shape than its own.
    is_plain = not is_quantized(chain.base, weight) or weight.dtype in FP8 or weight.dtype == torch.int8
    for level in levels:
        for lora in level.loras:
            yield from _of_lora(chain, level, lora, kind, name)
            if level.state is LayerState.MERGED_DISABLED and lora.magnitude is not None:
                reason = f"what the merge replaced is not there any more: {lora.variant}"
                yield _unreadable(f"DoRA adapter {lora.name}, merged and disabled", reason, "unmerge it first")
            if (copies or 1) > 1 and (lora.variant or lora.magnitude is not None):
                reason = "how often its effect is added is not known"
                yield _unreadable(f"a variant in an attention layer ({lora.variant})", reason)
            shapes = explain_misfit(lora, weight, kind, transposed) if is_plain else None
            if shapes is not None:
                reason = f"its factors do not fit the weight: {shapes}"
                yield _unreadable(f"adapter {lora.name}", reason, "check the adapter")


def _of_lora(chain: Chain, level: Level, lora: ActiveLora, kind: str, name: str) -> Iterator[Finding]:
    subject, variant = f"adapter {lora.name}", lora.variant
    if (variant in DORA_VARIANTS) > (lora.magnitude is not None):
        yield _unreadable(f"DoRA {subject}", f"it has no magnitude: {variant}")
    if variant == "KasaLinearVariant" and "diagonal" not in lora.extra:
        yield _unreadable(subject, f"it has no lora_diag: {variant}")
    if lora.bias is not None and name != "in_proj_weight":
        if stored_bias(chain.base, name) is None:
            yield Finding(Feature.LORA_BIAS_ALONE, reason="no bias to carry it", subject=f"lora_bias of {subject}")
        if lora.magnitude is not None:
            yield _unreadable(f"lora_bias of DoRA {subject}", f"its norm is not of the weight: {variant}")
    for tensor in (lora.a, lora.b):
        where = _elsewhere(tensor)
        if where is not None:
            yield _unreadable(
                f"{subject}, sharded, offloaded or empty", f"its values are not here ({where})", "gather it first"
            )
            return
    if kind == "conv":
        yield from _of_convolution(chain.base, level.wrapper.lora_A[lora.name])


def _of_convolution(base: Any, factor: Any) -> Iterator[Finding]:
    """List the settings in which layer and adapter differ: only two convolutions that see the input alike are one."""
    groups, mode = getattr(base, "groups", 1), getattr(base, "padding_mode", "zeros")
    if groups != 1:
        yield Finding(Feature.NO_SINGLE_WEIGHT, reason=f"groups={groups}", subject="LoRA on a grouped convolution")
    if mode != "zeros":
        subject, reason = f"LoRA on a convolution that pads with {mode}", "the adapter pads its input with zeros"
        yield Finding(Feature.NO_SINGLE_WEIGHT, reason=reason, subject=subject)
    for setting in ("stride", "padding", "dilation"):
        one = getattr(base, setting, None)
        other = getattr(factor, setting, one)
        if one != other and not (setting == "dilation" and prod(base.kernel_size) == 1):
            reason = f"layer and adapter differ in {setting}: {one} and {other}"
            yield Finding(Feature.NO_SINGLE_WEIGHT, reason=reason, subject="LoRA on a convolution")


def _elsewhere(tensor: torch.Tensor) -> str | None:
    """Tell where the values of a tensor are, if not in it."""
    if tensor.is_meta:
        return "on the meta device"
    library = sys.modules.get("torch.distributed.tensor")
    if library is not None and isinstance(tensor, library.DTensor):
        return "a DTensor"
    if tensor.numel() == 0 or hasattr(tensor, "ds_shape"):
        return "empty here"
    return None
