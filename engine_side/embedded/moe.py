"""Feed-forwards: the dense one, and experts whose fused weights are sharded along the intermediate dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from bridge.errors import REPORT, ConfigError, ProtocolError
from engine_side.embedded.config import ModelConfig
from engine_side.embedded.layers import LayerContext, MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from engine_side.embedded.layouts import FusedMoEMethod
from engine_side.embedded.weights import Cut, Layer, load_cuts, sharded_parameter

Activation = Callable[[torch.Tensor], torch.Tensor]


_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def activation(name: str) -> Activation:
    """Return the function of a config's `hidden_act`. Raises ConfigError."""
    if name not in _ACTIVATIONS:
        where, expected = "config.json: hidden_act", " | ".join(_ACTIVATIONS)
        raise ConfigError(
            "unsupported activation",
            where=where,
            expected=expected,
            got=repr(name),
            remedy="serve this model with vLLM or SGLang",
        )
    return _ACTIVATIONS[name]


class MLP(Layer):
    """Gated feed-forward with a fused `gate_up_proj`; `size` None takes the config's intermediate size."""

    def __init__(self, config: ModelConfig, bias: bool, context: LayerContext, size: int | None = None) -> None:
        super().__init__()
        hidden, size = config.hidden_size, size or config.intermediate_size
        self.act = activation(config.hidden_act)
        self.gate_up_proj = MergedColumnParallelLinear(hidden, (size, size), bias, context)
        self.down_proj = RowParallelLinear(size, hidden, bias, context)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)


@dataclass(frozen=True)
class MoEConfig:
    """Routing of one sparse block, as the checkpoint's config gives it.

    Attributes:
        groups, top_groups: experts lie in `groups` equal groups, of which a token may use the best `top_groups`.
        scale: factor on the weights of the chosen experts.
    """

    experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.experts % self.groups or not 0 < self.top_groups <= self.groups:
            raise ConfigError(
                "the experts cannot be grouped so",
                where="config.json: n_group, topk_group",
                expected=f"{self.experts} experts in equal groups, 1 to all of them used",
                got=f"{self.groups} groups, {self.top_groups} used",
                remedy="correct them: the checkpoint's own config.json has them",
            )
        if not 0 < self.top_k <= self.experts // self.groups * self.top_groups:
            expected = f"1 to {self.experts // self.groups * self.top_groups}, the experts of the groups that are used"
            raise ConfigError(
                "a token cannot use so many experts",
                where="config.json: num_experts_per_tok",
                expected=expected,
                got=str(self.top_k),
                remedy="correct it: the checkpoint's own config.json has it",
            )


