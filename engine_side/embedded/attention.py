"""Rotary embedding and grouped-query attention over paged keys and values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from engine_side.embedded.config import ModelConfig
from engine_side.embedded.kv import KVTensors
from engine_side.embedded.layers import LayerContext, QKVParallelLinear, RMSNorm, RowParallelLinear
from engine_side.embedded.weights import Layer


def _llama3(inverse: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Long wavelengths slowed by `factor`, short ones kept, a smooth step between."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inverse
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * inverse / factor + smooth * inverse
    out = torch.where(wavelength > context / low, inverse / factor, between)
    return torch.where(wavelength < context / high, inverse, out)


class RotaryEmbedding(nn.Module):
    """Computes cos and sin by position. Its frequencies come from the config: a buffer that no checkpoint holds."""

    inverse: torch.Tensor

    def __init__(self, config: Mapping[str, Any], head_dim: int) -> None:
        super().__init__()
        theta: float = config["rope_theta"]
        # On the CPU in a skeleton too: on the meta device these lines alone make torch import its compiler, a second.
        inverse = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim))
        if config["rope_type"] == "llama3":
            inverse = _llama3(inverse, config)
        elif config["rope_type"] == "linear":
            inverse = inverse / float(config["factor"])
        self.register_buffer("inverse", inverse.to(torch.get_default_device()), persistent=False)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute positions [n] -> cos, sin [n, 1, head_dim]."""
        angles = positions.float().unsqueeze(-1) * self.inverse
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary embedding (neox style) to [n, heads, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotate` for vectors whose pairs lie side by side (DeepSeek). The result has the halves apart, as transformers
    has it; queries and keys are both turned so, which leaves their products what they are."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.chunk(2, dim=-1)[0], sin.chunk(2, dim=-1)[0]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@dataclass
class Step:
    """One forward over several sequences: new tokens, places of their keys and values, attention mask.

    `row`, `column` [n] place the flat tokens in the padded [batch, queries] frame; `blocks` [batch, k] are the block
    tables; `mask` [batch, 1, queries, k * block_size] is True where a query sees a key; `slots` [n] are flat KV places.
    `cos`, `sin` [n, 1, head_dim] are the decoder's.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    blocks: torch.Tensor
    mask: torch.Tensor
    slots: torch.Tensor
    kv: KVTensors
    cos: torch.Tensor = field(init=False)
    sin: torch.Tensor = field(init=False)

    @classmethod
    def build(
        cls, tokens: Sequence[int], counts: Sequence[int], starts: Sequence[int], tables: Sequence[Sequence[int]],
        kv: KVTensors,
    ) -> Step:  # fmt: skip
        """Lay out `counts` new tokens of each sequence from positions `starts` on; `tables` are their block tables."""
        number = torch.tensor(counts)
        row = torch.repeat_interleave(torch.arange(len(counts)), number)
        column = torch.arange(len(tokens)) - (number.cumsum(0) - number)[row]
        positions = torch.tensor(starts)[row] + column
        width = max(len(table) for table in tables)
        blocks = torch.tensor([[*table, *[0] * (width - len(table))] for table in tables])
        slots = blocks[row, positions // kv.block_size] * kv.block_size + positions % kv.block_size
        frame = torch.zeros(len(counts), max(counts), dtype=torch.int64)
        frame[row, column] = positions
        mask = torch.arange(width * kv.block_size) <= frame.unsqueeze(-1)
        return cls(torch.tensor(tokens), positions, row, column, blocks, mask.unsqueeze(1), slots, kv)


def paged_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: Step, scale: float | None = None
) -> torch.Tensor:
    """Attend: queries [n, heads, d], paged keys [blocks, block_size, kv heads, d], values [.., d'] -> [n, heads, d'].

    `scale` None: one over the root of d.
    """
    batch, queries = step.blocks.shape[0], step.mask.shape[2]
    frame = q.new_zeros(batch, queries, *q.shape[1:])
    frame[step.row, step.column] = q
    past_k, past_v = (
        step.kv.read(cache, step.blocks, q.dtype).flatten(1, 2).transpose(1, 2) for cache in (keys, values)
    )
    gqa = q.shape[1] != keys.shape[2]
    out = functional.scaled_dot_product_attention(
        frame.transpose(1, 2), past_k, past_v, attn_mask=step.mask, scale=scale, enable_gqa=gqa
    )
    return out.transpose(1, 2)[step.row, step.column]


class CachedAttention(Layer):
    """Base of attentions that cache entries per token: the number of the layer, and (heads, width) of each entry on
    this rank."""

    layer: int
    kv_shapes: Sequence[tuple[int, int]]


class Attention(CachedAttention):
    """Grouped-query attention with a fused, sharded `qkv_proj`; query and key norms per head where the family has
    them."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        context: LayerContext,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        hidden, heads, width = config.hidden_size, config.num_attention_heads, config.head_dim
        self.layer = layer
        self.head_dim = width
        qkv = QKVParallelLinear(hidden, width, heads, config.num_key_value_heads, qkv_bias, context)
        self.heads, self.kv_heads = qkv.heads, qkv.kv_heads
        self.split_sizes = [cut.size for cut in qkv.output_cuts.values()]
        self.kv_shapes = ((qkv.kv_heads, width),) * 2
        self.qkv_proj = qkv
        self.o_proj = RowParallelLinear(heads * width, hidden, output_bias, context)
        self.q_norm = RMSNorm(width, config.rms_norm_eps, context.dtype) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, config.rms_norm_eps, context.dtype) if qk_norm else nn.Identity()

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """Compute [n, hidden] -> [n, hidden]; writes the new keys and values first."""
        n = x.shape[0]
        q, k, v = torch.split(self.qkv_proj(x), self.split_sizes, dim=-1)
        q = self.q_norm(q.view(n, self.heads, self.head_dim))
        k = self.k_norm(k.view(n, self.kv_heads, self.head_dim))
        q, k = rotate(q, step.cos, step.sin), rotate(k, step.cos, step.sin)
        keys, values = step.kv.write(self.layer, step.slots, k, v.view(n, self.kv_heads, self.head_dim))
        return self.o_proj(paged_attention(q, keys, values, step).flatten(1))
