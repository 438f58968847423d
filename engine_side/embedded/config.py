"""The options that an engine is started with (`EngineConfig`) and the fields of a checkpoint's `config.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
import torch

from bridge.errors import ConfigError, NotFound
from bridge.model.torch_dtypes import dtype_of

T = TypeVar("T")
LayoutName = Literal["canonical", "transposed", "shuffled", "packed"]
LAYOUTS: tuple[str, ...] = get_args(LayoutName)
"""Names of the post-load layouts."""
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Name = Annotated[str, msgspec.Meta(min_length=1)]
_DTYPES: Mapping[str, str] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
_ELSEWHERE = "serve this model with vLLM or SGLang"

_ROPE_FIELDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Supported `rope_type` -> the fields that it needs."""
_DEFAULT_SEQ_LEN = 4096
_DEFAULT_BLOCKS = 1024


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of an embedded engine. Raises ConfigError, naming the option, for a value that does not fit.

    Args:
        path: checkpoint folder (`config.json`, safetensors).
        tensor_parallel_size: ranks; rank 0 is the caller's process, the others are children of it.
        dtype: "bf16" | "fp16" | "fp32" | "fp64"; None takes the checkpoint's.
        layout: storage of the weights after post-load: "canonical" | "transposed" | "shuffled" | "packed".
        wrap_linears: put a `base_layer` wrapper around every linear layer after post-load, as LoRA does.
        max_seq_len: longest prompt plus completion in tokens; None takes the checkpoint's, at most 4096.
        block_size: tokens per KV block, also the grain of the prefix cache.
        num_blocks: KV blocks; None is 1024, or more where one sequence of `max_seq_len` needs more.
        max_num_seqs: requests that run at once.
        threads: torch threads of each rank; None leaves this process as it is and gives its children a fair share.
        load: "checkpoint" | "dummy" (small reproducible noise, no weights read).
        timeout_s: longest wait for another rank, in seconds.
        max_loras: LoRAs held at once; 0 starts the engine without LoRA.
        max_lora_rank: largest rank of a LoRA.
        lora_targets: last path segments of the modules that take LoRA; None is every module that can.
        kv_dtype: dtype in which keys and values are stored, without scales; None is the one that is computed in.
        wrap_levels: how many `base_layer` wrappers `wrap_linears` puts around each layer.
    """

    path: str
    tensor_parallel_size: _Positive = 1
    dtype: Literal["bf16", "fp16", "fp32", "fp64"] | None = None
    layout: LayoutName = "canonical"
    wrap_linears: bool = False
    max_seq_len: _Positive | None = None
    block_size: _Positive = 16
    num_blocks: _Positive | None = None
    max_num_seqs: _Positive = 256
    threads: _Positive | None = None
    load: Literal["checkpoint", "dummy"] = "checkpoint"
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 120.0
    max_loras: Annotated[int, msgspec.Meta(ge=0)] = 0
    max_lora_rank: _Positive = 16
    lora_targets: Annotated[tuple[_Name, ...], msgspec.Meta(min_length=1)] | None = None
    wrap_levels: _Positive = 1
    kv_dtype: Literal["fp8_e4m3", "fp8_e5m2"] | None = None

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "path", str(self.path))
        for option in msgspec.structs.fields(type(self)):  # the constructor, unlike decoding, does not look at types
            value = getattr(self, option.name)
            try:
                msgspec.structs.force_setattr(self, option.name, msgspec.convert(value, option.type))
            except msgspec.ValidationError as error:
                raise ConfigError(
                    "an engine option does not fit",
                    where=f"EngineConfig.{option.name}",
                    expected=str(option.type).replace("typing.", ""),
                    got=f"{value!r} ({error})",
                    remedy=f"leave it out for {option.default!r}",
                ) from error
        if self.lora_targets is not None and not self.max_loras:
            raise ConfigError(
                "lora_targets without room for a LoRA",
                where="EngineConfig.lora_targets",
                expected="max_loras of at least 1",
                got="0",
                remedy="set max_loras=2 (one serves while the next is loaded), or leave lora_targets out",
            )


def read_fields(raw: Mapping[str, Any], kind: type[T], where: str) -> T:
    """Convert parsed JSON into a dataclass, ignoring fields that it does not have. Raises ConfigError, naming the
    field that is missing or of another type."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(
            "config.json does not describe a supported model",
            where=where,
            expected=f"the fields of {kind.__name__}",
            got=str(error),
            remedy="use the config.json that save_pretrained of a supported architecture writes",
        ) from error


