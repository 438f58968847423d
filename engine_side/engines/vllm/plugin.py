"""The `vllm.general_plugins` entry point: vLLM calls `register` in its API servers, engine core and workers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

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

    from engine_side.engines.vllm import extension

    module = sys.modules.get(_MODULE)
    if module is not None and hasattr(module, "AsyncLLM"):
        _wrap_methods(module)
    elif not any(isinstance(finder, _AsyncLLMFinder) for finder in sys.meta_path):
        # an engine core or a worker never imports AsyncLLM; a server does, in whatever process it was started
        sys.meta_path.insert(0, _AsyncLLMFinder())
    methods = {METHOD: extension.bridge_run, LORAS: extension.bridge_loras, FRONT: extension.bridge_front}
    for name, method in methods.items():
        if not hasattr(WorkerBase, name):
            setattr(WorkerBase, name, method)
    try:
        WeightTransferEngineFactory.register_engine(BACKEND, "engine_side.engines.vllm.transfer", "BridgeTransfer")
    except ValueError:
        return  # vLLM's error for a name that is registered: by an earlier call of ours


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
