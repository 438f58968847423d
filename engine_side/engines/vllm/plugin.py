"""The `vllm.general_plugins` entry point: vLLM calls `register` in its API servers, engine core and workers. Also the
methods that its workers then run for the bridge; in these `self` is vLLM's worker."""

from __future__ import annotations

import base64
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

BACKEND = "bridge"
"""The word that users write: `WeightTransferConfig(backend="bridge")`."""
METHOD = "bridge_run"
"""The worker method that runs a rank job, called by name through `collective_rpc`."""
LORAS = "bridge_loras"
"""The worker method that returns the LoRAs which the bridge has loaded there."""
FRONT = "bridge_front"
"""The name in a `collective_rpc` of an AsyncLLM that its frontend answers itself: a bridge's way into a server."""
_MODULE = "vllm.v1.engine.async_llm"


def register() -> None:
    """Register the weight-transfer backend, and give workers the methods that carry the bridge's jobs. Idempotent.

    The backend alone would do for the weights. But vLLM hands it no model runner, without which a paused engine cannot
    compute log-probabilities. So methods are added to vLLM's worker base class, as vLLM itself adds a
    `worker_extension_cls`: nothing of vLLM's is replaced, and a user's own extension goes beside them
    (https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/worker/worker_base.py).

    Two methods of AsyncLLM are wrapped once it is loaded: `add_request`, so that a server can hold and refuse requests
    (pausing alone would hang its clients), and `collective_rpc`, the only endpoint of a server through which a bridge
    can say so. Until a bridge attaches they do what they did.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.v1.worker.worker_base import WorkerBase

    module = sys.modules.get(_MODULE)
    if module is not None and hasattr(module, "AsyncLLM"):
        _wrap_methods(module)
    elif not any(isinstance(finder, _AsyncLLMFinder) for finder in sys.meta_path):
        # an engine core or a worker never imports AsyncLLM; a server does, in whatever process it was started
        sys.meta_path.insert(0, _AsyncLLMFinder())
    for name, method in {METHOD: bridge_run, LORAS: bridge_loras, FRONT: bridge_front}.items():
        if not hasattr(WorkerBase, name):
            setattr(WorkerBase, name, method)
    try:
        WeightTransferEngineFactory.register_engine(BACKEND, "engine_side.engines.vllm.transfer", "BridgeTransfer")
    except ValueError:
        return  # vLLM's error for a name that is registered: by an earlier call of ours


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


class _AsyncLLMFinder(MetaPathFinder):
    """Finds no module itself: has the methods of AsyncLLM wrapped as soon as its module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_wrap(module: ModuleType) -> None:
                execute(module)
                _wrap_methods(module)

            vars(spec.loader)["exec_module"] = execute_and_wrap
        return spec


def _wrap_methods(module: ModuleType) -> None:
    from engine_side.engines.vllm import frontend

    wrappers = {"add_request": frontend.wrap_add_request, "collective_rpc": frontend.wrap_collective_rpc}
    for name, wrap in wrappers.items():
        method = getattr(module.AsyncLLM, name)
        if not hasattr(method, "__wrapped__"):
            setattr(module.AsyncLLM, name, wrap(method))
