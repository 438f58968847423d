"""vLLM's own `reload_weights`, fed from memory: what the bench compares a push with."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from engine_side.engines.common.native_reload import NativeReload


def start(folder: Path) -> NativeReload:
    """Start an LLM whose engine core runs in this process. Blocks. Only there can vLLM's own reload be given tensors in
    memory, which is its fastest way."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=1024,
        dtype="bfloat16",
        kv_cache_memory_bytes=1 << 28,
        weight_transfer_config=WeightTransferConfig(backend="bridge"),
    )

    def own(named: Iterable[tuple[str, torch.Tensor]]) -> None:
        weights = ((name, tensor.detach()) for name, tensor in named)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        llm.reset_prefix_cache()

    return NativeReload(llm, "reload_weights", own, llm.llm_engine.engine_core.shutdown)
