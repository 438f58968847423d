"""Multi-head latent attention (DeepSeek), absorbed as vLLM does it: the cache holds one latent per token, and two
tensors that are derived from `kv_b_proj` take queries into its space and its sums out of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from engine_side.embedded.attention import CachedAttention, Step, paged_attention, rotate, rotate_interleaved
from engine_side.embedded.config import ModelConfig, read_fields
from engine_side.embedded.layers import (
    ColumnParallelLinear,
    LayerContext,
    LinearBase,
    LoraFactors,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RMSNorm,
    RowParallelLinear,
    add_to_rows,
)
from engine_side.embedded.parallel import Parallel, divide
from engine_side.embedded.weights import Layer

_LATENT_EPS = 1e-6
"""transformers gives the norms of the latents their class's default, whatever `rms_norm_eps` says."""
_LATENT_ROWS = 1024


@dataclass(frozen=True)
class MLAConfig:
    """The fields of `config.json` that size a latent attention. `q_lora_rank` None: queries come straight from the
    hidden states."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool = False
    rope_interleave: bool = True

    @classmethod
    def of(cls, config: ModelConfig) -> MLAConfig:
        """Read the fields. Raises ConfigError, naming one that is missing or of another type."""
        return read_fields({"q_lora_rank": None, **config.raw}, cls, "config.json: latent attention")

    @property
    def head_dim(self) -> int:
        """Numbers of one query head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent(self) -> int:
        """Numbers kept of each token: the latent and the rotated part of the key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


class FusedQkvAProj(MergedColumnParallelLinear):
    """`q_a_proj` over `kv_a_proj_with_mqa`, whole on every rank: latents are small, and every rank's heads need all of
    them. A merged layer by its loader, with a forward of its own."""

    def __init__(self, inputs: int, outputs: Sequence[int], bias: bool, context: LayerContext) -> None:
        super().__init__(inputs, outputs, bias, replace(context, tp=Parallel()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [n, hidden] -> [n, sum of outputs], long prefills in slices: they bound a packed kernel's memory."""
        if len(x) <= _LATENT_ROWS:
            return self.local(x)
        return torch.cat([self.local(part) for part in torch.split(x, _LATENT_ROWS)])


