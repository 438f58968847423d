"""Compute the effective weight and bias of a layer, out of place, in every state of its adapters.

Effective is what the layer's eval-mode forward computes with, not PEFT's `merge()`; where the two differ, the forward
is followed. Nothing of the live model is written, merged, unmerged or called. Sums are made in fp32, or in the
parameter's dtype where that is wider, and rounded once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace

import torch
from torch import nn

from trainer_side.lora.layers.dequant import dequantize
from trainer_side.lora.layers.factors import expert_factors, expert_rows, low_rank, product, rows_of, wide_dtype
from trainer_side.lora.layers.read import is_transposed, kind_of, require_stored, stored, stored_bias
from trainer_side.lora.layers.refusals import reason_of
from trainer_side.lora.layers.values import ActiveLora, LayerState, SentValues, as_stored
from trainer_side.lora.layers.wrapper_chain import Chain, Level, is_attention, read_chain
from trainer_side.names.naming import identity_of

BLOCK = 1 << 24
"""Elements whose sum is in memory at a time, besides the result."""


def effective_weight(
    module: nn.Module,
    dtype: torch.dtype,
    given: SentValues | None = None,
    *,
    attribute: str | None = None,
    copies: int | None = None,
    chain: Chain | None = None,
) -> torch.Tensor:
    """Compute the weight that a layer's eval-mode forward uses, in the shape and orientation it is stored in.

    Called once per push and layer, from any thread; the time grows with the layer's size.

    Args:
        module: the outermost wrapper of a layer, or a plain layer.
        dtype: of the result, rounded once; where it is wider than the dtype of the sum, the result has the latter.
        given: maps a live tensor to the values that the caller of `push` sent for it.
        attribute: the parameter of the layer inside, where wrappers act on several (expert parameters); default the
            one that the outermost wrapper acts on.
        copies: how often the forward adds each adapter: 1, but for an attention layer's output projection, see
            `attention_output`.
        chain: an earlier reading of the module, for a caller who compared it with the state of the push.

    Where no adapter acts the result may share memory with the live parameter: do not write to it.

    Raises UnsupportedLora for what `reason_of` finds, ConfigError for a module without that weight.
    """
    chain = chain or read_chain(module)
    name = attribute or chain.attribute
    reason = reason_of(chain, copies, name)
    if reason is not None:
        raise reason.error(type(module).__name__)
    weight = require_stored(chain, name, type(module).__name__)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        return _Weight(chain, name, weight, given or as_stored, copies).compute(dtype)


def effective_bias(
    module: nn.Module,
    dtype: torch.dtype,
    given: SentValues | None = None,
    *,
    copies: int | None = None,
    chain: Chain | None = None,
) -> torch.Tensor | None:
    """Compute the bias that a layer's eval-mode forward adds; None for a layer without one.

    Arguments, returned dtype and errors as of `effective_weight`. `lora_bias` is scaled like its adapter, and by the
    DoRA adapters that come after it; PEFT's attention never adds the one of its input projection.
    """
    chain = chain or read_chain(module)
    name = chain.attribute
    bias = stored_bias(chain.base, name)
    if bias is None or kind_of(chain, name, bias) == "parameter":
        return None if bias is None else _rounded((given or as_stored)(bias), dtype, wide_dtype([bias]))
    reason = reason_of(chain, copies, name)
    if reason is not None:
        raise reason.error(type(module).__name__)
    with torch.no_grad(), torch.autocast(bias.device.type, enabled=False):
        return _bias(chain, name, bias, dtype, given or as_stored, copies)


def attention_output(module: nn.Module) -> nn.Module | None:
    """Return the LoRA layer that is the output projection of a wrapped attention layer; None for other wrappers.

    Its forward is never called: the wrapper merges its adapters into it twice
    (https://github.com/huggingface/peft/pull/3774), so the attention computes with `copies=2`.
    """
    chain = read_chain(module)
    if not chain.levels or not is_attention(chain.base):
        return None
    found = (getattr(chain.base, "_modules", None) or {}).get("out_proj")
    return found if isinstance(found, nn.Module) else None


def effective_identity(module: nn.Module, attribute: str = "weight", *, copies: int | None = None) -> Hashable:
    """Return a key that is equal for two layers whose effective tensors are the same by construction.

    That is the same stored tensor with the same factors added in the same order. Compares addresses, not values; valid
    until the model changes.

    A tied embedding and head with the same LoRA (`ensure_weight_tying`) are equal, though one holds the transposes of
    the other's factors.
    """
    chain = read_chain(module)
    biased = attribute in ("bias", "in_proj_bias") and attribute != chain.attribute
    name = chain.attribute if biased else attribute
    stored_tensor = stored_bias(chain.base, name) if biased else stored(chain.base, attribute)
    if stored_tensor is None:
        return ("nothing", id(chain.base), attribute)
    weight = stored(chain.base, name)
    kind = kind_of(chain, name, stored_tensor if weight is None else weight)
    transposed = kind == "embedding" or (weight is not None and kind == "linear" and is_transposed(chain, weight))
    deltas = tuple(
        item for level in chain.on(name) if level.names for item in _level_identity(level, kind, transposed, biased)
    )
    times = 1 if copies is None or not deltas else copies
    return (_address(stored_tensor), deltas, times)


_Factors = tuple[torch.Tensor, torch.Tensor]
_Term = tuple[float, ActiveLora]
"""How often an adapter is added, and the adapter; negative to take it out again."""


class _Weight:
    """One computation of an effective weight.

    Attributes:
        base: the stored values, dequantised.
        under: the adapters that change the base under all wrappers; `over`: those added to a layer's output, in order.
            Adapters on the parameter itself act before those on the layer: DoRA's norm sees them. What was merged is
            taken out of the base first, as PEFT does before it computes.
        wide: the dtype of the sums.
    """

    def __init__(self, chain: Chain, name: str, weight: torch.Tensor, given: SentValues, copies: int | None) -> None:
        self.given = given
        self.kind = kind_of(chain, name, weight)
        self.transposed = self.kind == "linear" and is_transposed(chain, weight)
        self.levels = [level for level in chain.on(name) if level.names]
        self.base = dequantize(chain.base, weight, given).detach()
        self.under: list[_Term] = []
        self.over: list[_Term] = []
        for level in self.levels:
            times = (copies or 1) * (-1.0 if level.state is LayerState.MERGED_DISABLED else 1.0)
            # The magnitude that was sent; the factors are replaced where they are expanded.
            sent = [a if a.magnitude is None else replace(a, magnitude=given(a.magnitude)) for a in level.loras]
            (self.under if times < 0 or self.kind == "parameter" else self.over).extend((times, a) for a in sent)
        self.wide = wide_dtype([self.base, *(t for _, a in (*self.under, *self.over) for t in a.tensors)])

    def compute(self, dtype: torch.dtype) -> torch.Tensor:
        """Compute the weight, rounded to `dtype` once; a block of rows at a time: rows do not depend on each other."""
        result = self.base
        if self.under or self.over:
            narrow = dtype if dtype.itemsize <= self.wide.itemsize else self.wide
            result = torch.empty(self.base.shape, dtype=narrow, device=self.base.device)
            for source, target, factors in self.parts(result):
                step = max(1, BLOCK // max(1, source.shape[1]))
                for start in range(0, source.shape[0], step):
                    block = slice(start, start + step)
                    target[block].copy_(self.rows(source[block], block, factors)[0])
        # Rows of trainable tokens have the weight's dtype in the forward too.
        for row in (row for level in self.levels for row in level.rows()):
            index = torch.tensor(row.indices, dtype=torch.long, device=result.device)
            result = result.index_copy(0, index, self.given(row.values).detach().to(result))
        return _rounded(result, dtype, self.wide)

    def parts(self, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[_Factors]]]:
        """Yield (rows of the base, rows of `out`, each adapter's factors) of every matrix: one, or one per expert."""
        base, loras = self.base, [lora for _, lora in (*self.under, *self.over)]
        if self.kind == "parameter" and base.dim() == 3:
            for expert in range(base.shape[0]):
                found = [expert_factors(lora, expert, self.wide, self.given) for lora in loras]
                yield expert_rows(base, expert, loras[0]), expert_rows(out, expert, loras[0]), self._moved(found)
            return
        factors = self._moved([low_rank(lora, self.wide, self.given) for lora in loras])
        source = base if base.is_contiguous() or self.kind != "conv" else base.contiguous()
        yield rows_of(source, self.kind, self.transposed), rows_of(out, self.kind, self.transposed), factors

    def _moved(self, factors: list[_Factors]) -> list[_Factors]:
        return [(a.to(self.base.device), b.to(self.base.device)) for a, b in factors]

    def rows(
        self, source: torch.Tensor, block: slice, factors: list[_Factors]
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Compute the effective rows of a block, and the factor of the output before each adapter of `over` (DoRA)."""
        base = source.to(self.wide, copy=True)
        deltas = [
            product(b[block], a, times * lora.scaling)
            for (a, b), (times, lora) in zip(factors, self.under + self.over, strict=True)
        ]
        for delta in deltas[: len(self.under)]:
            base += delta
        # Every norm is of the base and one adapter, never of the running sum.
        running = base.clone() if any(lora.magnitude is not None for _, lora in self.over) else base
        scales: list[torch.Tensor | None] = []
        for (_, lora), delta in zip(self.over, deltas[len(self.under) :], strict=True):
            running += delta
            scale = None
            if lora.magnitude is not None:
                norm = torch.linalg.vector_norm(base + delta, dim=1)
                scale = lora.magnitude.detach().flatten()[block].to(base.device, self.wide) / norm
                running *= scale[:, None]
            scales.append(scale)
        return running, scales


def _bias(
    chain: Chain, name: str, bias: torch.Tensor, dtype: torch.dtype, given: SentValues, copies: int | None
) -> torch.Tensor:
    levels = [level for level in chain.on(name) if level.names]
    is_linear = not isinstance(getattr(chain.base, "num_embeddings", None), int)
    if is_linear and any(level.tokens and level.state is LayerState.ACTIVE for level in levels):
        # PEFT's token layer around a linear one calls the matrix product without the bias.
        return torch.zeros_like(bias, dtype=dtype)
    acting = [] if name == "in_proj_weight" else [(level, a) for level in levels for a in level.loras]
    wide = wide_dtype([bias, *(t for _, a in acting for t in a.tensors)])
    if not any(a.bias is not None for _, a in acting):
        return _rounded(given(bias).detach(), dtype, wide)
    scales = _dora_scales(chain, name, given, copies)
    base, extra = given(bias).detach().to(wide, copy=True), torch.zeros_like(bias, dtype=wide)
    for level, lora in acting:
        sign = -1.0 if level.state is LayerState.MERGED_DISABLED else 1.0
        if lora.bias is not None:
            extra += given(lora.bias).to(extra) * (sign * lora.scaling)
        scale = scales.get(id(lora.a)) if scales else None
        if scale is not None:
            extra *= scale
    return _rounded(base + extra, dtype, wide)


def _dora_scales(chain: Chain, name: str, given: SentValues, copies: int | None) -> dict[int, torch.Tensor]:
    """Compute each acting DoRA adapter's factor, by its A: it multiplies everything before it but the base's bias."""
    weight = stored(chain.base, name)
    if weight is None or all(a.magnitude is None for level in chain.on(name) for a in level.loras):
        return {}
    one = _Weight(chain, name, weight, given, copies)
    (source, _, factors), *_ = one.parts(one.base)
    scales = one.rows(source, slice(None), factors)[1]
    return {id(lora.a): scale for (_, lora), scale in zip(one.over, scales, strict=True) if scale is not None}


def _rounded(tensor: torch.Tensor, dtype: torch.dtype, wide: torch.dtype) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to(dtype) if dtype.itemsize <= wide.itemsize else tensor.to(wide)


def _level_identity(level: Level, kind: str, transposed: bool, biased: bool) -> Iterator[Hashable]:
    for row in level.rows():
        yield "rows", row.indices, _address(row.values)
    for lora in level.loras:
        extra = [(k, _address(v) if isinstance(v, torch.Tensor) else v) for k, v in sorted(lora.extra.items())]
        effect = (lora.scaling, level.state is LayerState.MERGED_DISABLED, tuple(extra))
        if biased:
            if lora.bias is not None:
                yield *effect, _address(lora.bias)
            if lora.magnitude is None:
                continue
        factors = [identity_of(id(factor), factor) for factor in (lora.b, lora.a)]
        if transposed and lora.a.dim() == 2:
            factors = [identity_of(id(factor), factor.t()) for factor in (lora.a, lora.b)]
        norm = None if lora.magnitude is None else (_address(lora.magnitude), kind == "embedding", transposed)
        yield *effect, *factors, norm


def _address(tensor: torch.Tensor) -> Hashable:
    return identity_of(id(tensor), tensor)
