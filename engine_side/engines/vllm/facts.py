"""Facts of a vLLM engine that a bridge needs before it drives it, read from the engine's own configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bridge.errors import ConfigError
from bridge.model.declared_losses import DeclaredLosses
from bridge.model.lora_format import LoraLimits
from bridge.model.torch_dtypes import DTYPES, dtype_name
from bridge.protocol.codec import Message
from engine_side.engines.common.refusals import refuse_arguments
from engine_side.engines.vllm.plugin import BACKEND

_PARALLEL = ("pipeline_parallel_size", "data_parallel_size", "prefill_context_parallel_size")


class VllmFacts(Message, frozen=True):
    """Facts of one engine. A server's frontend sends them to the bridge.

    Attributes:
        backend: the weight-transfer backend that it was started with.
        model: the folder or name that it was started with.
        dummy: the weights were not read from `model`.
        max_len: longest sequence in tokens.
        block: tokens of one KV block; 0 without a prefix cache.
        undrivable: engine argument -> why no push could take it into account.
        quantisation: vLLM's word for how weights are stored; None where they are stored as computed with.
        vocabulary: token ids lie below this; 0 when vLLM does not say.
        losses: what vLLM was told to store more coarsely than it computes.
    """

    backend: str | None
    ranks: int
    model: str
    dummy: bool
    max_len: int
    block: int
    lora: LoraLimits | None
    undrivable: dict[str, str]
    quantisation: str | None = None
    vocabulary: int = 0
    losses: DeclaredLosses = DeclaredLosses()

    @property
    def checkpoint(self) -> Path | None:
        """The folder that was loaded; None for an engine that was started with dummy weights or by a hub's name."""
        path = Path(self.model)
        return path if path.is_dir() and not self.dummy else None


def facts_of(config: Any) -> VllmFacts:
    """Read the facts from a `vllm.config.VllmConfig`."""
    transfer, lora = config.weight_transfer_config, config.lora_config
    cache, model = config.cache_config, config.model_config
    quantisation = None if model.quantization is None else str(model.quantization)
    return VllmFacts(
        backend=None if transfer is None else str(transfer.backend),
        ranks=int(config.parallel_config.world_size),
        model=str(model.model),
        dummy=config.load_config.load_format == "dummy",
        max_len=int(model.max_model_len),
        block=int(cache.block_size) if cache.enable_prefix_caching else 0,
        lora=None if lora is None else LoraLimits(int(lora.max_lora_rank), int(lora.max_loras)),
        undrivable=_undrivable(config),
        quantisation=quantisation,
        vocabulary=int(model.get_vocab_size()),
        losses=_losses(str(cache.cache_dtype), str(model.dtype).removeprefix("torch."), quantisation),
    )


def _losses(kv: str, computed: str, quantisation: str | None) -> DeclaredLosses:
    """Compare vLLM's word for the KV cache's dtype with the name of the dtype that it computes in. vLLM's names of fp8
    are the wire's; "fp8" alone is its platform's own kind."""
    if kv in ("auto", computed):
        return DeclaredLosses(weights=quantisation)
    name = dtype_name(_platform_fp8()) if kv == "fp8" else kv
    return DeclaredLosses(kv, name if name in DTYPES else None, quantisation)


def _platform_fp8() -> torch.dtype:
    from vllm.platforms import current_platform

    fp8: torch.dtype = current_platform.fp8_dtype()
    return fp8


def _undrivable(config: Any) -> dict[str, str]:
    """Engine arguments that rule out a push, with the reason."""
    found: dict[str, str] = {}
    for name in _PARALLEL:
        size = int(getattr(config.parallel_config, name, 1))
        if size != 1:
            found[name] = f"this kind of parallelism is not driven yet: {name}={size}"
    if config.speculative_config is not None:
        found["speculative_config"] = "a draft model would keep its old weights"
    # Resetting the prefix cache empties vLLM's block pool. Few connectors can be emptied, none proves that it was, and
    # a store that others share cannot be. vLLM itself turns `kv_offloading_size` into a connector.
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
    """Check that an engine can be driven, before a bridge claims it.

    Args:
        expected, remedy: how the backend is asked for where this engine was started.

    Raises:
        ConfigError: the engine lacks the backend, or was started with an argument that rules out a push.
    """
    if facts.backend != BACKEND:
        raise backend_error(where, expected, "none" if facts.backend is None else f"backend {facts.backend!r}", remedy)
    refuse_arguments((name, why, "an engine without it", "it is set") for name, why in facts.undrivable.items())


def backend_error(where: str, expected: str, got: str, remedy: str) -> ConfigError:
    """The error for an engine that was started without our weight-transfer backend."""
    return ConfigError(
        "this vLLM was started without the bridge's weight-transfer backend",
        where=where,
        expected=expected,
        got=got,
        remedy=remedy,
    )