ExpertLora = Callable[[str, int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called as (shard id, expert, out, x, tokens): adds, in place, the effect of these tokens' [k] LoRAs on one matrix of
an expert to the layer's outputs `out` [k, 2I or hidden] of the inputs `x` [k, hidden or I]."""


class FusedMoE(Layer):
    """All experts of a layer: `w13_weight` [E, 2I, H] (gate over up) and `w2_weight` [E, H, I]; I is divided
    over ranks."""

    lora: ExpertLora | None = None
    """Set by a LoRA wrapper for the time of one forward."""

    def __init__(self, config: MoEConfig, hidden: int, act: Activation, context: LayerContext) -> None:
        super().__init__()
        tp, experts = context.tp, config.experts
        inner = Cut.of_rank(config.intermediate_size, tp, "the experts' intermediate size")
        above, whole = replace(inner, offset=inner.size), Cut.all_of(hidden)
        self.cuts: Mapping[object, tuple[Cut, Cut]] = {"w1": (inner, whole), "w3": (above, whole), "w2": (whole, inner)}
        self.num_experts = experts
        self.params_dtype = dtype = context.dtype
        self.act = act
        self.tp = tp
        self.quant_method: FusedMoEMethod = context.layout.experts(context.layout.storage)
        self.w13_weight = sharded_parameter((experts, 2 * inner.size, hidden), dtype, self.weight_loader, tp)
        self.w2_weight = sharded_parameter((experts, hidden, inner.size), dtype, self.weight_loader, tp)

    def weight_loader(
        self, param: nn.Parameter, loaded: torch.Tensor, shard_id: object = None, expert_id: int = -1
    ) -> None:
        """Write one matrix of one expert: `shard_id` "w1" (gate), "w3" (up) or "w2" (down). Raises ProtocolError,
        ShapeMismatch, DtypeMismatch."""
        cuts = self.cuts.get(shard_id)
        if cuts is None or not 0 <= expert_id < self.num_experts:
            raise ProtocolError(
                "the experts have no such part",
                where="shard_id",
                expected=f"w1 | w2 | w3 of expert 0 to {self.num_experts - 1}",
                got=f"{shard_id!r} of expert {expert_id}",
                remedy=REPORT,
            )
        load_cuts(param, param.data[expert_id], loaded, cuts)

    def local(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Compute this rank's part of the sum: [n, hidden], routing weights and ids [n, k] -> [n, hidden]."""
        return self.quant_method.apply(self, x, weights, ids)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(self.local(x, weights, ids))


class SoftmaxTopK(nn.Module):
    """Routing of the Qwen families, and base of the others': logits [n, experts] -> weights and ids [n, top_k] of the
    chosen experts. Softmax over all experts in float32, then the best `top_k`. Weights in the hidden states' dtype, as
    transformers has them."""

    least_dtype: torch.dtype | None = None
    """Lowest dtype of the logits; None: the dtype of the other layers."""

    def __init__(self, config: MoEConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config

    def forward(self, logits: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = functional.softmax(logits, dim=-1, dtype=torch.float32).topk(self.config.top_k, dim=-1)
        if self.config.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(dtype), ids


class GroupedTopK(SoftmaxTopK):
    """DeepSeek-V2: softmax, the groups with the best single expert, of these the best `top_k`. All in float32."""

    least_dtype = torch.float32

    def forward(self, logits: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = self._best(logits.softmax(dim=-1), experts_per_group=1)
        return self._scaled(weights), ids

    def _best(self, scores: torch.Tensor, experts_per_group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose `top_k` experts of the groups whose best `experts_per_group` add up to most."""
        groups = self.config.groups
        if groups > 1:
            ranked = scores.view(len(scores), groups, -1).topk(experts_per_group, dim=-1).values.sum(dim=-1)
            outside = torch.ones_like(ranked, dtype=torch.bool)
            outside.scatter_(1, ranked.topk(self.config.top_groups, dim=-1).indices, False)
            scores = scores.masked_fill(outside.repeat_interleave(scores.shape[1] // groups, dim=1), -torch.inf)
        best = scores.topk(self.config.top_k, dim=-1)
        return best.values, best.indices

    def _scaled(self, weights: torch.Tensor) -> torch.Tensor:
        if self.config.renormalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.config.scale


class CorrectedTopK(GroupedTopK):
    """DeepSeek-V3: sigmoid scores; a learned correction decides who is chosen but not the weight. It is trained outside
    the gradient, hence a persistent buffer here as in trainers."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: MoEConfig, dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        self.register_buffer("e_score_correction_bias", torch.zeros(config.experts, dtype=dtype))

    def forward(self, logits: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits.sigmoid()
        choice = scores + self.e_score_correction_bias
        _, ids = self._best(choice, experts_per_group=min(2, self.config.experts // self.config.groups))
        return self._scaled(scores.gather(1, ids)), ids


class SparseMoeBlock(Layer):
    """Router and experts; beside them, where the family has them, so many experts that every token goes through
    (`shared`)."""

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, context: LayerContext, routing: type[SoftmaxTopK], shared: int = 0
    ) -> None:
        super().__init__()
        self.router_dtype = torch.promote_types(context.dtype, routing.least_dtype or context.dtype)
        self.routing = routing(moe, self.router_dtype)
        self.gate = ReplicatedLinear(config.hidden_size, moe.experts, False, replace(context, dtype=self.router_dtype))
        self.gate.quantizable = False  # another choice of experts would be more than a rounding error
        self.experts = FusedMoE(moe, config.hidden_size, activation(config.hidden_act), context)
        self.shared_experts = MLP(config, False, context, shared * moe.intermediate_size) if shared else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.routing(self.gate(x.to(self.router_dtype)), x.dtype)
        out = self.experts(x, weights, ids)
        return out if self.shared_experts is None else out + self.shared_experts(x)
