"""The `vllm.general_plugins` entry point: vLLM calls `register` in its front end, its engine core and every worker."""

from __future__ import annotations

BACKEND = "bridge"
"""What users write: `WeightTransferConfig(backend="bridge")`."""
METHOD = "bridge_run"
"""The worker method that `collective_rpc` calls by name for a job."""
ADAPTERS = "bridge_adapters"
"""The one that tells which in-memory adapters a worker holds."""


def register() -> None:
    """Make the backend known, and give workers the methods that carry the bridge's jobs. Idempotent.

    The backend alone would do for the weights, but vLLM hands it no model runner, without which a paused engine cannot
    be asked for log-probabilities. They are added to vLLM's worker base class, as vLLM itself adds worker
    extensions: nothing of vLLM's is replaced, and a `worker_extension_cls` of the user's own goes beside it.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.v1.worker.worker_base import WorkerBase

    from engine_side.adapters.vllm import extension

    for name, method in ((METHOD, extension.bridge_run), (ADAPTERS, extension.bridge_adapters)):
        if not hasattr(WorkerBase, name):
            setattr(WorkerBase, name, method)
    try:
        WeightTransferEngineFactory.register_engine(BACKEND, "engine_side.adapters.vllm.transfer", "BridgeTransfer")
    except ValueError:
        return  # vLLM's word for: this name is registered, by an earlier call of ours