@dataclass(frozen=True)
class ModelConfig:
    """The fields of `config.json` that the supported families share, under their own names.

    Attributes:
        num_key_value_heads, head_dim: also where the file leaves them to be derived.
        raw: everything in the file that is not null, for the families' own fields.
    """

    architectures: list[str]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    dtype: Literal["bfloat16", "float16", "float32", "float64"]
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    raw: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // heads)

    @classmethod
    def read(cls, folder: str | Path) -> ModelConfig:
        """Parse `folder/config.json`. Raises NotFound or ConfigError, naming the field."""
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            remedy = "give the folder of a Hugging Face checkpoint"
            raise NotFound(
                "no config.json in the checkpoint folder",
                where=str(folder),
                expected="a config.json",
                got="none",
                remedy=remedy,
            ) from None
        except ValueError as error:
            remedy = "save the checkpoint again with save_pretrained"
            raise ConfigError(
                "config.json is not JSON", where=str(path), expected="JSON", got=str(error), remedy=remedy
            ) from error
        known = {name: value for name, value in raw.items() if value is not None}
        dtype = known.get("dtype", known.get("torch_dtype", "float32"))
        return read_fields({**known, "dtype": dtype, "raw": known}, cls, str(path))

    @property
    def rope(self) -> Mapping[str, Any]:
        """The rotary embedding: `rope_parameters` (transformers >= 5), or the older `rope_scaling`, with its
        `rope_theta` and `rope_type`. Raises ConfigError for a kind that is not supported."""
        scaling = dict(self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {})
        kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
        where = "config.json: rope_parameters"
        if kind not in _ROPE_FIELDS:
            raise ConfigError(
                "unsupported rope type",
                where=where,
                expected=" | ".join(_ROPE_FIELDS),
                got=repr(kind),
                remedy=_ELSEWHERE,
            )
        missing = [name for name in _ROPE_FIELDS[kind] if name not in scaling]
        if missing:
            raise ConfigError(
                f"rope type {kind} lacks fields",
                where=where,
                expected=", ".join(missing),
                got="a rope without them",
                remedy="use the config.json that save_pretrained writes",
            )
        partial = scaling.get("partial_rotary_factor", self.raw.get("partial_rotary_factor", 1.0))
        if partial != 1.0:
            what = "partial rotary embeddings are not supported"
            raise ConfigError(what, where=where, expected="1", got=str(partial), remedy=_ELSEWHERE)
        theta = float(scaling.get("rope_theta") or self.raw.get("rope_theta") or 10000.0)
        return {**scaling, "rope_type": kind, "rope_theta": theta}

    @property
    def window(self) -> int | None:
        """Tokens that a sliding-window layer sees, or None when no layer slides."""
        size = self.raw.get("sliding_window")
        types = self.raw.get("layer_types")
        slides = "sliding_attention" in types if types else bool(self.raw.get("use_sliding_window"))
        return int(size) if slides and size else None


@dataclass(frozen=True)
class EngineLimits:
    """Sizes that follow from both configs: compute dtype, that of keys and values in the cache, tokens of a sequence,
    tokens of a KV block, KV blocks."""

    dtype: torch.dtype
    kv_dtype: torch.dtype
    max_seq_len: int
    block_size: int
    num_blocks: int

    @classmethod
    def of(cls, engine: EngineConfig, model: ModelConfig) -> EngineLimits:
        """Derive the sizes. Raises ConfigError where the two configs do not fit each other."""
        longest = model.max_position_embeddings
        seq = engine.max_seq_len or min(longest, _DEFAULT_SEQ_LEN)
        if seq > longest:
            where = "EngineConfig.max_seq_len"
            raise ConfigError(
                "longer than the model's positions",
                where=where,
                expected=f"<= {longest}",
                got=str(seq),
                remedy=f"set max_seq_len to {longest} or below",
            )
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
            where, expected = "EngineConfig.num_blocks", f"at least {each}"
            remedy = "set num_blocks to that or more, or a smaller max_seq_len"
            raise ConfigError(
                "too few KV blocks for one sequence", where=where, expected=expected, got=str(blocks), remedy=remedy
            )
        dtype = dtype_of(engine.dtype or _DTYPES[model.dtype])
        kv_dtype = dtype if engine.kv_dtype is None else dtype_of(engine.kv_dtype)
        return cls(dtype, kv_dtype, seq, engine.block_size, blocks)
