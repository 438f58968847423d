"""The demo's policies: a tiny Qwen2 from random weights, or any local checkpoint of a supported family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bridge.entry_points import load
from bridge.errors import NotFound

TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
"""Qwen2's shape in small: q/k/v biases, two query heads per key/value head. Learns the task in about forty steps."""


def _transformers() -> Any:
    """Import transformers. Raises ConfigError, with the command that installs it, when it is missing."""
    load("transformers:__version__")
    import transformers

    return transformers


def tiny_qwen2(*, seed: int = 0, tied: bool = False, **shape: int) -> nn.Module:
    """Make a random fp32 Qwen2. `shape` overrides `TINY`; the caller's random state stays as it was."""
    transformers = _transformers()
    config = transformers.Qwen2Config(**{**TINY, **shape}, tie_word_embeddings=tied, dtype="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = transformers.Qwen2ForCausalLM(config)
        # transformers starts every bias at zero: a lost bias would go unnoticed until training had moved it
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                nn.init.normal_(parameter, std=0.02)
    return model


def load_policy(path: Path) -> nn.Module:
    """Load the checkpoint in `path` with fp32 master weights, whatever dtype it is stored and served in."""
    transformers = _transformers()
    if not (path / "config.json").is_file():
        raise NotFound(
            "no checkpoint there", where=str(path), expected="a folder with config.json and safetensors",
            got="no config.json", remedy="pass --model the folder that save_pretrained wrote",
        )  # fmt: skip
    with _without_bars():
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, dtype=torch.float32
        )
    return model


def save_policy(model: nn.Module, path: Path | str) -> None:
    """Write `model` as a Hugging Face checkpoint folder, from which an engine starts."""
    saver: Any = model
    with _without_bars():
        saver.save_pretrained(path)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Switch transformers' progress bars off inside: they would tear the demo's own table."""
    logs = _transformers().utils.logging
    shown = logs.is_progress_bar_enabled()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logs.enable_progress_bar()


def vocab_size(model: nn.Module) -> int:
    """Return the size of the model's vocabulary as its configuration states it."""
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def special_ids(model: nn.Module) -> frozenset[int]:
    """Return the ids with a meaning of their own (start, end, padding) that the configuration names."""
    config: Any = model.config
    found: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)


def completion_logprobs(model: nn.Module, prompts: Tensor, completions: Tensor) -> Tensor:
    """Compute log-probabilities (nats) of `completions` [B, L] after `prompts` [B, P] of one length; differentiable.

    Completions may be padded on the right: attention is causal, so the padding touches only its own positions.
    """
    tokens = torch.cat([prompts, completions], dim=1)[:, :-1]
    logits: Tensor = model(tokens, use_cache=False, logits_to_keep=completions.shape[1]).logits
    chosen = logits.float().log_softmax(-1).gather(2, completions.unsqueeze(-1))
    return chosen.squeeze(-1)


@torch.no_grad()
def sample(model: nn.Module, prompts: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """Sample completions [B, tokens] from the trainer's own copy of the policy."""
    inputs, cache, out = prompts, None, []
    for _ in range(tokens):
        answer = model(inputs, past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        inputs = torch.multinomial(answer.logits[:, -1].float().softmax(-1), 1, generator=generator)
        out.append(inputs)
    return torch.cat(out, dim=1)
