"""What a bridge has to know of a vLLM engine before it drives it, read from the engine's own configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bridge.errors import ConfigError
from bridge.model.lora_format import LoraLimits
from bridge.protocol.codec import Message
from engine_side.engines.vllm.plugin import BACKEND

_PARALLEL = ("pipeline_parallel_size", "data_parallel_size", "prefill_context_parallel_size")


class VllmFacts(Message, frozen=True):
    """Lengths in tokens. `block` is one KV block, 0 without a prefix cache; `sizes` are the kinds of parallelism beside
    tensor parallelism; `dummy` says that the weights did not come from `model`; `unreached` are the
    arguments, with why, whose caches or moves no push could take into account; `quantisation` is vLLM's word."""

    backend: str | None
    ranks: int
    model: str
    dummy: bool
    max_len: int
    block: int
    lora: LoraLimits | None
    sizes: dict[str, int]
    draft: bool
    unreached: dict[str, str]
    quantisation: str | None = None
    vocabulary: int = 0
    """Token ids lie below; 0 where vLLM does not say."""

    @property
    def checkpoint(self) -> Path | None:
        """The folder that was loaded; None for an engine that was started with dummy weights."""
        path = Path(self.model)
        return path if path.is_dir() and not self.dummy else None


def facts_of(config: Any) -> VllmFacts:
    """The facts in a `vllm.config.VllmConfig`."""
    transfer, lora, cache = config.weight_transfer_config, config.lora_config, config.cache_config
    return VllmFacts(
        backend=None if transfer is None else str(transfer.backend),
        ranks=int(config.parallel_config.world_size),
        model=str(config.model_config.model),
        dummy=config.load_config.load_format == "dummy",
        max_len=int(config.model_config.max_model_len),
        block=int(cache.block_size) if cache.enable_prefix_caching else 0,
        lora=None if lora is None else LoraLimits(int(lora.max_lora_rank), int(lora.max_loras)),
        sizes={name: int(getattr(config.parallel_config, name, 1)) for name in _PARALLEL},
        draft=config.speculative_config is not None,
        unreached=_unreached(config),
        quantisation=None if config.model_config.quantization is None else str(config.model_config.quantization),
        vocabulary=int(config.model_config.get_vocab_size()),
    )


def _unreached(config: Any) -> dict[str, str]:
    """vLLM itself turns `kv_offloading_size` into a connector. Resetting the prefix cache empties the block pool; few
    connectors can be emptied, and none proves that it was: in a store that others share it could not be."""
    found: dict[str, str] = {}
    connector = getattr(config.kv_transfer_config, "kv_connector", None)
    if connector is not None:
        offloads = config.cache_config.kv_offloading_size is not None
        name = "kv_offloading_size" if offloads else "kv_transfer_config"
        found[name] = f"{connector} keeps KV outside vLLM's block pool, where that of the old weights outlives a push"
    encodings = getattr(config.ec_transfer_config, "ec_connector", None)
    if encodings is not None:
        found["ec_transfer_config"] = f"{encodings} keeps encoder outputs: those of the old weights outlive a push"
    if config.parallel_config.enable_eplb:
        found["enable_eplb"] = "experts would move away from where a push's plan has found them"
    return found


def check_facts(facts: VllmFacts, *, where: str, expected: str, remedy: str) -> None:
    """Raises ConfigError for an engine that cannot be driven. `expected` and `remedy` say how the backend is asked for
    where this engine was started."""
    if facts.backend != BACKEND:
        raise ConfigError(
            "this vLLM was started without the bridge's weight-transfer backend",
            where=where,
            expected=expected,
            got="none" if facts.backend is None else f"backend {facts.backend!r}",
            remedy=remedy,
        )
    for name, size in facts.sizes.items():
        if size != 1:
            raise ConfigError("this kind of parallelism is not driven yet", where=name, expected="1", got=str(size))
    if facts.draft:
        raise ConfigError(
            "a draft model would keep its old weights", where="speculative_config", expected="None", got="one"
        )
    for name, why in facts.unreached.items():
        raise ConfigError(
            why, where=name, expected="an engine without it", got="it is set", remedy=f"start the engine without {name}"
        )
