"""Call a copy of a layer, and compare what it gives with what the tensors that were computed for it give.

The copy's adapters get drawn factors of the size of the weight, and the tensors are computed from the same: a fresh
adapter, whose B is zero, would show nothing of how it acts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bridge.errors import ConfigError, UnsupportedLora
from bridge.protocol.deadline import Deadline
from trainer_side.lora.layers.dequant import dequantize
from trainer_side.lora.layers.effective import BLOCK, effective_bias, effective_weight
from trainer_side.lora.layers.factors import coarse_products
from trainer_side.lora.layers.read import parameters_of, require_stored
from trainer_side.lora.layers.values import LoraParameters, SentValues, as_stored
from trainer_side.lora.layers.wrapper_chain import Chain
from trainer_side.lora.modes import EffectiveTensor
from trainer_side.lora.state import LoraState
from trainer_side.shielded.guards import LiveTensorReached, ReferenceGuard
from trainer_side.shielded.layer_calls import LayerCall
from trainer_side.shielded.model_copy import ModelCopier

ROWS = 8
"""Inputs of one comparison that are made here."""
SLACK = 8.0
"""How much more than sqrt(inputs) x eps x the largest weight a layer may round: its kernels sum in their own order, and
those of quantised layers in bfloat16 whatever they return (bitsandbytes on CPUs with avx512_bf16)."""
_NO_CALL = (AttributeError, ConfigError, LiveTensorReached, LookupError, RuntimeError, TypeError, ValueError)
"""A foreign layer that cannot be called raises one of these."""
_WHOLE = frozenset({0})
"""The parts of a weight that is one matrix."""


@dataclass(frozen=True, eq=False)
class LayerReading:
    """A layer for which a tensor is computed, read once.

    Attributes:
        outer: what the model calls: the outermost wrapper around the layer, or the layer itself.
        chain: of `outer`.
        parameters: as the wrapper that acts on the tensor sees them.
    """

    tensor: EffectiveTensor
    outer: nn.Module
    chain: Chain
    parameters: LoraParameters

    @classmethod
    def of(cls, tensor: EffectiveTensor, began: LoraState) -> LayerReading:
        """Read a layer. Raises IntegrityError when it is set to something else than in the state `began`."""
        wrappers = tensor.place.wrappers
        outer = wrappers[0].module if wrappers else tensor.module
        parameters = parameters_of(began.read_chain(tensor.module), type(tensor.module).__name__)
        return cls(tensor, outer, began.read_chain(outer), parameters)

    @property
    def packed(self) -> bool:
        """True where the stored numbers are not the weight's values."""
        return self.parameters.quant_state is not None

    @property
    def parts(self) -> frozenset[int]:
        """Number the matrices that make up the weight: one per expert."""
        weight = self.parameters.weight
        stacked = self.parameters.kind == "parameter" and weight.dim() == 3
        return frozenset(range(weight.shape[0])) if stacked else _WHOLE

    @property
    def attributes(self) -> tuple[str, ...]:
        """Name the parameters of the layer inside that wrappers act on."""
        found = dict.fromkeys(level.attribute for level in self.chain.levels)
        return tuple(found) or (self.chain.attribute,)

    @property
    def is_product(self) -> bool:
        """True for a layer that multiplies by its weight, or looks rows of it up, and adds its bias; no more."""
        one = self.tensor
        return self.parameters.kind in ("linear", "embedding") and self.outer is one.module and one.stand_in.dim() == 2

    def compute(self, given: SentValues, dtype: torch.dtype, attribute: str | None = None) -> torch.Tensor:
        """Compute the effective value of one of `attributes`; default that of the outermost wrapper."""
        return effective_weight(self.outer, dtype, given, attribute=attribute, chain=self.chain).detach()


