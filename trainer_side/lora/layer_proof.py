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
from trainer_side.lora.findings import packed
from trainer_side.lora.layers.effective import effective_bias
from trainer_side.lora.layers.read import lora_parameters
from trainer_side.lora.layers.values import LoraParameters, as_stored
from trainer_side.lora.layers.wrapper_chain import Chain
from trainer_side.lora.modes import EffectiveTensor
from trainer_side.lora.state import LoraState
from trainer_side.shielded.guards import LiveTensorReached, ReferenceGuard
from trainer_side.shielded.model_copy import shielded_copy

ROWS = 8
"""Inputs of one comparison."""
SLACK = 8.0
"""How much more than sqrt(inputs) x eps x the largest weight a layer may round: its kernels sum in their own order."""
EVERY = 20
"""From so many computed layers on, each push compares one more, which is a few percent of the work."""
_NO_CALL = (AttributeError, ConfigError, LiveTensorReached, LookupError, RuntimeError, TypeError, ValueError)
"""A foreign layer that cannot be called alone raises one of these."""
_WORDS = (str, int, float, bool, torch.dtype, torch.Size)


class LayerProof:
    """Which structures of layers are proven. One per bound model; used by one push at a time.

    A structure is everything of a layer but its values: classes, quantisation state, storage, shape, adapters that act,
    their scaling and whether they are merged.
    """

    def __init__(self) -> None:
        self._proven: set[Hashable] = set()
        self._open: dict[Hashable, str] = {}
        self._last: tuple[Sequence[EffectiveTensor], LoraState, tuple[str, ...]] | None = None
        self._turn = 0

    def require(self, computed: Sequence[EffectiveTensor], began: LoraState) -> tuple[str, ...]:
        """Compare one layer of each structure that is not proven yet, and of many layers one more.

        Returns why packed weights could not be compared, one reason for each structure. Raises UnsupportedLora, naming
        layer and quantiser, for a difference.
        """
        last = self._last
        if last is None or last[0] is not computed or last[1] != began:
            reasons = [self._prove(one, began) for one in computed if not one.bias]
            last = self._last = (computed, began, tuple(dict.fromkeys(r for r in reasons if r is not None)))
        elif len(computed) >= EVERY:
            self._turn += 1
            one = computed[self._turn % len(computed)]
            if not one.bias:
                _compare(one, began.read_chain(one.module), lora_parameters(one.module), began)
        return last[2]

    def _prove(self, one: EffectiveTensor, began: LoraState) -> str | None:
        """Compare a layer whose structure is new; why that cannot be done, for a packed weight."""
        chain, parameters = began.read_chain(one.module), lora_parameters(one.module)
        key = _structure(one, chain, parameters)
        if key not in self._proven and key not in self._open:
            reason = _compare(one, chain, parameters, began)
            if reason is None or not packed(parameters):
                self._proven.add(key)
            else:
                self._open[key] = f"{one.place.clean} and layers like it: {reason}"
        return self._open.get(key)


def _compare(one: EffectiveTensor, chain: Chain, parameters: LoraParameters, began: LoraState) -> str | None:
    """Call a copy of the layer; None when it agrees, else why it could not be asked. Raises UnsupportedLora."""
    if parameters.kind not in ("linear", "embedding") or one.copies is not None or len(one.stand_in.shape) != 2:
        return f"a layer of kind {parameters.kind} cannot be called alone"
    computed = one.compute(as_stored, began, torch.float64)
    transposed = parameters.kind == "linear" and parameters.transposed
    weight = computed.double().t() if transposed else computed.double()
    inputs, rows = _inputs(parameters, weight, one)
    try:
        got = _call(one.module, inputs)
        bias = None if rows else effective_bias(one.module, torch.float64, chain=chain)
    except _NO_CALL as error:
        return f"its forward cannot be called on a copy ({type(error).__name__}: {error})"
    if rows:
        wanted = weight[inputs] * float(getattr(chain.base, "embed_scale", 1.0))
    else:
        wanted = inputs.double() @ weight.t() + (0.0 if bias is None else bias.double())
    if got.shape != wanted.shape:
        return f"its forward gives {list(got.shape)} for {list(inputs.shape)}"
    finite = wanted.isfinite()  # what is not is refused by name when it is sent
    apart = float((got.double() - wanted)[finite].abs().amax()) if finite.any() else 0.0
    eps = max(torch.finfo(t.dtype).eps for t in (got, computed))
    limit = SLACK * math.sqrt(1 if rows else weight.shape[1]) * eps * _largest(weight, bias)
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


def _largest(*tensors: torch.Tensor | None) -> float:
    found = [t[t.isfinite()].abs() for t in tensors if t is not None]
    return max((float(t.amax()) for t in found if t.numel()), default=0.0)


def _inputs(parameters: LoraParameters, weight: torch.Tensor, one: EffectiveTensor) -> tuple[torch.Tensor, bool]:
    """Inputs for the layer, and whether they are token ids."""
    generator = torch.Generator().manual_seed(0)
    if parameters.kind == "embedding":
        ids = torch.randint(0, weight.shape[0], (ROWS,), generator=generator)
        return ids.to(weight.device), True
    signs = torch.randint(0, 2, (ROWS, weight.shape[1]), generator=generator) * 2 - 1
    return signs.to(weight.device, one.stand_in.dtype), False


def _call(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    double = shielded_copy(module)
    for each in double.modules():
        each.training = False
        each._forward_hooks.clear()
        each._forward_pre_hooks.clear()
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False), ReferenceGuard(module):
        out: Any = double(inputs)
    if not isinstance(out, torch.Tensor) or not out.is_floating_point():
        raise TypeError(f"its output is {type(out).__name__}")
    return out


def _structure(one: EffectiveTensor, chain: Chain, parameters: LoraParameters) -> Hashable:
    levels = tuple((type(lv.wrapper), lv.state, lv.names, lv.owned, lv.setting, lv.tokens) for lv in chain.levels)
    weight = parameters.weight
    held = (type(weight), weight.dtype, weight.shape, tuple(sorted(vars(weight))), parameters.bias is not None)
    return type(chain.base), levels, held, _words(parameters.quant_state), one.place.attribute, one.copies


def _words(state: Any) -> Hashable:
    """A quantisation state's class and settings, without its tensors."""
    found = vars(state).items() if hasattr(state, "__dict__") and not isinstance(state, nn.Module) else ()
    return type(state), tuple(sorted((k, str(v)) for k, v in found if isinstance(v, _WORDS)))


def _library(chain: Chain, parameters: LoraParameters) -> str:
    state = parameters.quant_state
    kept = "stored as its values" if state is None else f"read through {type(state).__module__}.{type(state).__name__}"
    return f"{type(chain.base).__module__}.{type(chain.base).__name__}, {kept}"
