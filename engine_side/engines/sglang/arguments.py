"""Read the arguments that an SGLang engine or server was started with, and refuse those that cannot be driven."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.errors import ConfigError
from bridge.model.lora_format import LoraLimits
from engine_side.engines.common.versions import refuse_arguments
from engine_side.engines.sglang import LOADER

_REFUSED = {
    **dict.fromkeys(
        (
            "enable_hierarchical_cache",  # its host pool is emptied, but stores can be attached to it at any time
            "hicache_storage_backend",  # https://github.com/sgl-project/sglang/issues/26792
            "enable_unified_cache_external_linker",
            "enable_lmcache",
            "enable_flexkv",
            "enable_hisparse",
            "radix_cache_backend",
        ),
        "this cache keeps KV where SGLang's flush_cache does not reach: KV of the old weights would outlive a push",
    ),
    "enable_mm_global_cache": "this cache keeps encoder outputs: those of the old weights would outlive a push",
    **dict.fromkeys(
        ("enable_eplb", "elastic_ep_backend", "enable_paged_experts"),
        "experts would move away from where a push's plan has found them",
    ),
    **dict.fromkeys(
        ("enable_elastic_expert_backup", "kt_weight_path"),
        "experts would also be read from where a push does not write",
    ),
}
"""Arguments that are refused when set, and why."""
_REQUIRED = {
    **dict.fromkeys(("pp_size", "dp_size", "nnodes", "tokenizer_worker_num"), 1),
    "speculative_algorithm": None,  # a draft model would keep its old weights
    "disaggregation_mode": "null",
}
"""Arguments that have to have this value: other deployments are not supported yet."""


@dataclass(frozen=True)
class SglangArguments:
    """The part of an engine's start arguments that the driver needs.

    Attributes:
        checkpoint: the folder that was loaded; None for an engine that was started with dummy weights.
        quantisation: SGLang's word for how weights are stored; None where they are stored as they are computed with.
        lora: None for an engine that was started without LoRA.
    """

    ranks: int
    device: str
    checkpoint: Path | None
    quantisation: str | None
    lora: LoraLimits | None

    @classmethod
    def read(cls, get: Callable[[str], Any], where: str, start: str) -> SglangArguments:
        """Read and check the arguments when an engine is attached or hosted.

        Args:
            get: returns an argument by SGLang's name.
            where: the engine, for errors.
            start: the call or command that starts an engine which can be driven, for the remedy.

        Raises ConfigError for an engine that cannot be driven, naming the argument to change.
        """
        _require_supported(get, where, start)
        path, quantisation = Path(get("model_path")), get("quantization")
        # one slot less than SGLang has: it keeps one that is never pinned
        slots = max(0, int(get("max_loras_per_batch")) - 1)
        rank = get("max_lora_rank") if get("enable_lora") else None
        return cls(
            ranks=int(get("tp_size")),
            device=str(get("device")),
            checkpoint=path if path.is_dir() and str(get("load_format")) != "dummy" else None,
            quantisation=None if quantisation is None else str(quantisation),
            lora=None if rank is None else LoraLimits(int(rank), slots),
        )


def _require_supported(get: Callable[[str], Any], where: str, start: str) -> None:
    loaders = get("custom_weight_loader") or []
    if LOADER not in loaders:
        raise ConfigError(
            "this engine was started without the bridge's loader",
            where=where,
            expected=f'custom_weight_loader=["{LOADER}"]',
            got=repr(loaders),
            remedy=f"start it with {start}",
        )
    unsupported = "the bridge does not support an engine with this argument yet"
    refuse_arguments((name, unsupported, repr(get(name))) for name, value in _REQUIRED.items() if get(name) != value)
    refuse_arguments((name, reason, repr(get(name))) for name, reason in _REFUSED.items() if get(name))