def compare_layer(
    layer: LayerReading, calls: Sequence[LayerCall] = (), deadline: Deadline | None = None, *, draw: bool = True
) -> frozenset[int] | str:
    """Compare a layer with what is computed for it, on given calls, else on one that is made here.

    `draw`: with drawn factors in the place of the adapters' own.

    Returns the parts of the weight that acted and were right, or why the layer could not be called. Raises
    UnsupportedLora, naming layer and quantiser, for a difference; DeadlineExceeded.
    """
    own = not calls
    if layer.tensor.copies is not None or layer.parameters.kind == "attention":
        return "its wrapper merges into it in every forward, so it is not called"
    if not layer.tensor.stand_in.numel():
        return layer.parts
    calls = calls or _make_call(layer)
    if not calls:
        return f"a layer of kind {layer.parameters.kind} cannot be called alone"
    found: set[int] = set()
    try:
        with ReferenceGuard(layer.outer, live=False, deadline=deadline):  # of a sharded layer nothing is computed alone
            drawn = _draw_factors(layer) if draw else _Drawn()
            expected = (_Product if layer.is_product else _Twin)(layer, drawn)
    except _NO_CALL as error:
        return f"its values cannot be computed here ({type(error).__name__}: {error})"
    for call in calls:
        answer = _call(layer, call, drawn, deadline, own=own)
        if isinstance(answer, str):
            return answer
        got, used = answer
        try:
            with ReferenceGuard(layer.outer, expected.lent, deadline=deadline):
                wanted, acted = expected.answer(used)
        except _NO_CALL as error:
            return f"what is computed for it cannot be called ({type(error).__name__}: {error})"
        if got.shape != wanted.shape:
            return f"its forward gives {list(got.shape)} where its weight gives {list(wanted.shape)}"
        if acted and expected.finite:  # what is not finite is refused by name when it is sent
            coarse = [got.dtype, layer.tensor.stand_in.dtype]
            if layer.packed or coarse_products():
                coarse.append(torch.bfloat16)
            limit = SLACK * expected.rounding(used, wanted, max(torch.finfo(dtype).eps for dtype in coarse))
            _require_alike(layer, got, wanted, limit, own=own)
        found |= acted
    return frozenset(found) or "its weight had no say in its output"


class _Drawn:
    """Factors in the place of those of the adapters that act on a layer: live tensor -> values, as `SentValues`."""

    def __init__(self) -> None:
        self.values: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._by_id: dict[int, torch.Tensor] = {}

    def add(self, live: torch.Tensor, values: torch.Tensor) -> None:
        self.values.append((live, values))
        self._by_id[id(live)] = values

    def __call__(self, live: torch.Tensor) -> torch.Tensor:
        return self._by_id.get(id(live), live)


