"""Tiny random models of every family, made from configs: awkward vocabularies, grouped heads, biases that matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

SIZES: Mapping[str, Any] = {
    "vocab_size": 411,  # not a multiple of 64: vLLM pads it
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _qwen2(**changes: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "tie_word_embeddings": False, **changes}))


def _qwen3(**changes: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 32, "tie_word_embeddings": False, **changes}))


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **changes}))


def _gemma2(**changes: Any) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {**SIZES, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": True}
    return Gemma2ForCausalLM(Gemma2Config(**{**sizes, **changes}))


def _phi3(**changes: Any) -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {**SIZES, "original_max_position_embeddings": 512, "tie_word_embeddings": False}
    return Phi3ForCausalLM(Phi3Config(**{**sizes, **changes}))


def _qwen3_moe(**changes: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {
        **SIZES, "head_dim": 32, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
        "norm_topk_prob": True, "tie_word_embeddings": False,
    }  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **changes}))


def _deepseek(**changes: Any) -> Any:
    """As DeepSeek's own checkpoints with yarn: vLLM's rotary kernel for CPU, which it takes for plain positions, leaves
    most of what latent attention hands it as it was, and its own load of a checkpoint is wrong then."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {
        **SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 512,
        "q_lora_rank": 64, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "routed_scaling_factor": 1.0, "norm_topk_prob": True, "tie_word_embeddings": False, "rope_interleave": True,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 256,
            "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
        },
    }  # fmt: skip
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**sizes, **changes}))


FAMILIES: Mapping[str, Callable[..., Any]] = {
    "qwen2": _qwen2,
    "qwen2-tied": lambda **changes: _qwen2(**{"tie_word_embeddings": True, **changes}),
    "qwen3": _qwen3,
    "llama": _llama,
    "gemma2": _gemma2,
    "phi3": _phi3,
    "qwen3-moe": _qwen3_moe,
    "deepseek": _deepseek,
}


WITH_LORA: Mapping[str, Callable[..., Any]] = {
    **{family: make for family, make in FAMILIES.items() if family not in ("qwen3-moe", "deepseek")},
    "deepseek-dense": lambda **changes: _deepseek(**{"first_k_dense_replace": 2, **changes}),
}
"""With LoRA vLLM runs experts by a Triton kernel, also where adapters leave them alone, and ends on a CPU machine:
AttributeError: module 'triton.language' has no attribute 'bfloat16'."""


def _bloom() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=411, hidden_size=128, n_layer=2, n_head=4))


def _olmo2() -> Any:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    return Olmo2ForCausalLM(Olmo2Config(**{**SIZES, "tie_word_embeddings": False}))


def _gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    yarn = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 256, "truncate": False,
    }  # fmt: skip
    sizes = {
        **SIZES, "head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64,
        "rope_parameters": yarn, "tie_word_embeddings": False,
    }  # fmt: skip
    return GptOssForCausalLM(GptOssConfig(**sizes))


OTHERS: Mapping[str, Callable[..., Any]] = {"bloom": _bloom, "olmo2": _olmo2, "gpt-oss": _gpt_oss}
"""Families that nothing was written for."""


STATE_SPACE: Mapping[str, Any] = {
    "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 32,
    "mamba_n_groups": 1, "mamba_chunk_size": 16, "tie_word_embeddings": False,
}  # fmt: skip


def _falcon_h1() -> Any:
    from transformers import FalconH1Config, FalconH1ForCausalLM

    return FalconH1ForCausalLM(FalconH1Config(**{**SIZES, **STATE_SPACE, "head_dim": 32, "mamba_d_ssm": 256}))


def _granite_hybrid() -> Any:
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    sizes = {
        **SIZES, **STATE_SPACE, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 64, "position_embedding_type": "rope",
    }  # fmt: skip
    return GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**sizes))


def _qwen3_next() -> Any:
    """As its checkpoints, 64 features in every head: vLLM's kernels for CPU take no fewer."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    sizes = {
        **SIZES, "head_dim": 64, "full_attention_interval": 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    return Qwen3NextForCausalLM(Qwen3NextConfig(**sizes))


def _mamba2() -> Any:
    """One layer: rounding to bf16 moves transformers' own answer of two by as much as an engine may be off."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {
        **SIZES, "num_hidden_layers": 1, "state_size": 16, "num_heads": 8, "head_dim": 32, "n_groups": 1,
        "chunk_size": 16, "tie_word_embeddings": False,
    }  # fmt: skip
    return Mamba2ForCausalLM(Mamba2Config(**sizes))


def _nemotron_h() -> Any:
    from transformers import NemotronHConfig, NemotronHForCausalLM

    sizes = {
        **SIZES, "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mlp"], "head_dim": 32,
        "mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16,
        "conv_kernel": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    return NemotronHForCausalLM(NemotronHConfig(**sizes))


def _zamba2() -> Any:
    from transformers import Zamba2Config, Zamba2ForCausalLM

    sizes = {
        **SIZES, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "num_mem_blocks": 1,
        "adapter_rank": 8, "num_key_value_heads": 4, "attention_head_dim": 64, "attention_hidden_size": 256,
        "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_ngroups": 1, "n_mamba_heads": 8,
        "mamba_headdim": 32, "chunk_size": 16, "tie_word_embeddings": True,
    }  # fmt: skip
    return Zamba2ForCausalLM(Zamba2Config(**sizes))


def _lfm2() -> Any:
    """With the names of its own checkpoints beside those of transformers: vLLM reads them."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    sizes = {
        **SIZES, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "conv_dim": 128, "block_dim": 128,
        "block_ff_dim": 256, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True,
    }  # fmt: skip
    return Lfm2ForCausalLM(Lfm2Config(**sizes))


RECURRENT: Mapping[str, Callable[..., Any]] = {
    "falcon-h1": _falcon_h1,
    "granite-hybrid": _granite_hybrid,
    "qwen3-next": _qwen3_next,
    "mamba2": _mamba2,
    "nemotron-h": _nemotron_h,
    "zamba2": _zamba2,
    "lfm2": _lfm2,
}
"""Families whose layers keep a state from token to token."""


def make_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A bf16 transformers model whose log-probabilities are not flat."""
    torch.manual_seed(seed)
    model = {**FAMILIES, **WITH_LORA, **OTHERS, **RECURRENT}[family](**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model.to(torch.bfloat16).eval()


def perturb(model: Any, seed: int) -> None:
    """An optimiser's step: every parameter, and every buffer that a checkpoint holds, moves by a fifth of its size."""
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for tensor in {id(tensor): tensor for tensor in saved.values()}.values():
            noise = torch.randn(tensor.shape, generator=generator)
            scale = tensor.float().std() if tensor.numel() > 1 else tensor.float().abs()
            scale = scale if bool(scale > 0) else torch.tensor(0.1)
            tensor.add_((noise * 0.2 * scale).to(tensor.dtype))
