"""Multi-head latent attention (DeepSeek), absorbed as vLLM does it: the cache holds one latent per token, and two
tensors that are derived from `kv_b_proj` take queries into its space and its sums out of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bridge.errors import ConfigError
from engine_side.embedded.attention import Step, paged_attention, rotate, rotate_interleaved
from engine_side.embedded.config import ModelConfig
from engine_side.embedded.kv import KVShape
from engine_side.embedded.layers import (
    Adapter,
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RMSNorm,
    RowParallelLinear,
)
from engine_side.embedded.layouts import Layout
from engine_side.embedded.parallel import Parallel, divide

_LATENT_EPS = 1e-6
"""transformers gives the norms of the latents their class's default, whatever `rms_norm_eps` says."""
_LATENT_ROWS = 1024


@dataclass(frozen=True)
class MLAConfig:
    """The sizes of one latent attention. `q_lora_rank` None: queries come straight from the hidden states."""

    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    bias: bool
    interleaved: bool

    @classmethod
    def of(cls, config: ModelConfig) -> MLAConfig:
        """Raises ConfigError, naming the field that `config.json` lacks."""

        def need(name: str) -> int:
            value = config.raw.get(name)
            if value is None:
                raise ConfigError("config.json lacks a field of latent attention", where=f"config.json: {name}")
            return int(value)

        rank = config.raw.get("q_lora_rank")
        return cls(
            q_lora_rank=None if rank is None else int(rank),
            kv_lora_rank=need("kv_lora_rank"),
            nope_dim=need("qk_nope_head_dim"),
            rope_dim=need("qk_rope_head_dim"),
            v_dim=need("v_head_dim"),
            bias=bool(config.raw.get("attention_bias", False)),
            interleaved=bool(config.raw.get("rope_interleave", True)),
        )

    @property
    def head_dim(self) -> int:
        """Of one query head."""
        return self.nope_dim + self.rope_dim

    @property
    def latent(self) -> int:
        """Numbers kept of each token: the latent and the rotated part of the key."""
        return self.kv_lora_rank + self.rope_dim


class FusedQkvAProj(MergedColumnParallelLinear):
    """`q_a_proj` over `kv_a_proj_with_mqa`, whole on every rank: latents are small, and every rank's heads need all of
    them. A merged layer by its loader, with a forward of its own."""

    def __init__(self, inputs: int, outputs: Sequence[int], bias: bool, dtype: torch.dtype, layout: Layout) -> None:
        super().__init__(inputs, outputs, bias, dtype, Parallel(), layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, sum of outputs]; long prefills in slices, which bounds what a packed kernel holds."""
        if len(x) <= _LATENT_ROWS:
            return self.local(x)
        return torch.cat([self.local(part) for part in torch.split(x, _LATENT_ROWS)])


class AbsorbMethod:
    """Post-load of an attention: what is derived from `kv_b_proj` is computed anew, in the storage it had."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.absorb()


