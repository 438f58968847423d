"""Tiny random checkpoints of every family, with sizes chosen to be awkward, and what transformers says about them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

COMMON = {
    "vocab_size": 173,
    "hidden_size": 48,
    "intermediate_size": 90,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "moe_intermediate_size": 26,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
}
GROUPED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"head_dim": 12}),
    "llama-biased": (
        transformers.LlamaConfig,
        {
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 1,
            "intermediate_size": 91,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 1}),
    "qwen3": (
        transformers.Qwen3Config,
        {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    ),
    "qwen3-biased": (transformers.Qwen3Config, {"head_dim": 10, "attention_bias": True}),
    "moe": (
        transformers.Qwen3MoeConfig,
        {
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 26,
            "norm_topk_prob": True,
        },
    ),
    "moe-mixed": (
        transformers.Qwen3MoeConfig,
        {
            "head_dim": 8,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 22,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
        },
    ),
    "deepseek-v3": (transformers.DeepseekV3Config, LATENT | GROUPED | {"q_lora_rank": 20}),
    "deepseek-v3-plain": (  # no low rank for queries, biases, rope in halves, one group, no dense layer
        transformers.DeepseekV3Config,
        LATENT
        | {
            "q_lora_rank": None,
            "attention_bias": True,
            "rope_interleave": False,
            "n_routed_experts": 5,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
            "num_hidden_layers": 2,
            "routed_scaling_factor": 1.0,
        },
    ),
    "deepseek-v2": (
        transformers.DeepseekV2Config,
        LATENT | GROUPED | {"q_lora_rank": 20, "topk_method": "group_limited_greedy"},
    ),
}


def make_model(
    family: str, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 3, **changes: Any
) -> PreTrainedModel:
    """A random model whose distributions are far from flat, in which every parameter matters."""
    config_class, fields = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(**{**COMMON, "tie_word_embeddings": tied, **fields, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() > 1:
                param.normal_(0, 0.12 if "embed" in name or "lm_head" in name else param.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                param.normal_(0, 0.3)
            else:
                param.uniform_(0.6, 1.4)
        saved = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in saved:
                buffer.normal_(0, 0.2)
    return model.to(dtype).eval()


def save(
    folder: Path, family: str, tied: bool = False, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """Write a checkpoint; the model that it came from is the reference."""
    model = make_model(family, tied, dtype, **changes)
    model.save_pretrained(folder)
    return model


PLAIN = ("lm_head", "model.embed_tokens")
"""What a block-scaled checkpoint leaves as it is, besides norms and routers."""


def quantise(
    state: Mapping[str, torch.Tensor], block: tuple[int, int], plain: Sequence[str] = PLAIN
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A checkpoint's tensors -> (block-scaled fp8 form, what the fp8 form stands for)."""
    codes: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if tensor.dim() != 2 or module.endswith("mlp.gate") or any(module.endswith(p) for p in plain):
            codes[name] = values[name] = tensor
            continue
        rows, columns = tensor.shape
        high, wide = -(-rows // block[0]), -(-columns // block[1])
        padded = torch.zeros(high * block[0], wide * block[1])
        padded[:rows, :columns] = tensor
        tiles = padded.view(high, block[0], wide, block[1])
        scales = tiles.abs().amax(dim=(1, 3)).clamp(min=1e-6) / 448
        spread = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        codes[name] = (tensor / spread).to(torch.float8_e4m3fn)
        codes[f"{name}_scale_inv"] = scales
        values[name] = codes[name].float() * spread
    return codes, values


def save_fp8(
    folder: Path, model: PreTrainedModel, block: tuple[int, int], plain: Sequence[str] = PLAIN
) -> dict[str, torch.Tensor]:
    """Write `model` as a block-scaled fp8 checkpoint and give `model` the values that this stands for. Its tensors."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    codes, values = quantise(load_file(file), block, plain)
    save_file(values, file, metadata={"format": "pt"})
    exact = type(model).from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(exact.state_dict())
    save_file(codes, file)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": list(block),
        "modules_to_not_convert": list(plain),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return codes


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """Lengths around the block size."""
    generator = torch.Generator().manual_seed(11)
    return tuple(
        tuple(torch.randint(0, COMMON["vocab_size"], (n,), generator=generator).tolist())
        for n in (1, 2, 15, 16, 17, 40)
    )


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, wanted: Sequence[Sequence[int]]) -> list[list[float]]:
    answers = []
    for prompt in wanted:
        ids = torch.tensor([prompt])
        logprobs = model(ids).logits[0].float().log_softmax(-1)
        answers.append(logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist())
    return answers


@torch.no_grad()
def reference_greedy(model: PreTrainedModel, prompt: Sequence[int], tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def mean_difference(got: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> float:
    if [len(row) for row in got] != [len(row) for row in wanted]:
        raise AssertionError(f"lengths differ: {[len(r) for r in got]} and {[len(r) for r in wanted]}")
    pairs = [abs(a - b) for x, y in zip(got, wanted) for a, b in zip(x, y)]
    return sum(pairs) / len(pairs)
