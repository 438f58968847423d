"""The weight-transfer backend "bridge" as vLLM knows it.

It keeps this worker's `Rank` (plans, arena, mailbox) for as long as vLLM keeps the backend. Jobs do not come through
vLLM's own update calls: those raise in a worker, drop what a worker says, and end with every adapter removed.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass
class BridgeInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing: the bridge tells each job what it needs."""


@dataclass
class BridgeUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Nothing travels this way."""


class BridgeTransfer(WeightTransferEngine[BridgeInitInfo, BridgeUpdateInfo]):  # type: ignore[misc]
    """Made by vLLM at the end of `Worker.load_model`, once per worker."""

    init_info_cls = BridgeInitInfo
    update_info_cls = BridgeUpdateInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        _leave_callable(model)
        self.rank: Rank | None = None
        self._host: VllmRankHost | None = None

    def rank_of(self, worker: Any) -> Rank:
        """The rank of this worker, made at its first job."""
        if self.rank is None:
            self._host = VllmRankHost(worker)
            self.rank = Rank(self._host)
        return self.rank

    def adapters(self) -> dict[str, int]:
        """Name -> id of the in-memory adapters; empty before the first job."""
        loras = None if self._host is None else self._host.loras
        return {} if loras is None else loras.names

    def init_transfer_engine(self, init_info: BridgeInitInfo) -> None:
        """Nothing to connect to."""

    def start_weight_update(self) -> None:
        """Raises RuntimeError: an update that the bridge does not verify is none of its."""
        raise RuntimeError("the backend 'bridge' is driven by bridge.attach(llm).push(...), not by update calls")

    def receive_weights(self, update_info: BridgeUpdateInfo) -> None:
        """Raises RuntimeError, as `start_weight_update`."""
        self.start_weight_update()

    def finish_weight_update(self) -> None:
        """Nothing was started."""

    def shutdown(self) -> None:
        """Let go of arenas and mailbox. Idempotent."""
        if self.rank is not None:
            self.rank.close()
            self.rank = None


def _leave_callable(model: nn.Module) -> None:
    """Where vLLM runs a model with transformers' own classes, it exchanges their `__call__` for one that asks the
    instance whether to compile. A trainer's model in this process, made before, has no such attribute and could not be
    called any more: it finds it on the class."""
    for module in model.modules():
        cls = type(module)
        if "do_not_compile" in vars(module) and not hasattr(cls, "do_not_compile"):
            cls.do_not_compile = True  # type: ignore[attr-defined]
