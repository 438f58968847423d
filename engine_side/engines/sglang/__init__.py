"""Drivers and rank host for SGLang. Importing this package does not import SGLang.

In every scheduler process, `plugin` hooks `check_weights`, through which jobs come to each rank (`scheduler`, over
`host`, `logprobs` and `lora_slots`). In the process where requests come in, `frontend` hangs on the tokenizer manager,
with a gate that every request passes; the same hook leads to it there.

The driver (`remote`) reaches an engine in one of two ways:
- `driver`: a `sglang.Engine` of this process, attached or started here, over its event loop (`in_process_channel`);
- `server`: a running server at an address, over its HTTP endpoints.
`load` is the name by which users open an engine or server of their own to the bridge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LOADER = "engine_side.engines.sglang.load"
"""As users write it: `sglang.Engine(..., custom_weight_loader=["engine_side.engines.sglang.load"])`."""


def load(model: Any, named_tensors: Iterable[tuple[str, Any]]) -> None:
    """Open an engine to the bridge by naming this loader when it starts; the loader itself always raises RuntimeError.

    SGLang's own update calls with it are refused before they get here (`scheduler.refuse_update`), since the bridge
    would not verify such an update."""
    raise RuntimeError(f"{LOADER} is driven by bridge.attach(engine).push(...), not by update calls")
