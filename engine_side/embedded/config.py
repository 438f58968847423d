"""What an engine is started with (`EngineConfig`) and what a checkpoint's `config.json` says (`ModelConfig`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from bridge.errors import ConfigError, NotFound
from bridge.model.dtypes import dtype_of

LAYOUTS = ("canonical", "transposed", "shuffled", "packed")
_CHECKPOINT_DTYPES: Mapping[str, str] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
_COMPUTE_DTYPES = ("bf16", "fp16", "fp32", "fp64")
_POSITIVE = (
    "tensor_parallel_size", "max_seq_len", "block_size", "num_blocks", "max_num_seqs", "threads", "max_lora_rank",
    "wrap_levels",
)  # fmt: skip
_DEFAULT_SEQ_LEN = 4096
_DEFAULT_BLOCKS = 1024


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to start an embedded engine; travels as is to the processes of the other ranks.

    Args:
        path: checkpoint folder (`config.json`, safetensors).
        tensor_parallel_size: ranks; rank 0 is the caller's process, the others are children of it.
        dtype: "bf16" | "fp16" | "fp32" | "fp64"; None takes the checkpoint's.
        layout: what post-load makes of the weights: "canonical" | "transposed" | "shuffled" | "packed".
        wrap_linears: put a `base_layer` wrapper around every linear layer after post-load, as LoRA does.
        max_seq_len: longest prompt plus completion in tokens; None takes the checkpoint's, at most 4096.
        block_size: tokens per KV block, also the grain of the prefix cache.
        num_blocks: KV blocks; None is 1024, or more where one sequence of `max_seq_len` needs more.
        max_num_seqs: requests that run at once.
        threads: torch threads of each rank; None leaves this process as it is and gives its children a fair share.
        load: "checkpoint" | "dummy" (small reproducible noise, no weights read).
        max_loras: LoRA adapters held at once; 0 starts the engine without LoRA.
        max_lora_rank: largest rank of an adapter.
        lora_targets: last path segments of the modules that take adapters; None is every module that can.
        wrap_levels: how many `base_layer` wrappers `wrap_linears` puts around each layer.
        timeout_s: longest wait for another rank, in seconds.
    """

    path: str
    tensor_parallel_size: int = 1
    dtype: str | None = None
    layout: str = "canonical"
    wrap_linears: bool = False
    max_seq_len: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    max_num_seqs: int = 256
    threads: int | None = None
    load: str = "checkpoint"
    timeout_s: float = 120.0
    max_loras: int = 0
    max_lora_rank: int = 16
    lora_targets: tuple[str, ...] | None = None
    wrap_levels: int = 1

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "path", str(self.path))
        _one_of("layout", self.layout, LAYOUTS)
        _one_of("load", self.load, ("checkpoint", "dummy"))
        if self.dtype is not None:
            _one_of("dtype", self.dtype, _COMPUTE_DTYPES)
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be positive", where=f"EngineConfig.{name}", got=str(value))
        self._check_lora()

    def _check_lora(self) -> None:
        if self.max_loras < 0:
            raise ConfigError("max_loras must not be negative", where="EngineConfig.max_loras", got=str(self.max_loras))
        targets: object = self.lora_targets  # the constructor does not look at types
        if targets is None:
            return
        where = "EngineConfig.lora_targets"
        if not isinstance(targets, tuple | list) or not targets or not all(isinstance(t, str) and t for t in targets):
            expected = 'a tuple of module names such as ("q_proj", "v_proj"), or None for all'
            raise ConfigError("lora_targets name no modules", where=where, expected=expected, got=repr(targets))
        if not self.max_loras:
            expected = "max_loras of at least 1"
            raise ConfigError("lora_targets without room for an adapter", where=where, expected=expected, got="0")
        msgspec.structs.force_setattr(self, "lora_targets", tuple(targets))


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        where = f"EngineConfig.{name}"
        raise ConfigError(f"unknown {name}", where=where, expected=" | ".join(allowed), got=repr(value))


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base and, for "llama3" and "linear", the scaling numbers of the checkpoint."""

    theta: float
    kind: str
    scaling: Mapping[str, Any]


@dataclass(frozen=True)
class ModelConfig:
    """The fields of `config.json` that the supported families share. `raw` keeps the rest for the family's own."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tied: bool
    dtype: str
    rope: RopeConfig
    raw: Mapping[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> ModelConfig:
        """Parse `folder/config.json`. Raises NotFound or ConfigError, naming the field."""
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            remedy = "give the folder of a Hugging Face checkpoint"
            raise NotFound("no config.json in the checkpoint folder", where=str(folder), remedy=remedy) from None
        except ValueError as error:
            raise ConfigError("config.json is not JSON", where=str(path), got=str(error)) from error
        return cls.parse(raw, str(path))

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str) -> ModelConfig:
        """Read the common fields from the parsed JSON of `where`."""

        def need(name: str) -> Any:
            value = raw.get(name)
            if value is None:
                raise ConfigError("config.json lacks a field that every supported family has", where=f"{where}: {name}")
            return value

        architectures = need("architectures")
        heads = int(need("num_attention_heads"))
        hidden = int(need("hidden_size"))
        dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        if dtype not in _CHECKPOINT_DTYPES:
            expected = ", ".join(_CHECKPOINT_DTYPES)
            raise ConfigError("unknown checkpoint dtype", where=f"{where}: dtype", expected=expected, got=repr(dtype))
        return cls(
            architecture=str(architectures[0]),
            vocab_size=int(need("vocab_size")),
            hidden_size=hidden,
            intermediate_size=int(need("intermediate_size")),
            num_layers=int(need("num_hidden_layers")),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            max_position_embeddings=int(raw.get("max_position_embeddings") or 2048),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            hidden_act=str(raw.get("hidden_act", "silu")),
            tied=bool(raw.get("tie_word_embeddings", False)),
            dtype=_CHECKPOINT_DTYPES[dtype],
            rope=_rope(raw, where),
            raw=raw,
        )

    @property
    def window(self) -> int | None:
        """Tokens that a sliding-window layer sees, or None when no layer slides."""
        size = self.raw.get("sliding_window")
        types = self.raw.get("layer_types")
        slides = "sliding_attention" in types if types else bool(self.raw.get("use_sliding_window"))
        return int(size) if slides and size else None


