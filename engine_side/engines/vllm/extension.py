"""The methods that vLLM's workers execute for the bridge."""

from __future__ import annotations

import base64
import logging
from typing import Any

log = logging.getLogger(__name__)


def bridge_run(self: Any, frame: bytes | str) -> str:
    """Run one job (through HTTP in base64) in this worker; the answer goes to the mailbox. `self` is vLLM's worker.

    Never raises: with several ranks vLLM stops reading replies at the first that failed, and pairs those it left behind
    with later calls. What cannot be answered through the mailbox is answered here, in words; "" when all went well.
    """
    from vllm.config import set_current_vllm_config

    from engine_side.engines.vllm.transfer import BridgeTransfer

    try:
        transfer = self.weight_transfer_engine
        if not isinstance(transfer, BridgeTransfer):
            return f"rank {self.rank}: this worker was started without the weight-transfer backend 'bridge'"
        with set_current_vllm_config(self.vllm_config):
            transfer.rank_of(self).run(base64.b64decode(frame) if isinstance(frame, str) else bytes(frame))
    except Exception as error:  # process boundary: see above
        log.exception("rank %s: a job could not be answered", getattr(self, "rank", "?"))
        return f"rank {self.rank}: {type(error).__name__}: {error}"
    return ""


def bridge_loras(self: Any) -> dict[str, int]:
    """Name -> id of the adapters that the bridge has loaded in this worker."""
    from engine_side.engines.vllm.transfer import BridgeTransfer

    transfer = self.weight_transfer_engine
    return transfer.adapters() if isinstance(transfer, BridgeTransfer) else {}


def bridge_front(self: Any, frame: str) -> str:
    """What is meant for the front of a server and reaches a worker says that no front stands there."""
    return ""