class AbsorbedAttention(nn.Module):
    """Attention in the latent space. Holds no weights, only what it derived from those of `kv_b_proj`:
    `w_uk` [heads, nope, latent] and `w_uv` [heads, latent, v], plain attributes that no checkpoint and no
    `named_parameters()` shows. Stale until post-load has run after `kv_b_proj` was loaded."""

    w_uk: torch.Tensor
    w_uv: torch.Tensor

    def __init__(self, config: MLAConfig, layer: int, kv_b_proj: LinearBase) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.kv_shape = KVShape(1, (config.latent,))
        self.heads = kv_b_proj.output_size_per_partition // (config.nope_dim + config.v_dim)
        self.quant_method = AbsorbMethod()
        # In a tuple: it is the neighbour's child, and is not to be found under a second path.
        self._source = (kv_b_proj,)

    def absorb(self) -> None:
        """Read `kv_b_proj` through its own kernel, whatever became of its storage, and split it by heads."""
        source, c = self._source[0], self.config
        eye = torch.eye(c.kv_lora_rank, dtype=source.params_dtype, device=source.weight.device)
        whole = source.quant_method.apply(source, eye, None).view(c.kv_lora_rank, self.heads, -1)
        keys, values = torch.split(whole, [c.nope_dim, c.v_dim], dim=-1)
        self._derive("w_uk", keys.permute(1, 2, 0))
        self._derive("w_uv", values.transpose(0, 1))

    def _derive(self, name: str, value: torch.Tensor) -> None:
        known = self.__dict__.get(name)
        if isinstance(known, torch.Tensor) and known.shape == value.shape and known.device == value.device:
            known.copy_(value)
        else:
            setattr(self, name, value.contiguous())

    def forward(
        self, q: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor, step: Step, adapters: Iterable[Adapter] = ()
    ) -> torch.Tensor:
        """Queries [n, heads, nope + rope], latents [n, latent] and their rotary part [n, rope] -> [n, heads * v].

        `adapters` are those of `kv_b_proj`, which nobody calls. A query's adapter holds for all keys and values that it
        sees: they are of its own sequence.
        """
        c = self.config
        nope, turned = torch.split(q, [c.nope_dim, c.rope_dim], dim=-1)
        if step.cos is not None and step.sin is not None:
            turn = rotate_interleaved if c.interleaved else rotate
            turned = turn(turned, step.cos, step.sin)
            rope = turn(rope.unsqueeze(1), step.cos, step.sin).squeeze(1)
        (cache,) = step.kv.layer(self.layer)
        cache.view(-1, c.latent)[step.slots] = torch.cat((latent, rope), dim=-1)
        pairs = [self._by_heads(adapter) for adapter in adapters]
        inside = torch.einsum("nhd,hdc->nhc", nope, self.w_uk)
        for rows, a, keys, _ in pairs:
            _add(inside, rows, torch.einsum("nhd,hdr->nhr", nope[rows].to(a.dtype), keys) @ a)
        q = torch.cat((inside, turned), dim=-1)
        sums = paged_attention(q, cache, cache[..., : c.kv_lora_rank], step, c.head_dim**-0.5)
        out = torch.einsum("nhc,hcv->nhv", sums, self.w_uv)
        for rows, a, _, values in pairs:
            _add(out, rows, torch.einsum("nhr,hvr->nhv", sums[rows].to(a.dtype) @ a.t(), values))
        return out.flatten(1)

    def _by_heads(self, adapter: Adapter) -> tuple[torch.Tensor | slice, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(rows, A [rank, latent], B of the keys [heads, nope, rank], B of the values [heads, v, rank]), widened."""
        rows, a, b = adapter
        wide = torch.promote_types(a.dtype, torch.float32)
        c, whole = self.config, b.to(wide).view(self.heads, -1, b.shape[1])
        return slice(None) if rows is None else rows, a.to(wide), whole[:, : c.nope_dim], whole[:, c.nope_dim :]


def _add(out: torch.Tensor, rows: torch.Tensor | slice, effect: torch.Tensor) -> None:
    """Add to some rows in place, rounding once."""
    out[rows] = (out[rows].to(effect.dtype) + effect).to(out.dtype)


class MLAttention(nn.Module):
    """The projections around an absorbed attention; heads are divided over ranks, latents are not."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, tp: Parallel, layout: Layout) -> None:
        super().__init__()
        c = self.config = MLAConfig.of(config)
        hidden, heads = config.hidden_size, config.num_heads
        self.heads = divide(heads, tp.size, "the number of attention heads")
        if c.q_lora_rank is None:
            self.q_proj = ColumnParallelLinear(hidden, heads * c.head_dim, False, dtype, tp, layout)
            self.kv_a_proj_with_mqa = ReplicatedLinear(hidden, c.latent, c.bias, dtype, Parallel(), layout)
        else:
            self.fused_qkv_a_proj = FusedQkvAProj(hidden, (c.q_lora_rank, c.latent), c.bias, dtype, layout)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, _LATENT_EPS, dtype)
            self.q_b_proj = ColumnParallelLinear(c.q_lora_rank, heads * c.head_dim, False, dtype, tp, layout)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, _LATENT_EPS, dtype)
        kv_b_proj = ColumnParallelLinear(c.kv_lora_rank, heads * (c.nope_dim + c.v_dim), False, dtype, tp, layout)
        self.kv_b_proj = kv_b_proj
        self.o_proj = RowParallelLinear(heads * c.v_dim, hidden, c.bias, dtype, tp, layout)
        # The last child: post-load visits modules in this order, and it reads what kv_b_proj has become.
        self.mla_attn = AbsorbedAttention(c, layer, kv_b_proj)

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """[n, hidden] -> [n, hidden]; writes the new latents first."""
        c = self.config
        if c.q_lora_rank is None:
            q, latents = self.q_proj(x), self.kv_a_proj_with_mqa(x)
        else:
            low, latents = self.fused_qkv_a_proj(x).split((c.q_lora_rank, c.latent), dim=-1)
            q = self.q_b_proj(self.q_a_layernorm(low))
        latent, rope = latents.split((c.kv_lora_rank, c.rope_dim), dim=-1)
        adapters = self.kv_b_proj.adapters(len(x))
        heads = self.mla_attn(q.view(len(x), self.heads, c.head_dim), self.kv_a_layernorm(latent), rope, step, adapters)
        out: torch.Tensor = self.o_proj(heads)
        return out