def _draw_factors(layer: LayerReading) -> _Drawn:
    """Draw A and B of every acting adapter, so that each one's product is about as large as the weight."""
    drawn, generator = _Drawn(), torch.Generator().manual_seed(0)
    for level in layer.chain.levels:
        size = 0.0
        for lora in level.loras:
            if not size:
                weight = require_stored(layer.chain, level.attribute, type(layer.outer).__name__)
                values = dequantize(layer.chain.base, weight, as_stored)
                size = float(torch.linalg.vector_norm(values, dtype=torch.float32)) / math.sqrt(values.numel()) or 1.0
            rank = max(1, lora.a.shape[0] // int(lora.extra.get("experts", 1)))
            for factor, spread in ((lora.a, rank**-0.5), (lora.b, size / (abs(lora.scaling) or 1.0))):
                values = torch.randn(factor.shape, generator=generator) * spread
                drawn.add(factor, values.to(factor.device, factor.dtype))
    return drawn


class _Product:
    """Computes what a linear layer or an embedding of the computed weight gives."""

    lent: Sequence[torch.Tensor] = ()

    def __init__(self, layer: LayerReading, drawn: _Drawn) -> None:
        p = layer.parameters
        weight = layer.compute(drawn, layer.tensor.stand_in.dtype)
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.rows = p.kind == "embedding"
        self.weight = weight.t() if p.kind == "linear" and p.transposed else weight
        self.bias = None if self.rows else effective_bias(layer.outer, self.wide, drawn, chain=layer.chain)
        self.factor = float(getattr(layer.chain.base, "embed_scale", 1.0)) if self.rows else 1.0
        self.reach = max(float(torch.stack(t.aminmax()).abs().amax()) for t in (weight, self.bias) if t is not None)
        self.finite = math.isfinite(self.reach)

    def answer(self, call: LayerCall) -> tuple[torch.Tensor, frozenset[int]]:
        """Compute the output. Raises LookupError for a call without an input at the first place."""
        inputs: torch.Tensor = call.args[0]
        if self.rows:
            return self.weight[inputs].to(self.wide) * self.factor, _WHOLE
        bias = 0.0 if self.bias is None else self.bias.to(self.wide)
        return _product(inputs.to(self.wide), self.weight, self.wide) + bias, _WHOLE

    def rounding(self, call: LayerCall, _: torch.Tensor, eps: float) -> torch.Tensor:
        """Return sqrt(inputs) x eps x the largest weight x the largest input."""
        if self.rows:
            return torch.tensor(eps * self.reach * abs(self.factor))
        reach: torch.Tensor = call.args[0].abs().amax().to(self.wide) * self.reach
        return math.sqrt(self.weight.shape[1]) * eps * reach


class _Twin:
    """Computes what the layer inside all wrappers gives with the computed tensors as its own parameters."""

    def __init__(self, layer: LayerReading, drawn: _Drawn) -> None:
        base, copier = layer.chain.base, ModelCopier()
        self.module = copier.copy(base)
        _set_for_call(self.module)
        self.lent, self.copier = copier.lent, copier
        for name in layer.attributes:
            stored = require_stored(layer.chain, name, type(base).__name__)
            plain = stored.dtype.is_floating_point and stored.dtype.itemsize > 1
            value = layer.compute(drawn, stored.dtype if plain else layer.tensor.stand_in.dtype, name)
            self.module._parameters[name] = nn.Parameter(value.clone())
        bias = getattr(base, "bias", None)
        if isinstance(bias, torch.Tensor) and layer.parameters.kind != "parameter":
            added = effective_bias(layer.outer, bias.dtype, drawn, chain=layer.chain)
            self.module._parameters["bias"] = None if added is None else nn.Parameter(added.clone())
        self.weight: Any = self.module._parameters[layer.tensor.place.attribute]
        self.parts, self.by_row = layer.parts, layer.parameters.kind == "parameter"
        self.finite = all(bool(p.isfinite().all()) for p in self.module.parameters() if p.dtype.is_floating_point)

    def answer(self, call: LayerCall) -> tuple[torch.Tensor, frozenset[int]]:
        """Call the twin; its gradient tells which parts of the weight had a say in the answer."""
        with torch.enable_grad(), torch.autocast(self.weight.device.type, enabled=False):
            out = _output(self.module(*call.args, **call.kwargs))
            signs = _signs(out.shape).to(out.device, out.dtype)
            moved: Any = torch.autograd.grad(out, [self.weight], signs, allow_unused=True)[0]
        if moved is None:
            return out.detach(), frozenset()
        acted = moved.reshape(len(self.parts), -1).ne(0).any(dim=1).tolist()
        return out.detach(), frozenset(part for part in self.parts if acted[part])

    def rounding(self, _: LayerCall, wanted: torch.Tensor, eps: float) -> torch.Tensor:
        """Return (eps + sqrt(inputs) x eps of the sums) x the largest output, of its row where outputs are rows."""
        shape = self.weight.shape[1:]
        inputs = max(shape) if self.by_row else math.prod(shape)
        summed = torch.finfo(torch.promote_types(wanted.dtype, torch.float32)).eps * math.sqrt(inputs)
        largest = wanted.abs().amax(dim=-1, keepdim=True) if self.by_row else wanted.abs().amax()
        return (eps + summed) * largest


def _call(
    layer: LayerReading, call: LayerCall, drawn: _Drawn, deadline: Deadline | None, *, own: bool
) -> tuple[torch.Tensor, LayerCall] | str:
    """Call a copy of the layer, on inputs of our own in the first dtype that it takes; else why it cannot be called.

    A layer that writes to its weights (PEFT unmerges in the next forward) gets weights of its own.
    """
    reason, announced = "", layer.tensor.stand_in.dtype
    dtypes = dict.fromkeys((announced, torch.float32, torch.bfloat16, torch.float16)) if own else (None,)
    for dtype in dtypes:
        used = call if dtype is None else LayerCall(tuple(_in_dtype(a, dtype) for a in call.args), call.kwargs)
        for lent in (True, False):
            try:
                return _call_copy(layer, used, drawn, deadline, lent=lent), used
            except _NO_CALL as error:
                reason = reason or f"its forward cannot be called on a copy ({type(error).__name__}: {error})"
                if layer.packed or not isinstance(error, ConfigError):
                    break
    return reason


def _call_copy(
    layer: LayerReading, call: LayerCall, drawn: _Drawn, deadline: Deadline | None, *, lent: bool
) -> torch.Tensor:
    """Call one copy of the layer with the drawn factors, over the layer's weights or (not `lent`) over its own."""
    copier = ModelCopier()
    double = copier.copy(layer.outer)
    _set_for_call(double)
    for parameter in double.parameters() if not lent else ():
        parameter.data = parameter.data.clone()
    for live, values in drawn.values:
        copier.double_of(live).data = values
    with (
        torch.no_grad(),
        torch.autocast(layer.parameters.weight.device.type, enabled=False),
        ReferenceGuard(layer.outer, copier.lent, deadline=deadline),
    ):
        return _output(double(*call.args, **call.kwargs))


def _set_for_call(module: nn.Module) -> None:
    for each in module.modules():
        each.training = False
        each._forward_hooks.clear()
        each._forward_pre_hooks.clear()


def _output(out: Any) -> torch.Tensor:
    """Return the values that a layer gives, the first of several. Raises TypeError for something else."""
    first = out[0] if isinstance(out, (tuple, list)) and out else out
    if isinstance(first, torch.Tensor) and first.is_floating_point():
        return first
    raise TypeError(f"it gives {type(out).__name__}")


def _require_alike(
    layer: LayerReading, got: torch.Tensor, wanted: torch.Tensor, limit: torch.Tensor, *, own: bool
) -> None:
    """Raise UnsupportedLora for outputs that are further apart than the limit."""
    wide = torch.promote_types(wanted.dtype, torch.float32)
    apart = (got.to(wide) - wanted.to(wide)).abs()
    limit = limit.to(apart).expand_as(apart)
    if bool((apart <= limit).all()):
        return
    worst = int((apart - limit).nan_to_num(math.inf).argmax())
    inputs = f"{ROWS} rows of random signs" if own else "what the layer gets in the canary's forward"
    other = "load the base model in 16 bit" if layer.packed else "take this layer out of the adapter"
    raise UnsupportedLora(
        "what is computed for a layer is not what the layer computes",
        where=layer.tensor.place.clean,
        expected=f"outputs within {float(limit.flatten()[worst]):.3g} of the layer's own ({_library(layer)})",
        got=f"{float(apart.flatten()[worst]):.3g} apart, on {inputs}",
        remedy=f"push the adapter alone (mode='adapter'), or {other}",
        names=(layer.tensor.place.clean,),
    )


def _make_call(layer: LayerReading) -> list[LayerCall]:
    """Make inputs for a layer that can be called alone: random signs, which activation quantisers hold exactly, or ids.
    Nothing for a layer whose inputs only its model knows."""
    kind, shape, device = layer.parameters.kind, layer.tensor.stand_in.shape, layer.parameters.weight.device
    if kind == "embedding" and layer.is_product:
        replaced = [index for row in layer.parameters.rows for index in row.indices[:ROWS]]
        ids = torch.randint(0, shape[0], (ROWS,), generator=torch.Generator().manual_seed(0)).tolist()
        return [LayerCall((torch.tensor(ids + replaced, device=device),), {})]
    base = layer.chain.base
    if (kind == "linear" and layer.is_product) or isinstance(base, nn.Linear):
        inputs = shape[0] if layer.parameters.transposed else shape[1]
        return [LayerCall((_signs((ROWS, inputs)).to(device),), {})]
    sizes = [getattr(base, name, None) for name in ("kernel_size", "dilation", "stride")]
    if kind == "conv" and all(isinstance(size, tuple) for size in sizes):
        # two places for the kernel to stand, along each dimension
        extent = [d * (k - 1) + 1 + s for k, d, s in zip(*sizes, strict=True)]
        return [LayerCall((_signs((ROWS, shape[1] * int(getattr(base, "groups", 1)), *extent)).to(device),), {})]
    return []


def _signs(shape: Sequence[int]) -> torch.Tensor:
    drawn = torch.randint(0, 2, tuple(shape), generator=torch.Generator().manual_seed(0))
    return (drawn * 2 - 1).to(torch.float64)


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _product(inputs: torch.Tensor, weight: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Multiply in `wide`, a block of outputs at a time: no copy of a whole weight is made."""
    step = max(1, BLOCK // max(1, weight.shape[1]))
    return torch.cat([inputs @ block.to(wide).t() for block in torch.split(weight, step)], dim=-1)


def _library(layer: LayerReading) -> str:
    base, state = layer.chain.base, layer.parameters.quant_state
    kept = "stored as its values" if state is None else f"read through {type(state).__module__}.{type(state).__name__}"
    return f"{type(base).__module__}.{type(base).__name__}, {kept}"
