"""Load weights with SGLang's own `update_weights_from_tensor`, to compare with in `weighbridge bench`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bridge.errors import ProtocolError
from engine_side.engines.common.hosting import Leavings
from engine_side.engines.common.native_reload import NativeReload
from engine_side.engines.sglang import LOADER
from engine_side.engines.sglang.driver import EngineShutdown

_ON_CPU = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.2,
}
"""Arguments that SGLang needs on a machine without a GPU."""


def start(folder: Path) -> NativeReload:
    """Start an Engine that takes weights from this process through SGLang's update calls. Blocks until it serves."""
    import sglang

    leavings = Leavings()
    engine = sglang.Engine(
        model_path=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        context_length=1024,
        max_total_tokens=4096,
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        custom_weight_loader=[LOADER],
        sleep_on_idle=True,  # an idle scheduler would take a core from the trainer, in both measurements
        **({} if torch.cuda.is_available() else _ON_CPU),
    )

    def own(named: Iterable[tuple[str, torch.Tensor]]) -> None:
        weights = [(name, tensor.detach()) for name, tensor in named]
        _require(engine.begin_weight_update())
        _require(engine.update_weights_from_tensor(weights, flush_cache=True))
        _require(engine.end_weight_update())

    return NativeReload(engine, "update_weights_from_tensor", own, EngineShutdown(engine, leavings))


def _require(answer: Any) -> None:
    success, message = answer[:2]
    if not success:
        raise ProtocolError(
            "SGLang did not load the weights",
            where="update_weights_from_tensor",
            expected="success",
            got=str(message),
            remedy="SGLang's log has the details",
        )
