"""The `vllm.general_plugins` entry point: vLLM calls `register` in its front end, its engine core and every worker."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

BACKEND = "bridge"
"""What users write: `WeightTransferConfig(backend="bridge")`."""
METHOD = "bridge_run"
"""The worker method that `collective_rpc` calls by name for a job."""
ADAPTERS = "bridge_loras"
"""The one that tells which in-memory adapters a worker holds."""
FRONT = "bridge_front"
"""What `collective_rpc` of an AsyncLLM answers itself: how a bridge reaches the front of a server."""
_MODULE = "vllm.v1.engine.async_llm"


def register() -> None:
    """Make the backend known, and give workers the methods that carry the bridge's jobs. Idempotent.

    The backend alone would do for the weights, but vLLM hands it no model runner, without which a paused engine cannot
    be asked for log-probabilities. They are added to vLLM's worker base class, as vLLM itself adds worker
    extensions: nothing of vLLM's is replaced, and a `worker_extension_cls` of the user's own goes beside it.

    Two methods of AsyncLLM are wrapped where it is loaded or will be: `add_request`, so that a server can hold and
    refuse requests as an engine object does (pausing alone would hang its clients), and `collective_rpc`, the only one
    of a server's own endpoints through which the bridge can say so. Until a bridge comes they do what they did.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.v1.worker.worker_base import WorkerBase

    from engine_side.engines.vllm import extension

    _stand_in_front()
    methods = {METHOD: extension.bridge_run, ADAPTERS: extension.bridge_loras, FRONT: extension.bridge_front}
    for name, method in methods.items():
        if not hasattr(WorkerBase, name):
            setattr(WorkerBase, name, method)
    try:
        WeightTransferEngineFactory.register_engine(BACKEND, "engine_side.engines.vllm.transfer", "BridgeTransfer")
    except ValueError:
        return  # vLLM's word for: this name is registered, by an earlier call of ours


def _stand_in_front() -> None:
    """Now if AsyncLLM is there, else when somebody imports it: an engine core or a worker never does, a server's front
    does in whatever process it was started."""
    module = sys.modules.get(_MODULE)
    if module is not None and hasattr(module, "AsyncLLM"):
        _wrap(module)
    elif not any(isinstance(finder, _Awaits) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaits())


class _Awaits(MetaPathFinder):
    """Finds nothing itself: has the module that it waits for wrapped once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def and_wrap(module: ModuleType) -> None:
                execute(module)
                _wrap(module)

            vars(spec.loader)["exec_module"] = and_wrap
        return spec


def _wrap(module: ModuleType) -> None:
    from engine_side.engines.vllm import frontend

    for name, around in (("add_request", frontend.gated), ("collective_rpc", frontend.answering)):
        method = getattr(module.AsyncLLM, name)
        if not hasattr(method, "__wrapped__"):
            setattr(module.AsyncLLM, name, around(method))