class AbsorbMethod:
    """Post-load of an attention: computes `w_uk` and `w_uv` anew from `kv_b_proj`, in the storage they had."""

    def process_weights_after_loading(self, layer: AbsorbedAttention) -> None:
        """Read `kv_b_proj` through its own kernel, whatever became of its storage, and split it by heads."""
        (source,), c = layer.source, layer.config
        eye = torch.eye(c.kv_lora_rank, dtype=source.params_dtype, device=source.weight.device)
        whole = source.quant_method.apply(source, eye, None).view(c.kv_lora_rank, layer.heads, -1)
        keys, values = torch.split(whole, [c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        for name, value in (("w_uk", keys.permute(1, 2, 0)), ("w_uv", values.transpose(0, 1))):
            known = layer.__dict__.get(name)
            if isinstance(known, torch.Tensor) and known.shape == value.shape and known.device == value.device:
                known.copy_(value)
            else:
                setattr(layer, name, value.contiguous())


class AbsorbedAttention(CachedAttention):
    """Attention in the latent space. It holds no weights, only two tensors derived from those of `kv_b_proj`:
    `w_uk` [heads, nope, latent] and `w_uv` [heads, latent, v], plain attributes that no checkpoint and no
    `named_parameters()` shows. Stale until post-load has run after `kv_b_proj` was loaded."""

    w_uk: torch.Tensor
    w_uv: torch.Tensor

    def __init__(self, config: MLAConfig, layer: int, kv_b_proj: LinearBase) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.kv_shapes = ((1, config.latent),)
        self.heads = kv_b_proj.output_size_per_partition // (config.qk_nope_head_dim + config.v_head_dim)
        self.quant_method = AbsorbMethod()
        # In a tuple: it is the neighbour's child, and is not to be found under a second path.
        self.source = (kv_b_proj,)

    def forward(
        self, q: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor, step: Step, loras: Iterable[LoraFactors] = ()
    ) -> torch.Tensor:
        """Attend: queries [n, heads, nope + rope], latents [n, latent], their rotary part [n, rope] -> [n, heads * v].

        `loras` are those of `kv_b_proj`, which is never called. A query's LoRA holds for all keys and values that it
        sees: they are of its own sequence.
        """
        c = self.config
        nope, turned = torch.split(q, [c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        turn = rotate_interleaved if c.rope_interleave else rotate
        turned = turn(turned, step.cos, step.sin)
        rope = turn(rope.unsqueeze(1), step.cos, step.sin).squeeze(1)
        (cache,) = step.kv.write(self.layer, step.slots, torch.cat((latent, rope), dim=-1).unsqueeze(1))
        factors = [self._by_heads(*lora) for lora in loras]
        inside = torch.einsum("nhd,hdc->nhc", nope, self.w_uk)
        for rows, a, keys, _ in factors:
            add_to_rows(inside, rows, torch.einsum("nhd,hdr->nhr", nope[rows].to(a.dtype), keys) @ a)
        q = torch.cat((inside, turned), dim=-1)
        sums = paged_attention(q, cache, cache[..., : c.kv_lora_rank], step, c.head_dim**-0.5)
        out = torch.einsum("nhc,hcv->nhv", sums, self.w_uv)
        for rows, a, _, values in factors:
            add_to_rows(out, rows, torch.einsum("nhr,hvr->nhv", sums[rows].to(a.dtype) @ a.t(), values))
        return out.flatten(1)

    def _by_heads(
        self, rows: torch.Tensor | slice, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor | slice, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (rows, A [rank, latent], B of keys [heads, nope, rank], B of values [heads, v, rank]), widened."""
        wide = torch.promote_types(a.dtype, torch.float32)
        nope, whole = self.config.qk_nope_head_dim, b.to(wide).view(self.heads, -1, b.shape[1])
        return rows, a.to(wide), whole[:, :nope], whole[:, nope:]


class MLAttention(Layer):
    """The projections around an absorbed attention; heads are divided over ranks, latents are not."""

    def __init__(self, config: ModelConfig, layer: int, context: LayerContext) -> None:
        super().__init__()
        c = self.config = MLAConfig.of(config)
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.heads = divide(heads, context.tp.size, "the number of attention heads")
        if c.q_lora_rank is None:
            self.q_proj = ColumnParallelLinear(hidden, heads * c.head_dim, False, context)
            whole = replace(context, tp=Parallel())
            self.kv_a_proj_with_mqa = ReplicatedLinear(hidden, c.latent, c.attention_bias, whole)
        else:
            self.fused_qkv_a_proj = FusedQkvAProj(hidden, (c.q_lora_rank, c.latent), c.attention_bias, context)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, _LATENT_EPS, context.dtype)
            self.q_b_proj = ColumnParallelLinear(c.q_lora_rank, heads * c.head_dim, False, context)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, _LATENT_EPS, context.dtype)
        self.kv_b_proj = ColumnParallelLinear(
            c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), False, context
        )
        self.o_proj = RowParallelLinear(heads * c.v_head_dim, hidden, c.attention_bias, context)
        # The last child: post-load visits modules in this order, and it reads what kv_b_proj has become.
        self.mla_attn = AbsorbedAttention(c, layer, self.kv_b_proj)

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """Compute [n, hidden] -> [n, hidden]; writes the new latents first."""
        c = self.config
        if c.q_lora_rank is None:
            q, latents = self.q_proj(x), self.kv_a_proj_with_mqa(x)
        else:
            low, latents = torch.split(self.fused_qkv_a_proj(x), [c.q_lora_rank, c.latent], dim=-1)
            q = self.q_b_proj(self.q_a_layernorm(low))
        latent, rope = torch.split(latents, [c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        loras = self.kv_b_proj.lora_factors(len(x))
        heads = self.mla_attn(q.view(len(x), self.heads, c.head_dim), self.kv_a_layernorm(latent), rope, step, loras)
        return self.o_proj(heads)
