"""Mixture of experts: fused expert weights, sharded along the intermediate dimension, and the block around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import nn
from torch.nn import functional

from bridge.errors import ConfigError, ProtocolError
from engine_side.embedded.layers import ReplicatedLinear
from engine_side.embedded.layouts import ExpertsMethod, Layout
from engine_side.embedded.parallel import Parallel, divide
from engine_side.embedded.weights import Cut, block_of, parameter, write_cuts

Activation = Callable[[torch.Tensor], torch.Tensor]


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": functional.relu,
}


def activation(name: str) -> Activation:
    """The function of a config's `hidden_act`. Raises ConfigError."""
    try:
        return _ACTIVATIONS[name]
    except KeyError:
        raise ConfigError("unsupported activation", expected=" | ".join(_ACTIVATIONS), got=repr(name)) from None


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
                expected=f"{self.experts} experts in equal groups, 1 to all of them used",
                got=f"{self.groups} groups, {self.top_groups} used",
            )
        if not 0 < self.top_k <= self.experts // self.groups * self.top_groups:
            expected = f"1 to {self.experts // self.groups * self.top_groups}, the experts of the groups that are used"
            raise ConfigError("a token cannot use so many experts", expected=expected, got=str(self.top_k))


class ExpertDeltas(Protocol):
    """What LoRA adapters add inside one expert, for the tokens [k] that are routed to it; both may work in place."""

    def gate_up(self, out: torch.Tensor, x: torch.Tensor, tokens: torch.Tensor, expert: int) -> torch.Tensor:
        """`out` [k, 2I] of x [k, hidden] -> the same with the adapters' part."""
        ...

    def down(self, out: torch.Tensor, x: torch.Tensor, tokens: torch.Tensor, expert: int) -> torch.Tensor:
        """`out` [k, hidden] of x [k, I] -> the same with the adapters' part."""
        ...


