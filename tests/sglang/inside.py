"""What tests do in SGLang's scheduler processes: faults, and looks at what is there. Called through the shims."""

from __future__ import annotations

import json
import time
import traceback
from typing import Any

import pytest
import torch

ACTION = "weighbridge-test"
_patches: list[pytest.MonkeyPatch] = []
_breakers: list[Any] = []


def door(original: Any, self: Any, recv_req: Any) -> Any:
    """AROUND `check_weights`, as the bridge's own door."""
    if recv_req.action != ACTION:
        return original(self, recv_req)
    from sglang.srt.managers.io_struct import CheckWeightsReqOutput

    command, arguments = recv_req.skip_tensor_list
    found = COMMANDS[command](self.scheduler, **json.loads(arguments))
    return CheckWeightsReqOutput(success=True, message=json.dumps(found))


def _patch() -> pytest.MonkeyPatch:
    _patches.append(pytest.MonkeyPatch())
    return _patches[-1]


def mend(scheduler: Any) -> bool:
    """Undo all faults. Did the last one strike?"""
    fired = any(breaker.fired for breaker in _breakers)
    while _patches:
        _patches.pop().undo()
    _breakers.clear()
    return fired


def break_write(scheduler: Any, k: int, always: bool = False, rank: int = 0) -> None:
    from tests.push.faults import Breaker

    if torch.distributed.get_rank(scheduler.tp_group.cpu_group) == rank:
        _breakers.append(Breaker(_patch(), k, always=always))


def slow_write(scheduler: Any, k: int, seconds: float) -> None:
    """The k-th write waits."""
    from tests.push.faults import Breaker, Injected

    class Slow(Breaker):
        def tick(self) -> None:
            try:
                super().tick()
            except Injected:
                time.sleep(seconds)

    _breakers.append(Slow(_patch(), k))


def keep_caches(scheduler: Any) -> None:
    """`flush_cache` says yes and flushes nothing."""
    from sglang.srt.managers.io_struct import FlushCacheReqInput, FlushCacheReqOutput

    handlers = scheduler._request_dispatcher._mapping
    _patch().setitem(handlers, FlushCacheReqInput, lambda _: FlushCacheReqOutput(success=True))


def bits(scheduler: Any) -> dict[str, str]:
    """Digest of every parameter and of what is computed from them."""
    import xxhash

    model = scheduler.tp_worker.model_runner.model
    found = dict(model.named_parameters())
    for path, module in model.named_modules():
        found.update({f"{path}.{name}": t for name, t in vars(module).items() if isinstance(t, torch.Tensor)})
    return {
        name: xxhash.xxh3_64_hexdigest(t.detach().contiguous().view(torch.uint8).numpy()) for name, t in found.items()
    }


def scale(scheduler: Any, path: str, factor: float) -> None:
    with torch.no_grad():
        module, _, name = path.rpartition(".")
        getattr(scheduler.tp_worker.model_runner.model.get_submodule(module), name).mul_(factor)


def peek(scheduler: Any, path: str) -> list[float]:
    """The first numbers of a tensor."""
    module, _, name = path.rpartition(".")
    found = getattr(scheduler.tp_worker.model_runner.model.get_submodule(module), name)
    return [float(x) for x in found.detach().flatten()[:8]]


def adapters(scheduler: Any) -> list[str]:
    """Names of the adapters that are loaded."""
    return sorted(ref.lora_name for ref in scheduler.tp_worker.model_runner.lora_manager.lora_refs.values())


def pools(scheduler: Any) -> dict[str, int]:
    """What is free: rows, and slots of the KV cache with those that the prefix cache would give up."""
    room = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
    return {"rows": int(scheduler.req_to_token_pool.available_size()), "tokens": int(room)}


def double_absorbed(scheduler: Any, times: int) -> None:
    """The step that absorbs projections goes wrong on the live model, `times` times."""
    model, left = scheduler.tp_worker.model_runner.model, [times]
    step = type(model).post_load_weights

    def faulty(self: Any, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        if self is model and left[0]:
            left[0] -= 1
            for layer in self.model.layers:
                layer.self_attn.w_vc.mul_(2)

    _patch().setattr(type(model), "post_load_weights", faulty)


def workshop(scheduler: Any, job: str, folder: str) -> dict[str, Any]:
    """A job of `tests.sglang.workshop`; what broke in it, in words."""
    from tests.sglang import workshop as shop

    try:
        return shop.JOBS[job](scheduler, folder)
    except Exception:  # process boundary: SGLang ends a scheduler over it
        return {"error": traceback.format_exc()}


COMMANDS = {
    each.__name__: each
    for each in (
        mend,
        break_write,
        slow_write,
        keep_caches,
        bits,
        scale,
        adapters,
        peek,
        pools,
        double_absorbed,
        workshop,
    )
}
