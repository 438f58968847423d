"""Compare what is computed for a layer (merged, dequantised) with what the layer itself computes.

A dequantiser that misreads its library's storage gives weights that read back perfectly and mean nothing. The layer's
own forward knows better: a shielded copy of it is called with rows of random signs, which activation quantisers hold
exactly, or with token ids, and must give what the computed weight gives.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn

from bridge.errors import ConfigError, UnsupportedLora
from trainer_side.lora.layers.effective import BLOCK, effective_bias
from trainer_side.lora.layers.read import lora_parameters
from trainer_side.lora.layers.values import LoraParameters, as_stored
from trainer_side.lora.layers.wrapper_chain import Chain
from trainer_side.lora.modes import EffectiveTensor
from trainer_side.lora.state import LoraState
from trainer_side.names.tensor_checks import addresses_of
from trainer_side.shielded.guards import LiveTensorReached, ReferenceGuard
from trainer_side.shielded.model_copy import ModelCopier

ROWS = 8
"""Inputs of one comparison."""
SLACK = 8.0
"""How much more than sqrt(inputs) x eps x the largest weight a layer may round: its kernels sum in their own order, and
those of quantised layers in bfloat16 whatever they return (bitsandbytes on CPUs with avx512_bf16)."""
EVERY = 20
"""From so many computed layers on, each push compares one more, which is a few percent of the work."""
_NO_CALL = (AttributeError, ConfigError, LiveTensorReached, LookupError, RuntimeError, TypeError, ValueError)
"""A foreign layer that cannot be called alone raises one of these."""
_WORDS = (str, int, float, bool, torch.dtype, torch.Size)


class LayerProof:
    """Remembers which structures of layers were found right. One per bound model; used by one push at a time.

    A structure is everything of a layer but its values: classes, quantisation state, storage, shape, adapters that act,
    their scaling and whether they are merged. A packed weight that lies elsewhere than it did, or whose attributes have
    changed, was packed anew: it is compared itself, whatever was pushed in between.
    """

    def __init__(self) -> None:
        self._reasons: dict[Hashable, str | None] = {}
        """Structure -> why its layers could not be compared; None where they agreed, or hold plain values."""
        self._storage: dict[str, Hashable] = {}
        """Packed weight, by its clean name -> where it lay."""
        self._last: tuple[Sequence[EffectiveTensor], LoraState] | None = None
        self._turn = 0

    def require(self, computed: Sequence[EffectiveTensor], began: LoraState) -> tuple[str, ...]:
        """Compare one layer of each structure that is new, each packed one that was packed anew, and of many layers one
        more.

        Returns why packed weights could not be compared, one reason for each structure. Raises UnsupportedLora, naming
        layer and quantiser, for a difference.
        """
        alike = self._last is not None and self._last[0] is computed and self._last[1] == began
        self._turn += 1
        found: list[str | None] = []
        for k, one in enumerate(computed):
            sampled = len(computed) >= EVERY and k == self._turn % len(computed)
            if not one.bias and (not alike or sampled or one.place.clean in self._storage):
                found.append(self._look_at(one, began, sampled=sampled))
        self._last = (computed, began)
        return tuple(dict.fromkeys(reason for reason in found if reason is not None))

    def _look_at(self, one: EffectiveTensor, began: LoraState, *, sampled: bool) -> str | None:
        """Compare a layer if it has to be; why it could not be, for a packed one."""
        parameters, name = lora_parameters(one.module), one.place.clean
        packed = parameters.quant_state is not None
        storage = _describe_storage(parameters) if packed else None
        moved = packed and self._storage.get(name, storage) != storage
        chain = began.read_chain(one.module)
        key = _structure(one, chain, parameters)
        if key not in self._reasons or moved or sampled:
            reason = _compare(one, chain, parameters, began)
            self._reasons[key] = f"{name} and layers like it: {reason}" if reason is not None and packed else None
        if packed:
            self._storage[name] = storage
        return self._reasons[key]


def _compare(one: EffectiveTensor, chain: Chain, parameters: LoraParameters, began: LoraState) -> str | None:
    """Call a copy of the layer; None when it agrees, else why it could not be asked. Raises UnsupportedLora."""
    if parameters.kind not in ("linear", "embedding") or one.copies is not None or len(one.stand_in.shape) != 2:
        return f"a layer of kind {parameters.kind} cannot be called alone"
    if not one.stand_in.numel():
        return None
    try:
        with ReferenceGuard(one.module, live=False):  # of a sharded layer nothing is computed alone
            computed = one.compute(as_stored, began, one.stand_in.dtype)
    except _NO_CALL as error:
        return f"its values cannot be computed here ({type(error).__name__}: {error})"
    weight = computed.t() if parameters.kind == "linear" and parameters.transposed else computed
    rows = parameters.kind == "embedding"
    inputs = _ids(weight) if rows else _signs(weight)
    got = _call(one, inputs)
    if isinstance(got, str):
        return got
    wide = torch.promote_types(computed.dtype, torch.float32)
    bias = None if rows else effective_bias(one.module, wide, chain=chain)
    if rows:
        wanted = weight[inputs].to(wide) * float(getattr(chain.base, "embed_scale", 1.0))
    else:
        wanted = _product(inputs.to(wide), weight, wide) + (0.0 if bias is None else bias.to(wide))
    if got.shape != wanted.shape:
        return f"its forward gives {list(got.shape)} for {list(inputs.shape)}"
    largest = max(float(torch.stack(t.aminmax()).abs().amax()) for t in (weight, bias) if t is not None)
    if not math.isfinite(largest):
        return None  # refused by name when it is sent
    apart = float((got.to(wide) - wanted).abs().amax())
    coarse = [got.dtype, computed.dtype, *([torch.bfloat16] if parameters.quant_state is not None else [])]
    eps = max(torch.finfo(dtype).eps for dtype in coarse)
    limit = SLACK * math.sqrt(1 if rows else weight.shape[1]) * eps * largest
    if not apart <= limit:
        raise UnsupportedLora(
            "what is computed for a layer is not what the layer computes",
            where=one.place.clean,
            expected=f"outputs within {limit:.3g} of the layer's own ({_library(chain, parameters)})",
            got=f"{apart:.3g} apart, on {ROWS} rows of random signs",
            remedy="push the adapter alone (mode='adapter'), or load the base model in 16 bit",
            names=(one.place.clean,),
        )
    return None


def _product(inputs: torch.Tensor, weight: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Multiply in `wide`, a block of outputs at a time: no copy of a whole weight is made."""
    step = max(1, BLOCK // max(1, weight.shape[1]))
    return torch.cat([inputs @ block.to(wide).t() for block in torch.split(weight, step)], dim=1)


def _signs(weight: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(0, 2, (ROWS, weight.shape[1]), generator=generator) * 2 - 1).to(weight.device, torch.float64)


def _ids(weight: torch.Tensor) -> torch.Tensor:
    return torch.randint(0, weight.shape[0], (ROWS,), generator=torch.Generator().manual_seed(0)).to(weight.device)


def _call(one: EffectiveTensor, inputs: torch.Tensor) -> torch.Tensor | str:
    """Call a copy of the layer, in the first dtype that it takes; why it cannot be called, if it takes none."""
    reason = ""
    dtypes = dict.fromkeys((one.stand_in.dtype, torch.float32, torch.bfloat16, torch.float16))
    for dtype in dtypes if inputs.is_floating_point() else (inputs.dtype,):
        try:
            copier = ModelCopier()
            double = copier.copy(one.module)
            for each in double.modules():
                each.training = False
                each._forward_hooks.clear()
                each._forward_pre_hooks.clear()
            with (
                torch.no_grad(),
                torch.autocast(inputs.device.type, enabled=False),
                ReferenceGuard(one.module, copier.lent),
            ):
                out: Any = double(inputs.to(dtype))
        except _NO_CALL as error:
            reason = reason or f"its forward cannot be called on a copy ({type(error).__name__}: {error})"
            continue
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            return out
        reason = reason or f"its forward gives {type(out).__name__}"
    return reason


def _structure(one: EffectiveTensor, chain: Chain, parameters: LoraParameters) -> Hashable:
    levels = tuple((type(lv.wrapper), lv.state, lv.names, lv.owned, lv.setting, lv.tokens) for lv in chain.levels)
    weight = parameters.weight
    held = (_words(weight), weight.dtype, weight.shape, tuple(sorted(vars(weight))), parameters.bias is not None)
    return type(chain.base), levels, held, _words(parameters.quant_state), one.place.attribute, one.copies


def _describe_storage(parameters: LoraParameters) -> Hashable:
    """Describe where a packed weight lies and what its library has noted on it."""
    weight, state = parameters.weight, parameters.quant_state
    return tuple(addresses_of([weight]) or ()), weight.shape, weight.dtype, _words(weight), _words(state)


def _words(state: Any) -> Hashable:
    """The class of a quantisation state or weight and the settings on it, without its tensors."""
    found = vars(state).items() if hasattr(state, "__dict__") and not isinstance(state, nn.Module) else ()
    return type(state), tuple(sorted((k, str(v)) for k, v in found if isinstance(v, _WORDS)))


def _library(chain: Chain, parameters: LoraParameters) -> str:
    state = parameters.quant_state
    kept = "stored as its values" if state is None else f"read through {type(state).__module__}.{type(state).__name__}"
    return f"{type(chain.base).__module__}.{type(chain.base).__name__}, {kept}"