class FusedMoE(nn.Module):
    """All experts of a layer: `w13_weight` [E, 2I, H] (gate over up) and `w2_weight` [E, H, I]; I is divided
    over ranks."""

    deltas: ExpertDeltas | None = None
    """Set by a LoRA wrapper for the time of one forward."""

    def __init__(
        self, config: MoEConfig, hidden: int, act: Activation, dtype: torch.dtype, tp: Parallel, layout: Layout
    ) -> None:
        super().__init__()
        size = divide(config.intermediate_size, tp.size, "the experts' intermediate size")
        self.num_experts = config.experts
        self.hidden_size = hidden
        self.intermediate_size = config.intermediate_size
        self.intermediate_size_per_partition = size
        self.params_dtype = dtype
        self.act = act
        self.tp = tp
        self.quant_method: ExpertsMethod = layout.experts()
        self.w13_weight = parameter(
            (config.experts, 2 * size, hidden), dtype, self.weight_loader, input_dim=2, output_dim=1, tp_rank=tp.rank
        )
        self.w2_weight = parameter(
            (config.experts, hidden, size), dtype, self.weight_loader, input_dim=2, output_dim=1, tp_rank=tp.rank
        )

    def weight_loader(
        self, param: nn.Parameter, loaded: torch.Tensor, shard_id: object = None, expert_id: int = -1
    ) -> None:
        """One matrix of one expert: `shard_id` "w1" (gate), "w3" (up) or "w2" (down)."""
        if not 0 <= expert_id < self.num_experts:
            raise ProtocolError("no such expert", expected=f"0 .. {self.num_experts - 1}", got=str(expert_id))
        cuts = self.cuts.get(shard_id)
        if cuts is None:
            raise ProtocolError("experts were given no such part", expected="w1 | w2 | w3", got=repr(shard_id))
        write_cuts(param.data[expert_id], loaded, [cut.blocks(n) for cut, n in zip(cuts, block_of(param))])

    @property
    def cuts(self) -> Mapping[object, tuple[Cut, Cut]]:
        """Part -> which outputs and inputs of an expert's matrix lie where on this rank."""
        size, whole, hidden = self.intermediate_size_per_partition, self.intermediate_size, Cut.all_of(self.hidden_size)
        start = self.tp.rank * size
        return {
            "w1": (Cut(0, start, size, whole), hidden),
            "w3": (Cut(size, start, size, whole), hidden),
            "w2": (hidden, Cut(0, start, size, whole)),
        }

    def local(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum: [n, hidden], routing weights and ids [n, k] -> [n, hidden]."""
        return self.quant_method.apply(self, x, weights, ids)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(self.local(x, weights, ids))


class Router(ReplicatedLinear):
    """Hidden states [n, hidden] -> logits [n, experts]. Never quantised: a flipped choice of expert is no rounding."""

    quantizable: ClassVar[bool] = False


class SoftmaxTopK(nn.Module):
    """Softmax over all experts in float32, then the best `top_k`. Weights in the hidden states' dtype, as transformers
    has them in the Qwen families."""

    router_dtype: torch.dtype | None = None
    """What the logits are computed in, at least; None: in what everything else is."""

    def __init__(self, config: MoEConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config

    def forward(self, logits: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [n, experts] -> weights, ids [n, top_k]."""
        weights, ids = functional.softmax(logits, dim=-1, dtype=torch.float32).topk(self.config.top_k, dim=-1)
        if self.config.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(dtype), ids


class GroupedTopK(nn.Module):
    """DeepSeek-V2: softmax, the groups with the best single expert, of these the best `top_k`. All in float32."""

    router_dtype: torch.dtype | None = torch.float32

    def __init__(self, config: MoEConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config

    def forward(self, logits: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [n, experts] -> weights, ids [n, top_k]."""
        scores = logits.softmax(dim=-1)
        weights, ids = self._among_groups(scores, scores, best=1).topk(self.config.top_k, dim=-1)
        return self._scaled(weights), ids

    def _among_groups(self, scores: torch.Tensor, choice: torch.Tensor, best: int) -> torch.Tensor:
        """`scores` outside the groups whose `best` experts add up to most in `choice` become -inf."""
        groups = self.config.groups
        if groups == 1:
            return scores
        ranked = choice.view(len(choice), groups, -1).topk(best, dim=-1).values.sum(dim=-1)
        outside = torch.ones_like(ranked, dtype=torch.bool)
        outside.scatter_(1, ranked.topk(self.config.top_groups, dim=-1).indices, False)
        return scores.masked_fill(outside.repeat_interleave(scores.shape[1] // groups, dim=1), -torch.inf)

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
        """Logits [n, experts] -> weights, ids [n, top_k]."""
        scores = logits.sigmoid()
        choice = scores + self.e_score_correction_bias
        ids = self._among_groups(choice, choice, best=min(2, self.config.experts // self.config.groups)).topk(
            self.config.top_k, dim=-1
        )[1]
        return self._scaled(scores.gather(1, ids)), ids


class SparseMoeBlock(nn.Module):
    """Router and experts; beside them, where the family has them, experts that every token goes through (`shared`)."""

    def __init__(
        self,
        config: MoEConfig,
        hidden: int,
        act: Activation,
        dtype: torch.dtype,
        tp: Parallel,
        layout: Layout,
        *,
        routing: type[SoftmaxTopK] | type[GroupedTopK] = SoftmaxTopK,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.router_dtype = dtype if routing.router_dtype is None else torch.promote_types(dtype, routing.router_dtype)
        self.routing = routing(config, self.router_dtype)
        self.gate = Router(hidden, config.experts, False, self.router_dtype, tp, layout)
        self.experts = FusedMoE(config, hidden, act, dtype, tp, layout)
        self.shared_experts = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.routing(self.gate(x.to(self.router_dtype)), x.dtype)
        out: torch.Tensor = self.experts(x, weights, ids)
        return out if self.shared_experts is None else out + self.shared_experts(x)
