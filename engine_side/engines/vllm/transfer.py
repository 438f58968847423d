"""The weight-transfer backend "bridge" that vLLM makes in every worker.

It keeps the worker's `Rank` (plans, arena, mailbox) for as long as vLLM keeps the backend. Jobs do not come through
vLLM's own update calls: those raise in a worker, drop its return value, and end with every LoRA removed
(https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/worker/gpu_worker.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from engine_side.engines.vllm.host import VllmRankHost
from engine_side.worker.rank import Rank


class BridgeTransfer(WeightTransferEngine[WeightTransferInitInfo, WeightTransferUpdateInfo]):  # type: ignore[misc]
    """Made by vLLM at the end of `Worker.load_model`, once per worker."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = WeightTransferUpdateInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        _keep_classes_callable(model)
        self.rank: Rank | None = None
        self._host: VllmRankHost | None = None

    def rank_of(self, worker: Any) -> Rank:
        """The rank of this worker; made at its first job."""
        if self.rank is None:
            self._host = VllmRankHost(worker)
            self.rank = Rank(self._host)
        return self.rank

    def loras(self) -> dict[str, int]:
        """Name -> id of the LoRAs that the bridge has loaded; empty before the first job."""
        slots = None if self._host is None else self._host.loras
        return {} if slots is None else slots.names

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Do nothing: a job carries all that it needs."""

    def start_weight_update(self) -> None:
        """Raises RuntimeError: an update through vLLM's own calls would not be verified."""
        raise RuntimeError("the backend 'bridge' is driven by bridge.attach(llm).push(...), not by update calls")

    def receive_weights(self, update_info: WeightTransferUpdateInfo) -> None:
        """Raises RuntimeError, as `start_weight_update`."""
        self.start_weight_update()

    def finish_weight_update(self) -> None:
        """Do nothing: no update can have been started."""

    def shutdown(self) -> None:
        """Let go of arenas and mailbox. Called by vLLM. Idempotent."""
        if self.rank is not None:
            self.rank.close()
            self.rank = None


def _keep_classes_callable(model: nn.Module) -> None:
    """Give classes of transformers the attribute `do_not_compile`. Where vLLM runs a model with them, its compilation
    decorator replaces their `__call__` by one that reads it from the instance. A trainer's model in this process, made
    before, does not have it and could not be called any more."""
    for module in model.modules():
        cls = type(module)
        if "do_not_compile" in vars(module) and not hasattr(cls, "do_not_compile"):
            cls.do_not_compile = True  # type: ignore[attr-defined]
