"""Find out why a layer has no effective weight that could be sent.

Every reason is about the layer as it acts now: an adapter that is not active, or lies merged in the base, is no reason.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from bridge.errors import UnsupportedLora
from trainer_side.lora.layers.dequant import FP8, can_dequantize, is_quantized
from trainer_side.lora.layers.factors import explain_misfit
from trainer_side.lora.layers.read import is_transposed, kind_of, stored, stored_bias
from trainer_side.lora.layers.values import ActiveLora, LayerState
from trainer_side.lora.layers.wrapper_chain import Chain, Level, read_chain

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
_ELSEWHERE = "Use mode='base' for the base weights, or merge the adapter into the model first"
_ADAPTER = "Use mode='adapter'"
_ADAPTER_OR_16_BIT = f"{_ADAPTER}, or a 16-bit base"


def refusal(module: nn.Module, path: str, *, copies: int | None = None) -> UnsupportedLora | None:
    """Build the error of a layer whose effective tensors cannot be pushed in merged mode; None when they can.

    `path` is the layer's name in messages. Reads attributes and shapes, no values; cheap enough for every push.
    Raises UnsupportedLora for a tuner that is no LoRA.
    """
    reason = reason_of(read_chain(module), copies)
    return None if reason is None else reason.error(path)


class Reason(NamedTuple):
    """The reason why a layer's effective tensors cannot be pushed.

    Attributes:
        subject: the part of the layer concerned.
        why: the reason, a clause.
        got: what was found.
        way_out: a sentence without its full stop.
    """

    subject: str
    why: str
    got: str
    way_out: str

    @property
    def by_mode(self) -> bool:
        """True when the way out is another mode, and no change of the layer."""
        return self.way_out in (_ELSEWHERE, _ADAPTER, _ADAPTER_OR_16_BIT)

    def error(self, path: str) -> UnsupportedLora:
        """Build the error for the layer at `path`."""
        return UnsupportedLora(
            f"{self.subject} cannot be pushed in merged mode: {self.why}",
            where=path,
            expected="a layer whose forward computes with one weight that can be read",
            got=self.got,
            remedy=f"{self.way_out}.",
            names=(path,),
        )


def reason_of(chain: Chain, copies: int | None = None, attribute: str | None = None) -> Reason | None:
    """Return the first reason that a layer which was read, or one parameter of it, gives; None when there is none."""
    names = dict.fromkeys(level.attribute for level in chain.levels) if attribute is None else (attribute,)
    return next((reason for name in names for reason in _reasons(chain, name, copies)), None)


def _reasons(chain: Chain, name: str, copies: int | None) -> Iterator[Reason]:
    levels = [level for level in chain.on(name) if level.names]
    weight = stored(chain.base, name)
    if not levels:
        return
    if weight is None:
        yield Reason("LoRA", f"the layer has no parameter {name}", type(chain.base).__name__, _ELSEWHERE)
        return
    yield from _of_layer(chain, name, weight, levels, copies)
    yield from _of_levels(chain, name, weight, levels, copies)


def _of_layer(
    chain: Chain, name: str, weight: torch.Tensor, levels: list[Level], copies: int | None
) -> Iterator[Reason]:
    """List the reasons that lie in the base layer."""
    base = chain.base
    where = _elsewhere(weight)
    if where is not None:
        yield Reason(
            "a sharded, offloaded or empty weight", f"its values are not here ({where})", where, "Gather it first"
        )
        return
    if is_parametrized(base, name):
        reason = "the parameter is already computed by a parametrization"
        yield Reason("LoRA on a parametrized weight", reason, type(base).__name__, "Remove the parametrization first")
    if not can_dequantize(base, weight):
        got = f"{type(base).__name__}, {type(weight).__name__} of {weight.dtype}"
        yield Reason("LoRA on a quantised base", "there is no dequantiser for it", got, _ADAPTER_OR_16_BIT)
    if weight.dtype in FP8 and not is_quantized(base, weight):
        yield Reason(
            "LoRA on an fp8 parameter", "the forward adds in high precision and clamps", str(weight.dtype), _ADAPTER
        )
    if any(level.state is LayerState.MERGED_DISABLED for level in levels) and is_quantized(base, weight):
        reason = "taking the merged adapters out of packed weights would round them again"
        yield Reason("a quantised base that is merged and disabled", reason, str(weight.dtype), "Unmerge it first")
    if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear) and copies is None:
        reason = "its forward is never called, so that only the attention layer knows what its adapters do"
        yield Reason("LoRA on an attention layer's output projection", reason, type(base).__name__, _ELSEWHERE)


def _of_levels(
    chain: Chain, name: str, weight: torch.Tensor, levels: list[Level], copies: int | None
) -> Iterator[Reason]:
    """List the reasons that lie in the adapters."""
    if len(levels) > 1 and any(level.tokens for level in levels):
        names = ", ".join(n for level in levels for n in level.names)
        yield Reason(
            "trainable tokens beside LoRA on one layer", "one hides the other in the forward", names, _ELSEWHERE
        )
    kind = kind_of(chain, name, weight)
    transposed = kind == "linear" and is_transposed(chain, weight)
    of_layer = [level for level in levels if not level.of_parameter]
    if (
        kind == "parameter"
        and of_layer
        and (is_transposed(chain, weight) or any(a.magnitude is not None for level in of_layer for a in level.loras))
    ):
        names = ", ".join(n for level in levels for n in level.names)
        reason = "which of them the norm sees, or in which orientation they add, depends on their order"
        yield Reason("DoRA or a transposed layer beside an adapter on its parameter", reason, names, _ELSEWHERE)
    # A packed weight is stored in another shape than its own.
    is_plain = not is_quantized(chain.base, weight) or weight.dtype in FP8 or weight.dtype == torch.int8
    for level in levels:
        for lora in level.loras:
            yield from _of_lora(chain, level, lora, kind, name)
            if level.state is LayerState.MERGED_DISABLED and lora.magnitude is not None:
                reason = "what the merge replaced is not there any more"
                yield Reason(f"DoRA adapter {lora.name}, merged and disabled", reason, lora.variant, "Unmerge it first")
            if (copies or 1) > 1 and (lora.variant or lora.magnitude is not None):
                reason = "how often its effect is added is not known"
                yield Reason(f"a variant in an attention layer ({lora.variant})", reason, lora.variant, _ELSEWHERE)
            shapes = explain_misfit(lora, weight, kind, transposed) if is_plain else None
            if shapes is not None:
                yield Reason(f"adapter {lora.name}", "its factors do not fit the weight", shapes, "Check the adapter")


def _of_lora(chain: Chain, level: Level, lora: ActiveLora, kind: str, name: str) -> Iterator[Reason]:
    variant = lora.variant
    if variant in PER_TOKEN_VARIANTS:
        yield Reason(f"adapter {lora.name} ({variant})", "its effect depends on the token", variant, _ELSEWHERE)
    unknown = lora.extra.get("unknown")
    if unknown:
        got = ", ".join(unknown)
        yield Reason(
            f"adapter {lora.name}", f"the layer holds something that is not understood: {got}", got, _ELSEWHERE
        )
    if variant not in PLAIN_VARIANTS | DORA_VARIANTS | PER_TOKEN_VARIANTS.keys():
        yield Reason(f"adapter {lora.name} ({variant})", "this variant is not known", variant, _ELSEWHERE)
    if (variant in DORA_VARIANTS) > (lora.magnitude is not None):
        yield Reason(f"DoRA adapter {lora.name}", "it has no magnitude", variant, _ELSEWHERE)
    if variant == "KasaLinearVariant" and "diagonal" not in lora.extra:
        yield Reason(f"adapter {lora.name} ({variant})", "it has no lora_diag", variant, _ELSEWHERE)
    if lora.bias is not None and name != "in_proj_weight":
        if stored_bias(chain.base, name) is None:
            yield Reason(
                f"lora_bias of adapter {lora.name}", "the layer has no bias to carry it", "no bias", _ELSEWHERE
            )
        if lora.magnitude is not None:
            yield Reason(f"lora_bias of DoRA adapter {lora.name}", "its norm is not of the weight", variant, _ELSEWHERE)
    for tensor in (lora.a, lora.b):
        where = _elsewhere(tensor)
        if where is not None:
            reason = f"its values are not here ({where})"
            yield Reason(f"adapter {lora.name}, sharded, offloaded or empty", reason, where, "Gather it first")
            return
    if kind == "conv":
        yield from _of_convolution(chain.base, level.wrapper, lora)


def _of_convolution(base: Any, wrapper: Any, lora: ActiveLora) -> Iterator[Reason]:
    """List the settings in which layer and adapter differ: only two convolutions that see the input alike are one."""
    groups, mode = getattr(base, "groups", 1), getattr(base, "padding_mode", "zeros")
    if groups != 1:
        yield Reason("LoRA on a grouped convolution", "no single weight has its effect", f"groups={groups}", _ELSEWHERE)
    if mode != "zeros":
        reason = "the adapter pads its input with zeros, so that no single weight has its effect"
        yield Reason(f"LoRA on a convolution that pads with {mode}", reason, f"padding_mode={mode}", _ELSEWHERE)
    first = wrapper.lora_A[lora.name]
    for setting in ("stride", "padding", "dilation"):
        one = getattr(base, setting, None)
        other = getattr(first, setting, one)
        if one != other and not (setting == "dilation" and prod(base.kernel_size) == 1):
            reason = f"layer and adapter differ in {setting}, so that no single weight has their effect"
            yield Reason("LoRA on a convolution", reason, f"{setting}: {one} and {other}", _ELSEWHERE)


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
