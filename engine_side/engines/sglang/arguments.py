"""Refuse SGLang engines and servers that were started with arguments which rule out a push."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bridge.errors import ConfigError
from engine_side.engines.common.refusals import refuse_arguments
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


Arguments = Callable[[str], Any]
"""Returns an argument by SGLang's name."""


def require_supported(get: Arguments, where: str, start: str) -> None:
    """Check the arguments that an engine or server was started with, before a bridge claims it.

    Args:
        where: the engine, for errors.
        start: the call or command that starts an engine which can be driven, for the remedy.

    Raises ConfigError for an engine that cannot be driven, naming the argument to change.
    """
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
    wrong = [(name, value) for name, value in _REQUIRED.items() if get(name) != value]
    refuse_arguments((name, unsupported, f"{name}={value!r}", f"{name}={get(name)!r}") for name, value in wrong)
    refuse_arguments(
        (name, why, "an engine without it", repr(get(name))) for name, why in _REFUSED.items() if get(name)
    )
