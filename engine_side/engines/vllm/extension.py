"""The methods that vLLM's workers run for the bridge. `self` is vLLM's worker."""

from __future__ import annotations

import base64
import logging
from typing import Any

log = logging.getLogger(__name__)


def bridge_run(self: Any, frame: bytes | str) -> str:
    """Run one rank job in this worker; the answer goes to the mailbox. Called by `collective_rpc`.

    Never raises: with several ranks vLLM's multiprocess executor stops reading replies at the first that failed, and
    pairs those that it left in its queues with later calls
    (https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/executor/multiproc_executor.py).

    Args:
        frame: the packed job; in base64 where it came over HTTP.

    Returns:
        "" when the job was answered, else the reason why it could not be.
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
    """Name -> id of the LoRAs that the bridge has loaded in this worker."""
    from engine_side.engines.vllm.transfer import BridgeTransfer

    transfer = self.weight_transfer_engine
    return transfer.loras() if isinstance(transfer, BridgeTransfer) else {}


def bridge_front(self: Any, frame: str) -> str:
    """Answer "" to a frontend's message that reached a worker: the server has no frontend of ours."""
    return ""
