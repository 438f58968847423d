"""Mixture of experts: fused expert weights, sharded along the intermediate dimension, and the block around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from bridge.errors import ConfigError, ProtocolError
from engine_side.embedded.layers import ReplicatedLinear
from engine_side.embedded.layouts import ExpertsMethod, Layout
from engine_side.embedded.parallel import Parallel, divide
from engine_side.embedded.weights import expect_shape, parameter, write

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
    """Routing of one sparse block, as the checkpoint's config gives it."""

    experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool


class FusedMoE(nn.Module):
    """All experts of a layer: `w13_weight` [E, 2I, H] (gate over up) and `w2_weight` [E, H, I]; I is divided
    over ranks."""

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
        size = self.intermediate_size_per_partition
        start = self.tp.rank * size
        dest = param.data[expert_id]
        if shard_id == "w2":
            expect_shape(loaded, (self.hidden_size, self.intermediate_size))
            write(dest, loaded.narrow(1, start, size))
        elif shard_id in ("w1", "w3"):
            expect_shape(loaded, (self.intermediate_size, self.hidden_size))
            write(dest.narrow(0, 0 if shard_id == "w1" else size, size), loaded.narrow(0, start, size))
        else:
            raise ProtocolError("experts were given no such part", expected="w1 | w2 | w3", got=repr(shard_id))

    def local(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum: [n, hidden], routing weights and ids [n, k] -> [n, hidden]."""
        return self.quant_method.apply(self, x, weights, ids)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(self.local(x, weights, ids))


class SparseMoeBlock(nn.Module):
    """Router and experts; softmax over all experts in float32, then top-k, as transformers does it."""

    def __init__(
        self, config: MoEConfig, hidden: int, act: Activation, dtype: torch.dtype, tp: Parallel, layout: Layout
    ) -> None:
        super().__init__()
        self.config = config
        self.gate = ReplicatedLinear(hidden, config.experts, False, dtype, tp, layout)
        self.experts = FusedMoE(config, hidden, act, dtype, tp, layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.gate(x)
        weights, ids = functional.softmax(logits, dim=-1, dtype=torch.float32).topk(self.config.top_k, dim=-1)
        if self.config.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out: torch.Tensor = self.experts(x, weights.to(x.dtype), ids)
        return out