def _rope(raw: Mapping[str, Any], where: str) -> RopeConfig:
    """transformers >= 5 keeps one `rope_parameters`; older files `rope_theta` and `rope_scaling`."""
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    needs: Mapping[str, tuple[str, ...]] = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in needs:
        raise ConfigError("unsupported rope type", where=where, expected=" | ".join(needs), got=repr(kind))
    missing = [name for name in needs[kind] if name not in scaling]
    if missing:
        raise ConfigError(f"rope type {kind} lacks fields", where=where, expected=", ".join(missing))
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ConfigError("partial rotary embeddings are not supported", where=where, expected="1.0", got=str(partial))
    theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    return RopeConfig(theta, kind, scaling)


@dataclass(frozen=True)
class Limits:
    """Sizes resolved from both configs."""

    dtype: torch.dtype
    max_seq_len: int
    block_size: int
    num_blocks: int

    @classmethod
    def of(cls, engine: EngineConfig, model: ModelConfig) -> Limits:
        """Raises ConfigError where the two do not fit."""
        longest = model.max_position_embeddings
        seq = engine.max_seq_len or min(longest, _DEFAULT_SEQ_LEN)
        if seq > longest:
            where = "EngineConfig.max_seq_len"
            raise ConfigError("longer than the model's positions", where=where, expected=f"<= {longest}", got=str(seq))
        if model.window is not None and model.window < seq:
            raise ConfigError(
                "sliding-window attention is not supported",
                where=engine.path,
                expected=f"max_seq_len <= {model.window}, where no layer's window ever ends",
                got=str(seq),
                remedy="set max_seq_len to the window or below",
            )
        each = math.ceil(seq / engine.block_size)
        blocks = engine.num_blocks or max(_DEFAULT_BLOCKS, each)
        if blocks < each:
            raise ConfigError("too few KV blocks for one sequence", expected=f"at least {each}", got=str(blocks))
        return cls(dtype_of(engine.dtype or model.dtype), seq, engine.block_size, blocks)
