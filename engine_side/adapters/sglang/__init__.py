"""SGLang behind the adapter protocol. Nothing here imports SGLang before SGLang itself is there.

`plugin` hooks the scheduler's `check_weights`, through which jobs come to every rank (`scheduler`, over `host`,
`logprobs` and `loras`). `driver` speaks for a `sglang.Engine` of this process: `line` lets every thread use its event
loop, `gate` stands in front of its requests. `load` is what users name when they start the engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LOADER = "engine_side.adapters.sglang.load"
"""What users write: `sglang.Engine(..., custom_weight_loader=["engine_side.adapters.sglang.load"])`."""


def load(model: Any, named_tensors: Iterable[tuple[str, Any]]) -> None:
    """Naming this loader opens an engine to the bridge. SGLang's own update calls with it are refused before they get
    here (`scheduler.refuse_update`): an update that the bridge does not verify is none of its. Raises RuntimeError."""
    raise RuntimeError(f"{LOADER} is driven by bridge.attach(engine).push(...), not by update calls")
